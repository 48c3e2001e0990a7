"""SIGINT, SIGTERM and SIGHUP as exceptions that are raised only where the program's state is complete."""

import os
import signal
from collections.abc import Callable
from types import FrameType, TracebackType

# Signals that ask the program to stop. Windows has no SIGHUP.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interrupted(Exception):
    """A signal asked the program to stop; `number` is that of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopSignals:
    """Context in which the first SIGINT, SIGTERM or SIGHUP is stored until `check` is called.

    A second signal has its usual effect. SIGHUP is left alone if it is ignored, as under nohup.

    Args:
        agree: maps the number of the signal that this process received, or 0, to that of the signal on which all
            processes stop together.
    """

    def __init__(self, agree: Callable[[int], int] = lambda number: number) -> None:
        self.agree = agree

    def __enter__(self) -> "StopSignals":
        self.number = 0
        self._previous = {}
        for number in SIGNALS:
            ignored = signal.getsignal(number) == signal.SIG_IGN
            if not (ignored and number.name == "SIGHUP"):  # set by nohup
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def check(self) -> None:
        """Raise `Interrupted` if a signal was received in this context."""
        if number := self.agree(self.number):
            raise Interrupted(number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()
        if os.isatty(2):  # somebody is waiting; print is not safe in a signal handler
            os.write(2, b"\nfinishing this step, then saving; once more to stop at once, without saving\n")

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
