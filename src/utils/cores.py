"""How many threads compute on the CPU beside other programs.

The threads of a parallel loop wait for the last of them. If one shares its core with another program, all others wait
for it in every loop: beside one busy program, a training with a thread for each core fell to a third of its speed
(docs/speed.md). So there are only as many threads as cores that other programs leave free, but at least half of them:
a program beside may end soon, and one that is meant to yield, with a high nice value, does not count.
"""

import logging
import math
import os
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from src.utils.torchrun import place

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

STAT = Path("/proc/stat")  # the CPU time of each core, where the system is Linux
SHORTEST = 0.5  # seconds; over less time than this, an average says nothing


@dataclass(frozen=True)
class Reading:
    """Times in seconds: of the clock, and CPU time used until then."""

    clock: float
    all: float  # by all programs, on the cores that this one may use
    own: float  # by this program and the child processes that it has waited for


def read() -> Reading | None:
    """Read the CPU time used on the cores that this process may use; None where the system does not tell."""
    try:
        lines = [line.split() for line in STAT.read_text(encoding="ascii").splitlines()]
        cores = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        # Of each core, in ticks: user, nice, system, idle, iowait, irq, softirq. Programs with a high nice value yield
        # to this one, unless it has one, too.
        columns = (1, 3, 6, 7) if os.nice(0) <= 0 else (1, 2, 3, 6, 7)
        ticks = sum(int(line[column]) for line in lines if line[0] in cores for column in columns)
        return Reading(time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4]))
    except (OSError, AttributeError, ValueError):
        return None


last = read()  # at the start of the program: to import torch takes long enough for a first average


@cache
def most_threads() -> int:
    """The number of threads that torch had when this was first called: usually one for each physical core."""
    import torch  # here, because the first reading must come before this import, which takes seconds

    return torch.get_num_threads()


def free_threads(before: Reading, after: Reading, cores: int, most: int) -> int:
    """The number of threads that have a core of their own, but at least half of `most`.

    Args:
        before, after: readings at the two ends of the time that counts.
        cores: number of cores that this process may use.
        most: number of threads without other programs.
    """
    others = (after.all - before.all - (after.own - before.own)) / (after.clock - before.clock)  # cores they keep busy
    free = math.ceil(cores - others - 0.5)  # half a core in use counts as one
    return max(1, most // 2, min(most, free))


def share(device: "torch.device") -> None:
    """Set torch's number of threads by what other programs used since the last call, or since the program started.

    Nothing changes if OMP_NUM_THREADS sets the number, with several processes, on a GPU, or outside Linux.
    """
    global last
    before, after = last, read()
    if device.type != "cpu" or before is None or after is None or after.clock - before.clock < SHORTEST:
        return
    last = after
    threads = free_threads(before, after, len(os.sched_getaffinity(0)), most_threads())
    use(threads, "other programs use the other cores" if threads < most_threads() else "the cores are free")


def use(threads: int, why: str) -> None:
    """Set torch's number of threads, unless OMP_NUM_THREADS or torchrun does; a change is logged with the reason."""
    import torch

    threads = min(threads, most := most_threads())
    if "OMP_NUM_THREADS" in os.environ or place().size > 1 or threads == torch.get_num_threads():
        return
    torch.set_num_threads(threads)
    log.info("computing with %d of %d threads: %s (set OMP_NUM_THREADS for another number)", threads, most, why)
