"""Token ids cut into windows of one length, the items of a run, and the order they come in. T: columns of a window."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from .errors import DataError

IGNORED_LABEL = -100  # what cross-entropy leaves out


class TokenWindows(Dataset[dict[str, torch.Tensor]]):
    """Windows of `length` tokens from shards of token ids (arrays or memory maps); none crosses from one to the next.

    Item i is `{"input_ids": int64 [T], "labels": int64 [T]}`, T = `length`. Labels equal input ids: the model shifts
    them itself, so a window gives T - 1 predictions and its first token is context only.

    With `drop_last=True`, for training, windows follow each other without overlap, and what is left of a shard after
    its last full window is left out. With `drop_last=False`, for validation, each window starts with the last token of
    the one before, so that every token but the first of its shard is predicted exactly once. The last window of a shard
    is padded with id 0 and label -100, and every item also has `"attention_mask": int64 [T]`, 0 on the padding.

    With `end_of_text`, the id that every document starts with, documents are kept apart: every item also has
    `"position_ids": int64 [T]`, which count from 0 at the start of the window and again at each such id (0 on padding).
    A position that does not grow is how a model knows, here as in transformers, that a new document starts.

    Raises `DataError` if a shard is not one dimension of integers, `length` is below 2, or there is not one window.
    """

    def __init__(
        self,
        shards: Sequence[np.ndarray] | np.ndarray,
        length: int,
        *,
        drop_last: bool = True,
        end_of_text: int | None = None,
    ) -> None:
        self.shards = [shards] if isinstance(shards, np.ndarray) else list(shards)
        self.length, self.drop_last, self.end_of_text = length, drop_last, end_of_text
        for shard in self.shards:
            if shard.ndim != 1 or not np.issubdtype(shard.dtype, np.integer):
                raise DataError(
                    f"A shard of token ids has shape {shard.shape} and type {shard.dtype}. Expected one dimension of "
                    "integers; pass what encode_documents or open_shard gives."
                )
        if length < 2:
            raise DataError(f"length is {length} tokens. Expected 2 or more, to read and to predict.")
        self._stride = length if drop_last else length - 1
        self._first = np.cumsum([0, *(self._count(len(shard)) for shard in self.shards)]).tolist()
        self.require(1)

    def require(self, num_windows: int) -> None:
        """Raises `DataError`, naming the files, if there are fewer windows; a batch of B needs B of them."""
        if len(self) < num_windows:
            names = [str(getattr(shard, "filename", None) or "text in memory") for shard in self.shards] or ["no shard"]
            names[1:] = [f"{len(names) - 1} more"] if len(names) > 1 else []
            num_tokens = sum(map(len, self.shards))
            raise DataError(
                f"There are {num_tokens} tokens ({' and '.join(names)}), which make {len(self)} windows of "
                f"{self.length} tokens. Expected {num_windows} windows or more; give more text, or choose a shorter "
                "length or a smaller batch."
            )

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"There is no window {index}: there are {len(self)}, counted from 0.")
        shard = bisect_right(self._first, index) - 1
        start = (index - self._first[shard]) * self._stride
        window = self.shards[shard][start : start + self.length].astype(np.int64)
        item = {"input_ids": window, "labels": window.copy()}
        if not self.drop_last:
            item["attention_mask"] = np.ones_like(window)
        if self.end_of_text is not None:
            columns = np.arange(len(window))
            item["position_ids"] = columns - np.maximum.accumulate(np.where(window == self.end_of_text, columns, 0))
        return {name: torch.from_numpy(self._padded(value, name)) for name, value in item.items()}

    def _count(self, num_tokens: int) -> int:
        return num_tokens // self.length if self.drop_last else max(0, -(-(num_tokens - 1) // self._stride))

    def _padded(self, value: np.ndarray, name: str) -> np.ndarray:
        padding = self.length - len(value)
        fill = IGNORED_LABEL if name == "labels" else 0
        return np.pad(value, (0, padding), constant_values=fill) if padding else value


class WindowOrder(Sampler[int]):
    """A fixed sequence of `num_samples` window indices: epoch after epoch, each a fresh shuffle of all windows.

    The shuffle of an epoch depends on `seed` and its number alone, and is drawn when the epoch is reached. So a batch
    sampler over it, dealt out among ranks, gives each window to one rank once an epoch, and a resumed run goes on in
    the order that it left.

    Raises `DataError` if there are no windows.
    """

    def __init__(self, num_windows: int, num_samples: int, seed: int) -> None:
        if num_windows < 1:
            raise DataError("There are no windows to put in order. Expected at least one; give more text.")
        self.num_windows, self.num_samples, self.seed = num_windows, num_samples, seed

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        for start in range(0, self.num_samples, self.num_windows):
            epoch = start // self.num_windows
            order = np.random.default_rng([self.seed, epoch]).permutation(self.num_windows)
            yield from map(int, order[: self.num_samples - start])
