"""What torchrun tells each process by environment variables: how many processes there are, and which one it is."""

import contextlib
import os
from typing import NamedTuple

from src.utils.errors import SettingError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Place(NamedTuple):
    """The place of a process among all."""

    rank: int = 0  # number of this process
    size: int = 1  # number of processes
    local_rank: int = 0  # number of this process among those of its machine


def place() -> Place:
    """The place that the variables of torchrun give to this process; without them, it is alone.

    Raises:
        SettingError: only some of the variables are set, or they do not fit together. A process that took itself for
            another than the first would write no file.
    """
    given = {name: value for name in VARIABLES if (value := os.environ.get(name, "").strip())}
    alone = Place()
    missing = [name for name in VARIABLES if name not in given]
    with contextlib.suppress(ValueError):  # not a number
        here = Place(*(int(given.get(name, number)) for name, number in zip(VARIABLES, alone, strict=False)))
        in_range = 0 <= here.rank < here.size and 0 <= here.local_rank < here.size
        if here == alone or (not missing and in_range and 0 < int(given["MASTER_PORT"]) < 2**16):
            return here
    raise SettingError(
        f"the environment has {', '.join(f'{name}={value}' for name, value in given.items())}, "
        f"{'without ' + ', '.join(missing) if missing else 'which do not fit together'}: "
        f"for a single process, unset {' '.join(given)}; several are started by torchrun"
    )
