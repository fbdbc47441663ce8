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
    """Call main(); a UserError ends the process with its one line.

    Of several processes only the one that failed speaks: the launcher ends the others, which wait for that.
    """
    try:
        main()
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # most likely all have this error: let rank 0 say it
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if any(backend in str(error) for backend in ("gloo", "NCCL")):
            time.sleep(30)  # an exchange has failed, most likely as another process has: the launcher ends this one
        raise
