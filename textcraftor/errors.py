"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """Bad input, said in one line: what was found, what was expected, what to do next.

    Programs turn it into ``sys.exit(f"error: {message}")``; it never shows a traceback.
    """


def first_line(error: Exception) -> str:
    """What another library's exception says, short enough to go into a UserError."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
