"""UserError, the exception for problems that the user can fix, and how programs report it."""

import os
import sys
import time


class UserError(Exception):
    """A problem the user can fix. The message is one line: what was found, what was expected, what to do next.

    run_program prints it as ``error: <message>``, without a traceback.
    """


def first_line(error: Exception) -> str:
    """First line of another library's exception, for use in a UserError."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def run_program(main) -> None:
    """Call main(); on a UserError, a GPU without enough memory, or Ctrl-C, exit with one line and no traceback.

    If one of several processes fails, only that one reports why; the others wait for the launcher to end them.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a non-UTF-8 terminal must not crash a finished job
    try:
        main()
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(15)  # every process probably has this error: let rank 0 report it
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)  # as shells report Ctrl-C
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which not every program imports
            sys.exit(
                f"error: {first_line(error)} Use a smaller --batch-size; in training, more "
                "--gradient_accumulation_steps make up for it, --vae_checkpointing needs less memory for each image, "
                "and on a GPU without bf16, --mixed_precision fp16 needs half as much"
            )
        if any(backend in str(error) for backend in ("gloo", "NCCL")):
            time.sleep(30)  # another process probably failed first: the launcher ends this one
        raise
