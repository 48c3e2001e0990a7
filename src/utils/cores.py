"""How many threads the CPU computes with, so that other programs on the same machine cost their share and no more.

The threads of a parallel loop wait for the last of them. If one shares its core with another program, all others wait
for it again and again, and a training with a thread for each core falls to a third of its speed (docs/speed.md). So
only as many threads compute as there are cores that other programs leave free.
"""

import logging
import os
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

STAT = Path("/proc/stat")  # the CPU time of each core, where the system is Linux
SHORTEST = 0.5  # seconds; over less time than this, an average says nothing


@dataclass(frozen=True)
class Reading:
    """Times in seconds: of the clock, and used since the start of the cores by all programs and by this one."""

    clock: float
    all: float
    own: float


def read() -> Reading | None:
    """Read the CPU time used on the cores that this process may use; None where the system does not tell."""
    try:
        lines = [line.split() for line in STAT.read_text(encoding="ascii").splitlines()]
        cores = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        # Of each core: user, nice, system, idle, iowait, irq, softirq, …, in ticks.
        ticks = sum(sum(map(int, (*line[1:4], *line[6:8]))) for line in lines if line[0] in cores)
        return Reading(time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time())
    except (OSError, AttributeError, ValueError):
        return None


last = read()  # at the start of the program: to import torch takes long enough for a first average


@cache
def most_threads() -> int:
    """The number of threads that torch starts with: one for each physical core that this process may use."""
    import torch  # here, because the first reading must come before this import, which takes seconds

    return torch.get_num_threads()


def free_threads(before: Reading, after: Reading, cores: int, most: int) -> int:
    """The number of threads, from 1 to `most`, that have a core of their own.

    Args:
        before, after: what was read at the two ends of the time that counts.
        cores: number of cores that this process may use.
        most: number of threads without other programs.
    """
    others = (after.all - before.all - (after.own - before.own)) / (after.clock - before.clock)  # cores they keep busy
    return max(1, min(most, round(cores - others)))


def share() -> None:
    """Set torch's number of threads by what other programs used since the last call, or since the program started.

    Nothing changes if the number is set by OMP_NUM_THREADS, with several processes, or outside Linux.
    """
    global last
    before, after = last, read()
    if "WORLD_SIZE" in os.environ or before is None or after is None or after.clock - before.clock < SHORTEST:
        return
    last = after
    use(free_threads(before, after, len(os.sched_getaffinity(0)), most_threads()))


def use(threads: int) -> None:
    """Set torch's number of threads, unless OMP_NUM_THREADS does; a change is logged."""
    import torch

    most = most_threads()
    if "OMP_NUM_THREADS" in os.environ or (threads := min(threads, most)) == torch.get_num_threads():
        return
    torch.set_num_threads(threads)
    why = "other programs use the other cores" if threads < most else "the cores are free"
    log.info("computing with %d of %d threads: %s (set OMP_NUM_THREADS for another number)", threads, most, why)
