"""What goes wrong in a way the user can mend, and how the scripts say so."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend: its text says what is wrong and what to do, in one line."""


def run(main: Callable[[], int | None], script: str) -> None:
    """Call `main` and exit with its status; a `UserError` becomes one line on stderr and status 1.

    Anything else that escapes is a defect of this program and keeps its traceback.
    """
    try:
        status = main()
    except UserError as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)
