"""One writer a directory: two trainings that save to the same place would ruin each other's work."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from src.errors import UserError  # a directory in use is something the user can mend


@contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Own `directory` for the length of a with block.

    The lock is the kernel's (flock), not the file's existence: however the owner dies, it is gone with it.

    Raises:
        UserError: another process owns the directory; the text names it.
    """
    with open(directory / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"process {file.read().strip()} is training in {directory}: wait for it, stop it, or choose other "
                "paths (--checkpoint_path, --output_path, --log_path)"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
