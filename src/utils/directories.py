"""Output directories: created and checked before the work begins."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from src.utils.errors import SettingError


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
        except OSError as error:
            failures.append(f"--{setting} {path}: {error.strerror}")
    if failures:
        raise SettingError(f"{'; '.join(failures)}. Name directories that can be written")
    return paths
