"""Data sets whose items carry labels of their own: what one has to give, and how a recipe names it. T: columns."""

from __future__ import annotations

import inspect
import re
import zlib
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import Dataset

from midskip.names import near
from midskip.plugins import load_class

from .batches import IGNORED_LABEL
from .errors import DataError
from .split import SIDES

BUILT_IN = {"pointers": "midskip.data.pointers:Pointers"}
MAX_GROUPS = 1024
_IMPORT_PATH = re.compile(r"(?!hub:)[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_LOWEST = {"input_ids": 0, "labels": 0, "group": -1, "attention_mask": 0, "position_ids": 0}
_NUM_CHECKED = 16  # items of a side that a run looks at before it begins


class Items(Protocol):
    """Items by number, as a map-style torch `Dataset` or a list has them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Tensor]: ...


class LabelledData:
    """A data set that is no text. A subclass sets the four attributes; its keyword arguments are `data.settings` of a
    recipe.

    An item is `{"input_ids": int64 [T], "labels": int64 [T]}`, T = `length`, and may have

    - `"group": int64 [T]`: what results are reported by, the kind of token; -1 for none, else below 1024. It is not
      given to the model;
    - `"attention_mask"` and `"position_ids"`, int64 [T], as the model takes them.

    Labels follow transformers' convention: the model shifts them, so `labels[i + 1]` is what column i has to give, and
    `labels[0]` is not used. Where there is nothing to give it is -100. An item has to depend on its number and the
    data set's own settings alone, or a run that was killed would go on with others.

    Attributes:
        vocab_size: ids and labels are below it.
        length: T, the columns of every item.
        training, validation: the items, each a map-style torch `Dataset` or a list.
    """

    vocab_size: int
    length: int
    training: Items
    validation: Items

    # what text has beside that
    tokenizer = None
    end_of_text = None
    summary: Mapping[str, Any] = {}

    def check(self, console: Console | None = None) -> dict[str, list[dict[str, Any]]]:
        """Looks at up to 16 items of each side; gives by side, for each, `{"name", "crc32"}`, to compare with later.

        Raises `DataError` for an item that is not as it has to be, or is another when it is asked for again.
        """
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for side in SIDES:
            items, names, has_label = getattr(self, side), None, False
            count = min(len(items), _NUM_CHECKED)
            for number in sorted({part * (len(items) - 1) // max(1, count - 1) for part in range(count)}):
                where = f"{side} item {number} of {type(self).__name__}"
                item = items[number]
                first, second = self._fingerprint(item, where), self._fingerprint(items[number], where)
                has = item.keys() - ({"group"} if side == "training" else set())  # which nothing is trained on
                names, has_label = names or has, has_label or _has_label(item)
                if has != names:
                    raise DataError(
                        f"The {where} has {', '.join(sorted(has))}, and one before it {', '.join(sorted(names))}. "
                        "Expected the same in all items of a side."
                    )
                if first != second:
                    raise DataError(
                        f"The {where} is another each time it is asked for. Expected the same, so that a run can be "
                        "resumed; draw it from its number and a seed."
                    )
                found[side].append({"name": f"item {number}", "crc32": first})
            if not has_label and not any(_has_label(items[number]) for number in range(len(items))):
                raise DataError(
                    f"The {side} items of {type(self).__name__} have no labels but {IGNORED_LABEL}. Expected some that "
                    "are ids, after the first column."
                )
        return found

    def _fingerprint(self, item: dict[str, Tensor], where: str) -> int:
        """A checksum of an item that was found to be whole."""
        if not isinstance(item, Mapping):
            raise DataError(f"The {where} is a {type(item).__name__}. Expected a dict with input_ids and labels.")
        if unknown := sorted(item.keys() - _LOWEST.keys()):
            raise DataError(f"The {where} has {', '.join(unknown)}. Expected {', '.join(_LOWEST)}; leave out the rest.")
        ends = {"input_ids": self.vocab_size, "labels": self.vocab_size, "group": MAX_GROUPS}
        ends |= {"attention_mask": 2, "position_ids": self.length}
        crc = 0
        for name in _LOWEST:
            if name not in item and name not in ("input_ids", "labels"):
                continue
            values = item.get(name)
            if not isinstance(values, Tensor) or values.dtype != torch.int64 or values.shape != (self.length,):
                got = f"{values.dtype} {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
                raise DataError(f"The {where} has as {name} {got}. Expected a tensor, int64 [{self.length}].")
            wrong = ((values < _LOWEST[name]) | (values >= ends[name])) & ~(
                (values == IGNORED_LABEL) & (name == "labels")
            )
            if wrong.any():
                also = f", or {IGNORED_LABEL}" if name == "labels" else ""
                raise DataError(
                    f"The {where} has {values[wrong][0]} among its {name}. Expected {_LOWEST[name]} to "
                    f"{ends[name] - 1}{also}."
                )
            crc = zlib.crc32(values.numpy().tobytes(), zlib.crc32(name.encode(), crc))
        return crc


def _has_label(item: Mapping[str, Tensor]) -> bool:
    return bool((item["labels"][1:] != IGNORED_LABEL).any())


class TrainingItems(Dataset[dict[str, Tensor]]):
    """Items as a model is trained on them, without `group`."""

    def __init__(self, items: Items) -> None:
        self.items = items

    def require(self, num_items: int) -> None:
        """Raises `DataError` if there are fewer; a batch of B needs B of them."""
        if len(self) < num_items:
            raise DataError(
                f"There are {len(self)} items to train on. Expected {num_items} or more; make more, or choose a "
                "smaller batch."
            )

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values for name, values in self.items[index].items() if name != "group"}


def is_labelled(source: str) -> bool:
    """Whether `data.source` of a recipe names labelled data: `"pointers"` or `"package.module:Class"`."""
    return source in BUILT_IN or _IMPORT_PATH.fullmatch(source) is not None


def build_labelled(source: str, settings: Mapping[str, Any]) -> LabelledData:
    """The data set that a recipe names.

    Raises:
        ValueError: no such class, a setting that it does not know, or no items.
    """
    kind = load_class(BUILT_IN.get(source, source), LabelledData, "labelled data", tuple(BUILT_IN))
    try:
        inspect.signature(kind).bind(**settings)
    except TypeError as error:
        known = list(inspect.signature(kind).parameters)
        unknown = next((name for name in settings if name not in known), "")
        raise DataError(
            f"Labelled data {source!r} got {dict(settings)}: {error}; its settings are: {', '.join(known) or 'none'}"
            f"{near(unknown, known)}"
        ) from error
    data = kind(**settings)
    for name in ("vocab_size", "length", *SIDES):
        value = getattr(data, name, None)
        if name in SIDES and value is not None and not hasattr(value, "__len__"):
            raise DataError(
                f"Labelled data {source!r} has as {name} a {type(value).__name__}, which has no length. Expected a "
                "map-style Dataset or a list."
            )
        number = len(value) if name in SIDES and value is not None else value
        lowest = {"vocab_size": 1, "length": 2}.get(name, 1)
        if not isinstance(number, int) or number < lowest:
            what = f"a whole number (int), {lowest} or more" if name not in SIDES else "1 or more items"
            raise DataError(f"Labelled data {source!r} has {name} {number!r}. Expected {what}; set it in the class.")
    return data
