"""Token ids cut into windows of one length, the items of a run. T: positions of a window."""

import numpy as np
import torch
from torch.utils.data import Dataset

from .corpus import DataError

IGNORED_LABEL = -100  # what cross-entropy leaves out


class TokenWindows(Dataset[dict[str, torch.Tensor]]):
    """Consecutive windows of `length` tokens, without overlap, from one array of token ids (or a memory map).

    Item i is `{"input_ids": int64 [T], "labels": int64 [T]}`, T = `length`. Labels equal input ids: the
    model shifts them itself, so a window gives T - 1 predictions and its first token is context only.

    With `drop_last=True`, for training, tokens after the last full window are left out. With
    `drop_last=False`, for validation, they make a last window, padded with id 0 and label -100, and every
    item also has `"attention_mask": int64 [T]`, 0 on the padding. A single token left over is dropped: it
    predicts nothing.

    Raises `DataError` if `token_ids` is not one dimension of integers, `length` is below 2, or there are
    not enough tokens for one window.
    """

    def __init__(self, token_ids: np.ndarray, length: int, drop_last: bool = True) -> None:
        if token_ids.ndim != 1 or not np.issubdtype(token_ids.dtype, np.integer):
            raise DataError(
                f"token_ids has shape {token_ids.shape} and type {token_ids.dtype}. Expected one dimension "
                "of integers; pass what encode_documents gives."
            )
        if length < 2:
            raise DataError(f"length is {length} tokens. Expected 2 or more, to read and to predict.")
        num_needed = length if drop_last else 2
        if len(token_ids) < num_needed:
            raise DataError(
                f"The text has {len(token_ids)} tokens, and one window needs {num_needed}. "
                + ("Give more text, or choose a shorter length." if drop_last else "Give more text.")
            )
        self.token_ids = token_ids
        self.length = length
        self.drop_last = drop_last

    def __len__(self) -> int:
        num_full, num_left = divmod(len(self.token_ids), self.length)
        return num_full + (not self.drop_last and num_left > 1)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"There is no window {index}: there are {len(self)}, counted from 0.")
        window = self.token_ids[index * self.length : (index + 1) * self.length]
        ids_T = torch.from_numpy(window.astype(np.int64))
        if self.drop_last:
            return {"input_ids": ids_T, "labels": ids_T.clone()}
        padding = (0, self.length - len(ids_T))
        return {
            "input_ids": torch.nn.functional.pad(ids_T, padding),
            "labels": torch.nn.functional.pad(ids_T, padding, value=IGNORED_LABEL),
            "attention_mask": torch.nn.functional.pad(torch.ones_like(ids_T), padding),
        }
