"""Lock on a directory, so that no two trainings write their checkpoints to the same place."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from src.utils.errors import UserError


@contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Context that locks `directory` for this process.

    The operating system locks the file .lock and releases the lock when the process ends, in whatever way. The process
    number is in a second file, .owner, because Windows lets no other process read a locked file.

    Raises:
        UserError: another process has locked the directory; the message names it.
    """
    lock, owner = FileLock(str(directory / ".lock")), directory / ".owner"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = "another process"
        with suppress(OSError):  # the other process has not written its number yet
            who = f"process {owner.read_text()}"
        raise UserError(
            f"{who} is training in {directory}: wait for it, stop it, or choose other "
            "paths (--checkpoint_path, --output_path, --log_path)"
        ) from None
    try:
        with suppress(OSError):  # it only serves a message
            owner.write_text(str(os.getpid()))
        yield
    finally:
        with suppress(OSError):
            owner.unlink()
        lock.release()
