"""Progress of whatever takes long: bars on a terminal, lines of the log elsewhere; numbers and times in words."""

import io
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

FIRST_LINE, NEXT_LINES = 10.0, 60.0  # seconds before the first line, and before each of the others
WARM_UP, MEASURED = 20, 80  # steps that a pace leaves out, as slower than the rest, and those that it measures


def on_terminal(log: logging.Logger) -> bool:
    """Whether bars can be drawn: `log` is enabled for INFO (no --quiet), and stderr is a terminal with a width."""
    if not log.isEnabledFor(logging.INFO) or sys.stderr is None or not sys.stderr.isatty():
        return False
    return os.get_terminal_size(sys.stderr.fileno()).columns > 0  # 0 in some containers, where tqdm would draw nothing


def progress(log: logging.Logger, **kwargs: Any) -> tqdm:
    """A tqdm bar on a terminal; without one, as in a log file, `Lines`. With --quiet, neither is shown.

    Args:
        log: the logger of the lines.
        kwargs: of tqdm; `total` is required unless `iterable` has a length, and `unit` is a plural like " images".
    """
    if on_terminal(log):
        return tqdm(**kwargs)
    return Lines(log, **kwargs) if log.isEnabledFor(logging.INFO) else tqdm(disable=True, **kwargs)


@contextmanager
def progress_in_steps(log: logging.Logger, steps: int, **kwargs: Any) -> Iterator[Callable[[int], None]]:
    """Progress of items that take `steps` steps each; yields a function to be called with the items in each step."""
    done = 0  # steps of single items: an integer, because a sum of fractions would miss the total
    with progress(log, unit_scale=True, **kwargs) as bar:

        def advance(items: int) -> None:
            nonlocal done
            done += items
            bar.update(min(done / steps, bar.total) - bar.n)

        yield advance


class Lines(tqdm):
    """Has the interface of tqdm, and logs a line after FIRST_LINE seconds, then one every NEXT_LINES seconds.

    A thread writes them, so that they also come while a single step, a save or a compilation takes minutes.
    """

    monitor_interval = 0  # tqdm's own thread is not needed

    def __init__(self, log: logging.Logger, **kwargs: Any) -> None:
        super().__init__(file=io.StringIO(), disable=False, miniters=1, **kwargs)
        self.log, self.closed = log, threading.Event()
        self.marks = deque([(time.monotonic(), self.n)], maxlen=10)  # times of the last lines, and what was done then
        self.thread = threading.Thread(target=self._log_lines, daemon=True)
        self.thread.start()

    def line(self) -> str:
        """What is done, with the rate since the tenth last line and the time that is left at this rate."""
        (before, first), now, n = self.marks[0], time.monotonic(), self.n
        what = ", ".join(filter(None, (self.desc.removesuffix(": "), self.postfix)))
        line = f"{what}: {n:,.0f} of {self.total:,}{self.unit}"
        if n > first and now > before:
            rate = (n - first) / (now - before)
            line += f", {self.format_sizeof(rate)}{self.unit}/s, {duration((self.total - n) / rate)} left"
        else:  # no step is done yet: what comes before, such as a compilation, is no part of the rate
            self.marks.clear()
        self.marks.append((now, n))
        return line

    def display(self, *_args: Any, **_kwargs: Any) -> None:
        """Draw no bar."""

    def close(self) -> None:
        """End the lines."""
        self.closed.set()
        self.thread.join()
        super().close()

    def _log_lines(self) -> None:
        wait = FIRST_LINE
        while not self.closed.wait(wait):
            self.log.info(self.line())
            wait = NEXT_LINES


def duration(seconds: float) -> str:
    """A time span in words, rounded: 45 s, 12 min, 26 h 40 min."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def counted(count: int, noun: str) -> str:
    """Return a number with its noun, such as "1 image" or "1,000 images"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


class Pace:
    """Measures how long a step of training takes, from the first hundred, without the time between epochs."""

    def __init__(self) -> None:
        self.steps, self.seconds, self.since = 0, 0.0, 0.0

    def start(self) -> None:
        """To be called at the start of each epoch."""
        self.since = time.monotonic()

    def count(self, wait: Callable[[], object]) -> float | None:
        """Count a step; returns the seconds per step after the last one that is measured, otherwise None.

        An accelerator queues steps; `wait` waits until this one is done.
        """
        self.steps += 1
        if self.steps in (WARM_UP, WARM_UP + MEASURED):
            wait()
        now = time.monotonic()
        if WARM_UP < self.steps <= WARM_UP + MEASURED:
            self.seconds += now - self.since
        self.since = now
        return self.seconds / MEASURED if self.steps == WARM_UP + MEASURED else None
