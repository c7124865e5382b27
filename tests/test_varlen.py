"""Attention in one launch for sequences of any length, as a GPU runs it in half precision: held, in float64 and with a
stand-in for torch's kernel, to a call for each sequence."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_documents import POLICIES, POSITIONS
from test_exactness import gradients, outputs, same
from torch import Tensor

from midskip import MidskipForCausalLM
from midskip.model import attention
from midskip.model.packing import PackedBatch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The kernel as torch describes it, in place of the one that runs on a GPU; fills with lengths."""
    seen = []

    def kernel(
        q: Tensor, k: Tensor, v: Tensor, ends: Tensor, ends_k: Tensor, longest: int, longest_k: int, *, scale: float,
        window_size: tuple[int, int],
    ) -> Tensor:  # fmt: skip
        assert q.shape == k.shape == v.shape and q.shape[-1] % 8 == 0 and window_size == (-1, 0)
        assert ends is ends_k and ends.dtype == torch.int32 and ends[0] == 0 and ends[-1] == len(q)
        seqlens = ends.diff().tolist()
        assert longest == longest_k == max(seqlens)
        seen.append(seqlens)
        sequences = zip(*(x.transpose(0, 1).split(seqlens, 1) for x in (q, k, v)), strict=True)
        outs = [F.scaled_dot_product_attention(*heads, is_causal=True, scale=scale) for heads in sequences]
        return torch.cat(outs, 1).transpose(0, 1)

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    return seen


@pytest.mark.parametrize("kind", ["ragged", "documents"])
@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
@pytest.mark.parametrize("policy", POLICIES)
def test_one_launch_computes_what_a_call_for_each_sequence_does(
    make_model: Callable[..., MidskipForCausalLM], ragged: tuple[Tensor, Tensor], launches: list[list[int]],
    monkeypatch: pytest.MonkeyPatch, policy: str, skipped_kv: str, kind: str,
) -> None:  # fmt: skip
    batch: dict[str, Any] = {"input_ids": ragged[0], "attention_mask": ragged[1]}
    if kind == "documents":
        position_BT = torch.tensor([[-5 if p is None else p for p in row] for row in POSITIONS])
        mask_BT = torch.tensor([[p is not None and p not in (-1, 99) for p in row] for row in POSITIONS]).long()
        ids_BT = torch.randint(31, position_BT.shape)
        batch = {"input_ids": ids_BT, "attention_mask": mask_BT, "position_ids": position_BT}
    model = make_model(**POLICIES[policy], skipped_kv=skipped_kv, num_key_value_heads=2)
    each, alone, found = attention._attend_each, [], []
    monkeypatch.setattr(attention, "_attend_each", lambda *given: alone.append(1) or each(*given))
    for way in ("each", "padded", "in one"):
        monkeypatch.setattr(attention, "_has_varlen", lambda x, way=way: way == "in one")
        monkeypatch.setattr(attention, "_alone_is_cheaper", lambda device, way=way: way == "each")
        output = outputs(model(**batch, labels=batch["input_ids"], output_hidden_states=True))
        found.append(output | {name: x for name, x in gradients(model, output).items() if x is not None})
        assert bool(launches) is (way == "in one") and bool(alone) is (way == "each")
        alone.clear()
    if kind == "ragged":  # a cache takes no documents
        with torch.no_grad():
            into_cache = model.eval()(**batch, labels=batch["input_ids"], output_hidden_states=True, use_cache=True)
        found.append({name: x for name, x in outputs(into_cache).items() if name != "depth_scores"})
    for got in found[1:]:
        for name, tensor in got.items():
            if name in found[0]:
                same(tensor, found[0][name], name)


@pytest.mark.parametrize(("seqlens", "mostly"), [([100] + [1] * 9, True), ([100] + [50] * 9, False), ([7], False)])
def test_what_would_be_mostly_pads_is_not_padded(seqlens: list[int], mostly: bool) -> None:
    places = torch.arange(sum(seqlens))
    batch = PackedBatch(len(seqlens), max(seqlens), places, places, seqlens)
    assert attention._is_mostly_pads(batch) is mostly
