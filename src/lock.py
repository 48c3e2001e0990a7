"""One writer a directory: two trainings that save to the same place would ruin each other's work."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from src.errors import UserError  # a directory in use is something the user can mend


@contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Own `directory` for the length of a with block.

    The lock is the kernel's, on the file .lock, not that file's existence: however the owner dies, it is gone with it.
    The owner's number is in a file beside it, for no other process may read a file that Windows has locked.

    Raises:
        UserError: another process owns the directory; the text names it.
    """
    lock, owner = FileLock(str(directory / ".lock")), directory / ".owner"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = "another process"
        with suppress(OSError):  # it has the lock and has not yet said who it is
            who = f"process {owner.read_text()}"
        raise UserError(
            f"{who} is training in {directory}: wait for it, stop it, or choose other "
            "paths (--checkpoint_path, --output_path, --log_path)"
        ) from None
    try:
        owner.write_text(str(os.getpid()))
        yield
    finally:
        with suppress(OSError):
            owner.unlink()
        lock.release()
