"""SkipCache: what transformers' `generate()` sees of the keys and values that were computed.

B sequences, T new columns, C columns seen, N new tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from transformers import Cache

from midskip.model.config import MidskipConfig
from midskip.model.layer_cache import ROUND, SPARE, LayerCache, writable
from midskip.model.packing import PackedBatch

IN_GENERATE = "in generate(), give the whole text so far, or an attention_mask over the cached columns too"


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of a cache.

    Attributes:
        used: of what is held of tokens: their keys, values, columns and gates.
        allocated: of all memory taken: the used part, slots that are free, and position and token of each column seen.
    """

    used: int
    allocated: int


class SkipCache(Cache):
    """Keys and values, in each layer of the tokens that ran it and of no others.

    `model(..., use_cache=True)` and `generate()` make one; one made by hand is given as `past_key_values`. With
    `skipped_kv="keep"` each layer holds all tokens, since each makes keys and values everywhere. A row of the batch is
    one sequence; pads count as columns seen and are not held.

    Args:
        config: of the model that it is for.

    Attributes:
        layers: a `LayerCache` for each layer, with `seqlens`, `columns` and `keys` of what it holds.
        num_columns: columns seen, pads included; `get_seq_length()` is the same.
        seqlens: tokens of each row among them, pads not counted, on the host; empty while nothing came.
        num_valid_tokens: tokens among them that were no pads, of all passes; never made less.
        num_block_tokens: tokens that ran, summed over the layers and all passes; never made less.
    """

    layers: list[LayerCache]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: MidskipConfig):
        super().__init__(layers=[LayerCache() for _ in range(config.num_hidden_layers)])  # pyright: ignore[reportArgumentType]
        self.config = config
        self.reset()

    def reset(self) -> None:
        """Forget everything, batch size and model too."""
        self._empty()
        self.num_valid_tokens = self.num_block_tokens = 0

    def _empty(self) -> None:
        for layer in self.layers:
            layer.reset()
        self.num_columns = 0
        self.seqlens: list[int] = []
        # int32 [B, C, 2], position (-1: a pad) and token (-1: unknown) of each column seen; some spare
        self._seen_BC2: Tensor | None = None
        self._model: ReferenceType[nn.Module] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the model, so that it can be sent to another process, and a copy serves a copy of the model."""
        return self.__dict__ | {"_model": None}

    def __repr__(self) -> str:
        held = "all tokens" if self.config.skipped_kv == "keep" else "the tokens that ran"
        size = self.num_bytes()
        return (
            f"SkipCache(of {held}: {self.batch_size} sequences, {self.num_columns} columns seen, tokens held by layer "
            f"{[layer.num_tokens for layer in self.layers]}, {size.used} bytes used, {size.allocated} allocated)"
        )

    @property
    def batch_size(self) -> int:
        """Sequences; 0 while nothing came."""
        return 0 if self._seen_BC2 is None else self._seen_BC2.shape[0]

    @property
    def executed_share(self) -> float:
        """Share of block-tokens that ran, of the valid tokens of all passes times layers."""
        return self.num_block_tokens / max(1, self.num_valid_tokens * self.config.num_skip_units)

    def num_bytes(self) -> CacheBytes:
        """What it takes, used and allocated."""
        used = sum(layer.num_tokens * layer.token_bytes for layer in self.layers)
        columns = 0 if self._seen_BC2 is None else self._seen_BC2.nbytes
        return CacheBytes(used, columns + sum(layer.allocated_bytes for layer in self.layers))

    def admit(
        self, model: nn.Module, shape: tuple[int, int], attention_mask: Tensor | None, position_ids: Tensor | None,
        device: torch.device, input_ids: Tensor | None = None,
    ) -> PackedBatch:  # fmt: skip
        """Note the next columns, and give their tokens, packed.

        Args:
            model: whose pass it is.
            shape: B and T.
            attention_mask: bool or int [B, C + T], of the columns seen and the new ones.
            position_ids: int64 [B or 1, T].
            input_ids: int64 [B, T], if they are known.

        Raises:
            ValueError: a cache of another model or batch size, a mask that does not fit what was seen, positions that
                do not rise.
        """
        self._check_whose(model, shape[0])
        (batch_size, num_new), past = shape, self.num_columns
        if attention_mask is not None and attention_mask.shape != (batch_size, past + num_new):
            why = f": it covers the {past} columns in the cache and the {num_new} new ones" if past else ""
            raise ValueError(
                f"attention_mask has the shape {list(attention_mask.shape)}; "
                f"expected {[batch_size, past + num_new]}{why}"
            )
        if self._seen_BC2 is None:
            seen_BC, known_BC = torch.full((2, batch_size, 0), -1, dtype=torch.int32, device=device)
        else:
            seen_BC, known_BC = self._seen_BC2[:, :past].unbind(-1)
        valid_BC = seen_BC >= 0
        marks_BC = torch.cat([valid_BC, valid_BC.new_ones(shape)], 1)
        if attention_mask is not None:
            marks_BC = attention_mask.to(torch.bool)
        valid_BT = marks_BC[:, past:]
        last_B1, place_B1 = torch.nn.functional.pad(seen_BC, (1, 0), value=-1).max(1, keepdim=True)
        last_B1 = last_B1.long()
        past_token_B = torch.nn.functional.pad(known_BC, (1, 0), value=-1).gather(1, place_B1)
        past_token_B = torch.where(last_B1 < 0, -1, past_token_B).squeeze(1).long()
        position_BT = last_B1 + valid_BT.cumsum(1) if position_ids is None else position_ids.expand(shape)
        position_BT = torch.where(valid_BT, position_BT, -1)
        before_BT = torch.cat([last_B1, position_BT], 1).cummax(1).values[:, :-1]
        # what the host has to know, brought there once
        facts = [
            (marks_BC[:, :past] != valid_BC).any(), (valid_BT & (position_BT <= before_BT)).any(), position_BT.max(),
        ]  # fmt: skip
        differs, late, highest, *seqlens = torch.cat([torch.stack([f.long() for f in facts]), valid_BT.sum(1)]).tolist()
        if differs:
            raise ValueError(
                "attention_mask marks other columns as pads than it did when they were cached: give the same marks for "
                "them, or start with a new cache"
            )
        if late:
            raise ValueError(
                "position_ids do not rise within a row, or do not go on above those in the cache: with a cache a row "
                f"is one sequence; {IN_GENERATE}"
            )
        if highest >= self.config.max_position_embeddings:
            raise ValueError(
                f"position_ids reach to {highest}; this model takes 0 to {self.config.max_position_embeddings - 1}"
            )
        self._model = ref(model)
        token_BT = torch.full_like(position_BT, -1) if input_ids is None else input_ids
        self._note(torch.stack([position_BT, token_BT], -1))
        past_seqlens = self.seqlens or [0] * batch_size
        self.seqlens = [held + more for held, more in zip(past_seqlens, seqlens, strict=True)]
        if sum(seqlens) == valid_BT.numel():
            column_N = torch.arange(valid_BT.numel(), device=device)
        else:
            column_N = torch.nonzero_static(valid_BT.flatten(), size=sum(seqlens)).squeeze(1)
        position_N = position_BT.flatten().index_select(0, column_N)
        return PackedBatch(
            batch_size, num_new, column_N, position_N, seqlens, first_column=past, past_seqlens=past_seqlens,
            past_token_B=past_token_B,
        )  # fmt: skip

    def _check_whose(self, model: nn.Module, batch_size: int) -> None:
        config: Any = model.config
        if (mine := _shape_of(self.config)) != (others := _shape_of(config)):
            raise ValueError(
                f"the cache was made for a model with {mine}; this one has {others}: use SkipCache(model.config)"
            )
        if self._model is not None and self._model() is not model:
            raise ValueError("the cache holds keys and values of another model: give each model a cache of its own")
        if self.batch_size not in (0, batch_size):
            raise ValueError(
                f"the cache holds {self.batch_size} sequences and {batch_size} are given: give as many, or fit the "
                "cache by batch_repeat_interleave or batch_select_indices"
            )

    def _note(self, new_BT2: Tensor) -> None:
        if self._seen_BC2 is None:
            self._seen_BC2 = new_BT2.new_empty(new_BT2.shape[0], 0, 2, dtype=torch.int32)
        self._seen_BC2 = writable([self._seen_BC2])[0]
        end = self.num_columns + new_BT2.shape[1]
        if end > self._seen_BC2.shape[1]:
            more = end * (SPARE + 1) // SPARE + ROUND - self._seen_BC2.shape[1]
            self._seen_BC2 = torch.nn.functional.pad(self._seen_BC2, (0, 0, 0, more), value=-1)
        self._seen_BC2[:, self.num_columns : end] = new_BT2
        self.num_columns = end

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, pads included; the same for all layers, whatever they hold."""
        return self.num_columns

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Columns that a mask for so many new ones covers, and where it starts."""
        return self.num_columns + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: it grows."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` columns; 0 and below, as generate() gives it.

        Raises:
            ValueError: a number above 0, or more columns than were seen.
        """
        column = self.num_columns + tokens_to_remove
        if tokens_to_remove > 0 or column < 0:
            raise ValueError(
                f"crop({tokens_to_remove}) of a cache of {self.num_columns} columns; expected 0 or less: minus the "
                "number of columns to forget"
            )
        if not column:  # nothing is left, so it may take any batch again
            self._empty()
        if not tokens_to_remove or self._seen_BC2 is None:
            return
        self.num_columns = column
        filled = [layer for layer in self.layers if layer.buffers]  # of an interrupted pass too
        counts = [(self._seen_BC2[:, :column, 0] >= 0).sum(1), *(layer.seqlens_before(column) for layer in filled)]
        self.seqlens, *seqlens = torch.stack(counts).tolist()
        for layer, layer_seqlens in zip(filled, seqlens, strict=True):
            layer.crop(column, layer_seqlens)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row r what row `beam_idx[r]` was, as beam search asks."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have every row so many times, one after the other."""
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of these indices (or bool [B]), in their order.

        Raises:
            ValueError: no row at all.
        """
        if self._seen_BC2 is None:
            return
        if indices.dtype == torch.bool:
            indices = indices.nonzero().squeeze(1)
        if not indices.numel():
            raise ValueError("no row of the cache is selected: give at least one, or call reset() to empty it")
        row_R, rows = indices.to(self._seen_BC2.device), indices.tolist()
        self._seen_BC2 = self._seen_BC2.index_select(0, row_R)
        self.seqlens = [self.seqlens[row] for row in rows]
        for layer in self.layers:
            layer.select(row_R, rows)

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the model fills the cache itself, with the tokens that ran."""
        raise TypeError("a SkipCache is filled by its model; keys and values of all tokens cannot be added to it")

    def activate_past_recording(self) -> None:
        """Nothing to do: `crop` can always take columns back."""

    is_compileable = False  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]
    is_croppable = True  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    @property
    def is_initialized(self) -> bool:
        return self._seen_BC2 is not None


@contextmanager
def unchanged_if_broken_off(cache: Any) -> Iterator[None]:
    """Take back what a pass has added to a cache, if it ends in an error or an interrupt."""
    if not isinstance(cache, SkipCache):
        yield
        return
    num_columns, counts = cache.num_columns, (cache.num_valid_tokens, cache.num_block_tokens)
    try:
        yield
    except BaseException:
        cache.crop(num_columns - cache.num_columns)
        cache.num_valid_tokens, cache.num_block_tokens = counts
        raise


def _shape_of(config: MidskipConfig) -> str:
    heads = f"{config.num_key_value_heads} key heads of width {config.head_dim}"
    return f"{config.num_hidden_layers} layers, {heads}, skipped_kv={config.skipped_kv!r}"
