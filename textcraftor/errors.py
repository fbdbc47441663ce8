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

    When one of several processes fails, it alone reports why; the others wait for the launcher to end them.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8 must not end a finished job
    try:
        main()
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # most likely every process has this error: let rank 0 report it
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if any(backend in str(error) for backend in ("gloo", "NCCL")):
            time.sleep(30)  # most likely another process failed first: the launcher ends this one
        raise
