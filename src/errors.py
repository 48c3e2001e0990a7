"""What goes wrong in a way the user can mend, and how the scripts say so."""

import contextlib
import errno
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NoReturn


class UserError(Exception):
    """Something the user can mend: its text says what is wrong and what to do, in one line."""

    status = 1


class SettingError(UserError):
    """A setting that cannot be, here or now: the user would have to give another one."""

    status = 2


class WriteError(UserError):
    """A result cannot be written where it belongs."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """A block that writes the file `path`: an OSError in it becomes a WriteError that names the file."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise WriteError(f"cannot write {path} ({why}): free space or choose another place") from error


# Errors of the system that somebody can mend who frees space or chooses another place. Any other OSError that was not
# foreseen, such as a file that should be there and is not, is a defect of this program.
PLACE_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),  # full: the disk, somebody's share of it, or the largest file
    *(errno.EROFS, errno.EACCES, errno.EPERM),  # not to be written
    *(errno.EIO, errno.ESTALE),  # a broken disk, a lost network drive
    errno.EPIPE,  # nobody reads on
}


def explain_imports(script: str) -> None:
    """Until `run` takes over, say in one line what can go wrong while the heavy packages load."""

    def explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, ModuleNotFoundError):
            print(f"{script}: error: {_no_package(error)}", file=sys.stderr)
        elif isinstance(error, KeyboardInterrupt):
            print(f"{script}: error: interrupted", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = explain


def run(main: Callable[[], int], script: str, quiet: bool) -> None:
    """Call `main` and exit with its status; what the user can mend becomes one line on stderr.

    Anything else that escapes is a defect of this program and keeps its traceback.

    Args:
        main: returns the exit status.
        script: its name, the start of the line.
        quiet: show warnings and errors only.
    """
    logging.raiseExceptions = False  # nobody reads on, as in `train.py | head`: that must not end a training
    threading.excepthook = _mute_tensorboard
    logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        status = main()
    except UserError as error:
        message, status = str(error), error.status
    except OSError as error:
        if error.errno not in PLACE_ERRORS:
            raise
        message, status = f"{error}; free space or choose another place", 1
    except ModuleNotFoundError as error:
        message, status = _no_package(error), 1
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except (MemoryError, RuntimeError) as error:
        status = 1
        if _lacks_memory(error):
            message = f"out of memory: reduce --batch_size or, in training, the network ({_first_line(error)})"
        elif _lost_a_process(error):
            message = f"another process of this run has gone: its own message says why ({_first_line(error)})"
        else:
            raise
    else:
        _leave(status)
    print(f"{script}: error: {message}", file=sys.stderr)
    _leave(status)


def _leave(status: int) -> NoReturn:
    """End the process; one of several ends at once, without taking down the interpreter.

    The threads that connect the processes outlive the group. One that lets go of its last tensor while the interpreter
    is being taken down aborts the process (pytorch/pytorch pull request 179291), and with it a run that was complete.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # nobody reads on
                stream.flush()
        os._exit(status)
    sys.exit(status)


def _mute_tensorboard(args: threading.ExceptHookArgs) -> None:
    """Say nothing of an error in TensorBoard's writing thread, for it is raised again in the main thread."""
    if type(args.thread).__module__.partition(".")[0] != "tensorboard":
        threading.__excepthook__(args)


def _no_package(error: ModuleNotFoundError) -> str:
    return f"no package {error.name}: run pip install -r requirements.txt"


def _lacks_memory(error: Exception) -> bool:
    """Python's own error, an accelerator's (known by name or text: this file need not load torch), or the CPU's."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "backend out of memory" in str(error)  # Apple's, a plain RuntimeError
        or "can't allocate memory" in str(error)
    )


def _lost_a_process(error: Exception) -> bool:
    """What the libraries between processes say when nobody answers any more."""
    return type(error).__name__ in ("DistBackendError", "DistNetworkError") or "gloo" in str(error)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
