"""What the data side raises, and the mark between documents."""

END_OF_TEXT = "<|endoftext|>"  # between documents: a line of a file, a token of a tokenizer


class DataError(ValueError):
    """Text, tokens or a setting about them that cannot be used; the message says why and what to do."""


def one_line(error: Exception) -> str:
    """What another library says, to be part of a line of ours."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300].rstrip('.')}"
