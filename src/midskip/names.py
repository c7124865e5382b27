"""What to say of a name that is not known."""

import difflib
from collections.abc import Iterable


def near(name: object, known: Iterable[str]) -> str:
    """The end of an error: `"; did you mean 'hidden_size'?"`, or nothing where no known name is like this one."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
