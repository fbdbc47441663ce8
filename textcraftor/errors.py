"""The one exception that means: the user can mend this."""

import os
import sys
import time


class UserError(Exception):
    """Bad input, said in one line: what was found, what was expected, what to do next.

    run_program turns it into ``sys.exit(f"error: {message}")``; it never shows a traceback.
    """


def first_line(error: Exception) -> str:
    """What another library's exception says, short enough to go into a UserError."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def run_program(main) -> None:
    """Call main(); a UserError ends the process with its one line."""
    try:
        main()
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # the launcher ends all processes after the first: let rank 0 say it
        sys.exit(f"error: {error}")
