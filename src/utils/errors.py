"""Errors that the user can fix, and their one-line messages."""

import atexit
import contextlib
import errno
import io
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NoReturn

log = logging.getLogger(__name__)
_failed: set[str] = set()  # by-products of which a warning has told


class UserError(Exception):
    """An error that the user can fix. The message says in one line what is wrong and what to do."""

    status = 1  # exit status of the script


class SettingError(UserError):
    """A setting has a value that is not allowed, or that does not fit the data, the machine or the checkpoint."""

    status = 2


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Context that writes the file `path`: an OSError becomes a UserError, whose message names the file."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"cannot write {path} ({why}): free space or choose another place") from error


@contextlib.contextmanager
def by_product(what: str) -> Iterator[None]:
    """Context for what a training can do without, such as plots and logs: an error in it becomes a warning.

    Args:
        what: a file or directory. There is one warning for each.
    """
    try:
        yield
    except Exception as error:  # packages for plots and logs raise errors of every kind
        if what not in _failed:
            log.warning("cannot write %s (%s): the run goes on without it", what, first_line(error.__cause__ or error))
        _failed.add(what)


@contextlib.contextmanager
def setting_errors() -> Iterator[None]:
    """Context in which a ValueError becomes a SettingError, for functions of the core that check their arguments."""
    try:
        yield
    except ValueError as error:
        raise SettingError(str(error)) from error


# Operating-system errors that the user can fix by freeing space or choosing another directory. Any other OSError that
# is not handled where it occurs, such as a missing file, is a bug of this program and keeps its traceback.
PLACE_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),  # disk full, quota exceeded, file too large
    *(errno.EROFS, errno.EACCES, errno.EPERM),  # no permission to write
    *(errno.EIO, errno.ESTALE),  # defective disk, lost network drive
}


def prepare(script: str) -> None:
    """Make stdout and stderr safe to write to, and missing packages and Ctrl-C during the imports errors of one line.

    To be called first. Whatever becomes of the output, it must not end the work: a stream that the shell has closed
    leads nowhere, a character that the terminal lacks becomes a question mark, and a reader that has gone, as in
    `eval.py | head`, is no error.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # the next file that is opened gets the number of this one, so it must be this
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    atexit.register(_flush)

    def explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, ImportError) and not _own(error):
            _print_error(script, _no_package(error))
        elif isinstance(error, KeyboardInterrupt):
            _print_error(script, "interrupted")
        elif isinstance(error, ValueError) and "tqdm" in _module(trace):  # it reads its variables when it is imported
            _print_error(script, f"an environment variable TQDM_... is wrong ({first_line(error)}): unset it")
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = explain


def print_results(text: str) -> None:
    """Print results that are in a file already, so that it matters little whether this succeeds."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def run(main: Callable[[], int], script: str, quiet: bool) -> None:
    """Call `main` and exit with its status. Errors that the user can fix are printed to stderr in one line.

    Any other exception is a bug of this program and keeps its traceback.

    Args:
        main: returns the exit status.
        script: name of the script, with which the line begins.
        quiet: log only warnings and errors.
    """
    logging.raiseExceptions = False  # a closed stdout, as in `train.py | head`, must not end a training
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
    except ImportError as error:
        if _own(error):
            raise
        message, status = _no_package(error), 1
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except (MemoryError, RuntimeError) as error:
        status = 1
        if lacks_memory(error):
            message = f"out of memory: reduce --batch_size or, in training, the network ({first_line(error)})"
        elif _lost_a_process(error):
            message = f"another process of this run has gone: its own message says why ({first_line(error)})"
        elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            message = f"torch.compile failed: train without --compile ({first_line(error)})"
        else:
            raise
    else:
        _leave(status)
    _print_error(script, message)
    _leave(status)


def _print_error(script: str, message: str) -> None:
    with contextlib.suppress(OSError):  # the exit status remains
        print(f"{script}: error: {message}", file=sys.stderr)


def _flush() -> None:
    """Write what stdout and stderr still hold, or drop it if nobody reads them: Python would fail when it exits."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _leave(status: int) -> NoReturn:
    """Exit; if there are several processes, without shutting down the interpreter.

    The communication threads of torch.distributed outlive the process group. If such a thread releases its last tensor
    while the interpreter shuts down, it aborts the process (pytorch/pytorch pull request 179291), and a complete run
    would count as failed.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        _flush()
        os._exit(status)
    sys.exit(status)


def _mute_tensorboard(args: threading.ExceptHookArgs) -> None:
    """Print no traceback of an error in TensorBoard's writing thread, which is raised again in the main thread."""
    if type(args.thread).__module__.partition(".")[0] != "tensorboard":
        threading.__excepthook__(args)


def _module(trace: TracebackType | None) -> str:
    """The name of the module in which an error was raised."""
    while trace and trace.tb_next:
        trace = trace.tb_next
    return trace.tb_frame.f_globals.get("__name__", "") if trace else ""


def _own(error: ImportError) -> bool:
    """Whether an import failed within this program: a bug, not a package to install."""
    return (error.name or "").partition(".")[0] == "src"


def _no_package(error: ImportError) -> str:
    missing = isinstance(error, ModuleNotFoundError)
    what = f"no package {error.name}" if missing else f"a package is broken ({first_line(error)})"
    file = "docs/requirements.txt" if (error.name or "").startswith("onnx") else "requirements.txt"
    return f"{what}: run pip install -r {file}"


def lacks_memory(error: Exception) -> bool:
    """Whether an error means that the memory of the CPU or of an accelerator is exhausted."""
    # torch's errors are recognised by name or text, so that this module need not import torch.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "backend out of memory" in str(error)  # RuntimeError of Apple's GPUs
        or "can't allocate memory" in str(error)
        or "size calculation overflowed" in str(error)
    )


def _lost_a_process(error: Exception) -> bool:
    """Whether an error of the communication libraries means that another process has ended."""
    return type(error).__name__ in ("DistBackendError", "DistNetworkError") or "gloo" in str(error)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
