"""The memory of a cache: what a layer's buffers hold, how they grow, and what is in slots that are free."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from midskip import MidskipForCausalLM
from midskip.model import attention
from midskip.model.cache import SkipCache
from midskip.model.layer_cache import NO_COLUMN, LayerCache
from midskip.model.packing import PackedBatch

Make = Callable[..., MidskipForCausalLM]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def memory_of_nan() -> Iterator[None]:
    """New memory is filled with NaN and not with what happens to be there."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def prompt(*shape: int) -> Tensor:
    return torch.randint(31, shape)


class Lists:
    """A `LayerCache` as it would be without buffers: for each row a list of (column, key, value, gate)."""

    def __init__(self, batch_size: int) -> None:
        self.rows: list[list[tuple[int, float, float, float]]] = [[] for _ in range(batch_size)]

    def check(self, layer: LayerCache) -> None:
        assert layer.num_tokens == sum(map(len, self.rows))
        if not layer.seqlens:
            return
        assert layer.seqlens == [len(row) for row in self.rows]
        for b, row in enumerate(self.rows):
            assert layer.columns[b].tolist() == [x[0] for x in row] + [NO_COLUMN] * (layer.columns.shape[1] - len(row))
            assert layer.keys[b, : len(row), 0, 0].tolist() == [x[1] for x in row]
            assert layer.values[b, : len(row), 1, 2].tolist() == [x[2] for x in row]
            gates = torch.ones(len(row)) if layer.log_gates is None else layer.log_gates[b, : len(row)].exp()
            torch.testing.assert_close(gates, torch.tensor([x[3] for x in row]))
        for buffer in layer.buffers[:2]:
            assert buffer.transpose(1, 2).is_contiguous(), "as attention reads them, whatever happened"
        for buffer in layer.buffers:
            assert buffer.isfinite().all()  # free slots too: they are multiplied by 0


@pytest.mark.parametrize("seed", range(6))
def test_a_layer_holds_what_lists_would(seed: int, memory_of_nan: None) -> None:
    draw, size = random.Random(seed), 3
    layer, lists, column = LayerCache(), Lists(size), 0
    for _ in range(60):
        action = draw.random()
        if action < 0.8:
            width, gated, share = draw.choice([1, 1, 1, 4, 20]), draw.random() < 0.5, draw.choice([0.4, 1.0])
            new = PackedBatch.from_rectangle(
                torch.tensor([[draw.random() < share for _ in range(width)] for _ in lists.rows])
            )
            new.first_column = column
            k_MGK, v_MGK = torch.randn(new.num_tokens, 2, 3), torch.randn(new.num_tokens, 2, 3)
            gate_M = torch.rand(new.num_tokens) * 0.9 + 0.1
            layer.append(k_MGK, v_MGK, gate_M if gated else None, new)
            for m, place in enumerate(new.column_N.tolist()):
                gate = gate_M[m].item() if gated else 1.0
                token = column + place % width, k_MGK[m, 0, 0].item(), v_MGK[m, 1, 2].item(), gate
                lists.rows[place // width].append(token)
            column += width
        elif action < 0.9 and layer.seqlens:
            column = max(0, column - draw.choice([0, 1, 5]))
            layer.crop(column, layer.seqlens_before(column).tolist())
            lists.rows = [[token for token in row if token[0] < column] for row in lists.rows]
        elif layer.seqlens:
            rows = [draw.randrange(len(lists.rows)) for _ in range(draw.choice([2, 3, 4]))]
            layer.select(torch.tensor(rows), rows)
            lists.rows = [list(lists.rows[row]) for row in rows]
        lists.check(layer)
    assert layer.num_tokens > 100
    layer.reset()
    assert (layer.num_tokens, layer.allocated_bytes, layer.seqlens) == (0, 0, [])


def test_memory_grows_a_few_times_and_not_with_each_token(make_model: Make) -> None:
    model = make_model(num_hidden_layers=1, max_position_embeddings=512, policy="dense").eval()
    cache, places = SkipCache(model.config), []
    for _ in range(500):
        model.model(prompt(2, 1), past_key_values=cache)
        assert cache._seen_BC2 is not None
        places.append((cache.layers[0].keys.data_ptr(), cache._seen_BC2.data_ptr()))
        slots = 2 * (cache.num_columns * 9 / 8 + 16)  # of two sequences
        assert cache.num_bytes().allocated <= slots * (cache.layers[0].token_bytes + 8)
    for pointers in zip(*places, strict=True):
        moves = sum(a != b for a, b in pairwise(pointers))
        assert 0 < moves <= 20


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
def test_free_memory_is_zeroed_before_it_is_read(
    make_model: Make, monkeypatch: pytest.MonkeyPatch, skipped_kv: str, alone: bool, memory_of_nan: None
) -> None:
    """Attention over several rows multiplies free slots by 0, which makes NaN of NaN."""
    monkeypatch.setattr(attention, "_alone_is_cheaper", lambda device: alone)
    model = make_model("mixed", skipped_kv=skipped_kv).eval()
    ids_BT, mask_BT = prompt(3, 20), torch.ones(3, 20, dtype=torch.long)
    mask_BT[1, :7] = mask_BT[2, 2:15] = 0  # all ask in the last columns, and hold numbers that differ
    expected = model(ids_BT, attention_mask=mask_BT).logits
    cache = SkipCache(model.config)
    for t in range(20):
        logits = model(ids_BT[:, t : t + 1], attention_mask=mask_BT[:, : t + 1], past_key_values=cache).logits
        torch.testing.assert_close(logits[:, 0], expected[:, t], rtol=0, atol=1e-12)
