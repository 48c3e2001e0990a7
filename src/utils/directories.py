"""Output directories: created and checked before the work begins, and removed if nothing came of it."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from src.utils.errors import SettingError


def short(name: str, most: int = 60) -> str:
    """Return the start of a name, as part of a file name: at most `most` bytes, for file systems allow 255."""
    return name.encode("utf-8", "ignore")[:most].decode("utf-8", "ignore")


@contextmanager
def output_directories(places: Mapping[str, str]) -> Iterator[list[Path]]:
    """Context with directories to which files can be written, which is checked before hours of work are spent.

    They are created, with their parents. After an exception, those that were created and are still empty are removed,
    so that a run that is refused leaves nothing behind. After a good end they stay: another process may be about to
    write there.

    Args:
        places: name of the flag (without --) → directory.

    Returns:
        The directories in the same order.

    Raises:
        SettingError: some directories cannot be created or written; the message names all of them.
    """
    paths, failures, created = [Path(place) for place in places.values()], [], []
    try:
        for setting, path in zip(places, paths, strict=True):
            try:
                created += [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
                path.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=path):
                    pass
            except OSError as error:
                failures.append(f"--{setting} {path}: {error.strerror}")
        if failures:
            raise SettingError(f"{'; '.join(failures)}. Name directories that can be written")
        yield paths
    except BaseException:
        for folder in sorted(created, key=lambda folder: len(folder.parts), reverse=True):
            with suppress(OSError):  # it is not empty, or was never created
                folder.rmdir()
        raise
