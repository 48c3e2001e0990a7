"""Progress bars, and numbers in messages."""

import logging
from typing import Any

from tqdm import tqdm


def progress(log: logging.Logger, **kwargs: Any) -> tqdm:
    """A tqdm bar, shown if `log` is enabled for INFO (without --quiet) and stderr is a terminal."""
    return tqdm(disable=None if log.isEnabledFor(logging.INFO) else True, **kwargs)


def counted(count: int, noun: str) -> str:
    """Return a number with its noun, such as "1 image" or "1,000 images"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"
