"""What goes wrong in a way the user can mend, and how the scripts say so."""

import logging
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend: its text says what is wrong and what to do, in one line."""

    status = 1


class SettingError(UserError):
    """A setting that cannot be, here or now: the user would have to give another one."""

    status = 2


def run(main: Callable[[], int], script: str, quiet: bool) -> None:
    """Call `main` and exit with its status; what the user can mend becomes one line on stderr.

    Anything else that escapes is a defect of this program and keeps its traceback.

    Args:
        main: returns the exit status.
        script: its name, the start of the line.
        quiet: show warnings and errors only.
    """
    logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        status = main()
    except UserError as error:
        message, status = str(error), error.status
    except OSError as error:
        message, status = f"{error}; free space or choose another place", 1
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, by name: this file need not load torch
            raise
        message, status = f"out of GPU memory: reduce --batch_size ({str(error).splitlines()[0]})", 1
    else:
        sys.exit(status)
    print(f"{script}: error: {message}", file=sys.stderr)
    sys.exit(status)
