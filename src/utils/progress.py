"""Progress bars."""

import logging
from typing import Any

from tqdm import tqdm


def progress(log: logging.Logger, **kwargs: Any) -> tqdm:
    """A tqdm bar, shown if `log` is enabled for INFO (without --quiet) and stderr is a terminal."""
    return tqdm(disable=None if log.isEnabledFor(logging.INFO) else True, **kwargs)
