"""A model looked at while it reads a text: what each token ran, what that gave, and what else it could have run."""

from midskip.look.forced import Outcome, what_if
from midskip.look.stream import stream
from midskip.look.text import Look, look

__all__ = ["Look", "Outcome", "look", "stream", "what_if"]
