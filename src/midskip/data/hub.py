"""Data sets and tokenizers by name: what can go wrong there becomes one line."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from .errors import DataError, one_line

PREFIX = "hub:"


@contextlib.contextmanager
def refusing(what: str, expected: str) -> Iterator[None]:
    """Turns any error within into a `DataError`, and keeps the hub's library from printing its many tries."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # of many kinds: of datasets, transformers, huggingface_hub, fsspec and the network
        raise DataError(f"{what}: {one_line(error)}. Expected {expected}.") from None
    finally:
        logger.setLevel(level)


def read_data_set(source: str) -> Iterator[Any]:
    """The rows of `hub:NAME[:CONFIG[:SPLIT]]`, streamed. Raises `DataError` for whatever goes wrong."""
    import datasets

    form = "hub:NAME[:CONFIG[:SPLIT]], a data set on the hub or in a local folder"
    name, config, split, *more = [*source.removeprefix(PREFIX).split(":"), "", ""]
    if not name or len(more) > 2:
        raise DataError(f"The source {source!r} names no data set. Expected {form}; correct it.")
    with refusing(f"The data set {source!r} cannot be opened", f"{form}; check its name and the network"):
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    with refusing(f"Reading {source!r} failed", "a data set that can be read to its end; try again"):
        yield from rows
