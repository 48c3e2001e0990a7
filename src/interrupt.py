"""SIGINT, SIGTERM and SIGHUP as a question that the program asks when it is ready for the answer."""

import signal
from collections.abc import Callable
from types import FrameType, TracebackType

# What asks a program to stop. Windows has no SIGHUP.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interrupted(Exception):
    """The user, or the system, asked the program to stop; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopSignals:
    """While active, the first SIGINT, SIGTERM or SIGHUP is only noted; a second one acts as if this class were absent.

    `check()` raises `Interrupted` once a signal has been noted: call it where the program's state is whole.

    Args:
        agree: makes of the number noted here, or 0, that of all processes which have to stop together.
    """

    def __init__(self, agree: Callable[[int], int] = lambda number: number) -> None:
        self.agree = agree

    def __enter__(self) -> "StopSignals":
        self.number = 0
        self._previous = {}
        for number in SIGNALS:
            ignored = signal.getsignal(number) == signal.SIG_IGN
            if not (ignored and number.name == "SIGHUP"):  # nohup ignores it
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def check(self) -> None:
        """Raise `Interrupted` if a signal has come since the block was entered."""
        if number := self.agree(self.number):
            raise Interrupted(number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
