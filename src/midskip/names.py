"""What to say of a name or a value that is not known."""

import difflib
from collections.abc import Iterable


def near(name: object, known: Iterable[str]) -> str:
    """The end of an error: `"; did you mean 'hidden_size'?"`, or nothing where no known name is like this one."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    """ValueError if the value of the setting `name` is none of those known."""
    if value not in known:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, known))}")
