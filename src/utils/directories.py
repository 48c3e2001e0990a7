"""Output directories: created, checked before the work begins, and marked, so that pictures in them are no data."""

import contextlib
import tempfile
from collections.abc import Mapping
from pathlib import Path

from src.utils.errors import SettingError

MARK = ".simple-ddpm"  # name of an empty file in every directory that was made here


def make_directories(places: Mapping[str, str]) -> list[Path]:
    """Create directories, and check that files can be written there before hours of work are spent.

    Args:
        places: name of the flag (without --) → directory.

    Returns:
        The directories in the same order.

    Raises:
        SettingError: some directories cannot be created or written; the message names all of them.
    """
    paths, failures = [Path(place) for place in places.values()], []
    for setting, path in zip(places, paths, strict=True):
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
            with contextlib.suppress(FileExistsError):
                (path / MARK).touch(exist_ok=False)
        except OSError as error:
            failures.append(f"--{setting} {path}: {error.strerror}")
    if failures:
        raise SettingError(f"{'; '.join(failures)}. Name directories that can be written")
    return paths
