"""Decoding: whatever the steps, with a cache they give what one pass over all gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from midskip import MidskipForCausalLM
from midskip.model import attention
from midskip.model.cache import SkipCache
from midskip.model.layers import compile_blocks
from midskip.testing import reference_forward

Make = Callable[..., MidskipForCausalLM]
FIXED = "midskip.policies.controls:FixedDepths"
T = 14

MODELS: dict[str, dict[str, Any]] = {
    **{f"middle_out-{gates}": {"gates": gates} for gates in ("mixed", "open", "late", "gone", "kept")},
    "middle_out-5-layers": {"gates": "mixed", "num_hidden_layers": 5},
    "middle_out-1-layer": {"gates": "mixed", "num_hidden_layers": 1},
    "middle_out-pre-norm": {"gates": "mixed", "norms": "pre"},
    "middle_out-one-key-head": {"gates": "mixed", "num_key_value_heads": 1},
    "middle_out-as-many-key-heads": {"gates": "mixed", "num_key_value_heads": 4},
    "dense": {"policy": "dense"},
    "fixed": {"policy": FIXED, "policy_settings": {"skip_share": 0.5}},
    "fixed-fractional": {"policy": FIXED, "policy_settings": {"skip_share": 0.5, "fractional": True}},
}
THOROUGH = ("middle_out-mixed", "fixed-fractional")  # these with every padding
MASKS = {
    "none": None,
    "left": [[1] * T, [0] * 3 + [1] * (T - 3), [0] * 9 + [1] * (T - 9)],
    "holes": [[1] * T, [0, 0, 1, 1, 0, 0, 1, 1, 1, 1, 0, 1, 1, 1], [0] * 6 + [1, 0] * 4, [0] * T],
    "right": [[1] * 3 + [0] * (T - 3), [1] * T, [1] * 9 + [0] * (T - 9)],
    "nobody-at-first": [[0] * 4 + [1] * (T - 4), [0] * 5 + [1] * (T - 5)],
}
CHUNKS = {"token-by-token": [1] * T, "sevens": [7, 7], "mixed": [5, 1, 1, 3, 4]}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def text(padding: str) -> tuple[Tensor, Tensor | None]:
    rows = MASKS[padding]
    mask_BT = None if rows is None else torch.tensor(rows)
    return torch.randint(31, (3 if mask_BT is None else len(mask_BT), T)), mask_BT


def by_column(output: Any) -> dict[str, Tensor]:
    """What a pass gives, all as [..., T, X]."""
    results = {"logits": output.logits, "gates": output.gates.unsqueeze(-1)}
    if output.depth_scores is not None:
        results["depth scores"] = output.depth_scores.clamp(max=1).unsqueeze(-1)
    if output.hidden_states is not None:
        results["hidden states"] = torch.stack(tuple(output.hidden_states))
    return results


def in_chunks(
    model: MidskipForCausalLM, ids_BT: Tensor, mask_BT: Tensor | None, chunks: list[int], hidden: bool = False
) -> tuple[dict[str, Tensor], SkipCache]:
    """The results of all columns, and the cache in the end."""
    cache, start, parts = SkipCache(model.config), 0, []
    for stop in accumulate(chunks):
        seen = None if mask_BT is None else mask_BT[:, :stop]
        ids = ids_BT[:, start:stop]
        output = model(ids, attention_mask=seen, past_key_values=cache, output_hidden_states=hidden)
        assert output.past_key_values is cache
        parts.append(by_column(output))
        start = stop
    assert start == ids_BT.shape[1]
    return {name: torch.cat([part[name] for part in parts], -2) for name in parts[0]}, cache


def close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert expected.keys() - got.keys() <= {"hidden states"}
    for name, tensor in got.items():
        other = expected[name].to(tensor.dtype)
        bound = tolerance * max(1.0, other.abs().max().item())
        torch.testing.assert_close(tensor, other, rtol=0, atol=bound, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    "kind, padding",
    [(kind, padding) for kind in MODELS for padding in MASKS if kind in THOROUGH or padding == "holes"],
)
@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
def test_steps_give_what_one_pass_gives(make_model: Make, kind: str, skipped_kv: str, padding: str) -> None:
    model = make_model(**MODELS[kind], skipped_kv=skipped_kv).eval()
    ids_BT, mask_BT = text(padding)
    full = by_column(model(ids_BT, attention_mask=mask_BT, output_hidden_states=True))
    close(by_column(reference_forward(model, ids_BT, mask_BT)), full, 1e-7 if kind.startswith("fixed") else 1e-12)
    ran_LBT = full["gates"].squeeze(-1) > 0
    for number, chunks in enumerate(CHUNKS.values()):
        got, cache = in_chunks(model, ids_BT, mask_BT, chunks, hidden=number % 2 == 1)
        close(got, full, 1e-12)
        valid_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
        held_LB = ran_LBT.sum(2) if skipped_kv == "drop" else valid_BT.sum(1).expand(len(ran_LBT), -1)
        assert [layer.seqlens or [0] * len(ids_BT) for layer in cache.layers] == held_LB.tolist()
        assert cache.num_block_tokens == int(ran_LBT.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
@pytest.mark.parametrize("kind", ["middle_out-open", "fixed"])
def test_steps_in_lower_precision(make_model: Make, kind: str, skipped_kv: str, dtype: torch.dtype) -> None:
    """Models whose gates are on no edge, where rounding would tip them. Steps round no worse than one pass does."""
    model = make_model(**MODELS[kind], skipped_kv=skipped_kv, dtype=dtype).eval()
    exact = make_model(**MODELS[kind], skipped_kv=skipped_kv).eval()
    exact.load_state_dict({name: x.double() for name, x in model.state_dict().items()})
    ids_BT, mask_BT = text("left")
    reference = exact(ids_BT, attention_mask=mask_BT).logits
    full = model(ids_BT, attention_mask=mask_BT).logits.double()
    scale, eps = reference.abs().max(), torch.finfo(dtype).eps
    for chunks in CHUNKS.values():
        got, _ = in_chunks(model, ids_BT, mask_BT, chunks)
        error = (got["logits"].double() - reference).abs()
        assert error.max() <= 16 * eps * scale  # a few roundings in each of four layers
        assert error.square().mean().sqrt() <= 1.5 * (full - reference).square().mean().sqrt()


@pytest.mark.parametrize("padding", ["holes", "right"])
@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
@pytest.mark.parametrize("kind", THOROUGH)
def test_a_batch_is_its_members_alone(make_model: Make, kind: str, skipped_kv: str, padding: str) -> None:
    model = make_model(**MODELS[kind], skipped_kv=skipped_kv).eval()
    ids_BT, mask_BT = text(padding)
    assert mask_BT is not None
    for chunks in ([1] * T, [7, 7]):
        together, _ = in_chunks(model, ids_BT, mask_BT, chunks)
        for row, valid_T in enumerate(mask_BT.bool()):
            if valid_T.any():
                alone_ids = ids_BT[row : row + 1, valid_T]
                alone, _ = in_chunks(model, alone_ids, None, [1] * alone_ids.shape[1])
                member = together["logits"][row : row + 1, valid_T]
                torch.testing.assert_close(member, alone["logits"], rtol=0, atol=1e-12)
                assert torch.equal(together["gates"][:, row, valid_T] > 0, alone["gates"][:, 0] > 0)


@pytest.mark.parametrize("padding", ["none", "holes", "nobody-at-first"])
@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
@pytest.mark.parametrize("kind", THOROUGH)
def test_one_launch_for_all_gives_what_a_call_for_each_gives(
    make_model: Make, monkeypatch: pytest.MonkeyPatch, kind: str, skipped_kv: str, padding: str
) -> None:
    """A GPU takes the first, a CPU the second."""
    model = make_model(**MODELS[kind], skipped_kv=skipped_kv).eval()
    ids_BT, mask_BT = text(padding)
    asked: list[torch.device] = []

    def alone_is_cheaper(device: torch.device) -> bool:
        asked.append(device)
        return False

    for chunks in ([1] * T, [5, 9]):
        each, _ = in_chunks(model, ids_BT, mask_BT, chunks)
        with monkeypatch.context() as patch:
            patch.setattr(attention, "_alone_is_cheaper", alone_is_cheaper)
            together, _ = in_chunks(model, ids_BT, mask_BT, chunks)
        close(together, each, 1e-12)
    assert asked or (kind.startswith("fixed") and padding == "none")  # where all rows keep the same columns


@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
@pytest.mark.parametrize("gates", ["mixed", "gone", "late"])
def test_blocks_get_only_the_rows_present(make_model: Make, gates: str, skipped_kv: str) -> None:
    model = make_model(gates, skipped_kv=skipped_kv).eval()
    ids_BT, mask_BT = text("left")
    assert mask_BT is not None
    calls: list[list[int]] = [[] for _ in model.model.layers]

    def count(rows: list[int]) -> Callable:
        return lambda _, arguments: rows.append(len(arguments[0]))

    for rows, block in zip(calls, model.model.layers, strict=True):
        block.register_forward_pre_hook(count(rows))
    cache, untouched = SkipCache(model.config), 0
    for t in range(T):
        for rows in calls:
            rows.clear()
        output = model(ids_BT[:, t : t + 1], attention_mask=mask_BT[:, : t + 1], past_key_values=cache)
        for rows, gate_B1 in zip(calls, output.gates, strict=True):
            present = int((gate_B1 > 0).sum())
            untouched += rows == []
            assert rows == ([present] if present or skipped_kv == "keep" else [])
    assert (untouched > 0) == (skipped_kv == "drop")


@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
def test_positions_that_are_given(make_model: Make, skipped_kv: str) -> None:
    """With gaps; by default they go on where the cache stopped."""
    model = make_model("mixed", skipped_kv=skipped_kv).eval()
    ids_BT = torch.randint(31, (2, T))
    gaps_BT = torch.stack([torch.arange(T) * 3 + 1, torch.arange(T) + torch.arange(T) // 4 * 7])
    expected = model(ids_BT, position_ids=gaps_BT).logits
    cache = SkipCache(model.config)
    for t in range(T):
        logits = model(ids_BT[:, t : t + 1], position_ids=gaps_BT[:, t : t + 1], past_key_values=cache).logits
        torch.testing.assert_close(logits[:, 0], expected[:, t], rtol=0, atol=1e-12)
    more_BT = torch.randint(31, (2, 3))
    went_on_BT = torch.cat([gaps_BT, gaps_BT[:, -1:] + torch.arange(1, 4)], 1)
    expected = model(torch.cat([ids_BT, more_BT], 1), position_ids=went_on_BT).logits[:, -3:]
    torch.testing.assert_close(model(more_BT, past_key_values=cache).logits, expected, rtol=0, atol=1e-12)


def test_the_whole_length_of_the_model(make_model: Make) -> None:
    """Far past the first memory of a layer, which has to grow."""
    model = make_model("mixed").eval()
    ids_BT = torch.randint(31, (2, 64))
    mask_BT = torch.ones(2, 64, dtype=torch.long)
    mask_BT[1, :21] = 0
    full = by_column(model(ids_BT, attention_mask=mask_BT, output_hidden_states=True))
    got, _ = in_chunks(model, ids_BT, mask_BT, [1] * 64)
    close(got, full, 1e-12)


@pytest.mark.parametrize("limits", [(0.0, None), (3.0, None), (0.5, 2)])
def test_steps_under_a_budget(make_model: Make, limits: tuple[float, int | None]) -> None:
    model = make_model("mixed").eval()
    model.model.policy.set_limits(*limits)
    ids_BT, mask_BT = text("left")
    full = by_column(model(ids_BT, attention_mask=mask_BT, output_hidden_states=True))
    got, _ = in_chunks(model, ids_BT, mask_BT, [1] * T)
    close(got, full, 1e-12)


@pytest.mark.integration
def test_compiled_blocks(make_model: Make) -> None:
    model = make_model("mixed").eval()
    ids_BT, _ = text("none")
    expected = model(ids_BT).logits
    compile_blocks(model.model.layers, backend="eager")
    got, _ = in_chunks(model, ids_BT, None, [6, 8])
    torch.testing.assert_close(got["logits"], expected, rtol=0, atol=1e-12)


def test_embeddings_in_place_of_ids(make_model: Make) -> None:
    model = make_model("mixed", norms="pre").eval()
    ids_BT, _ = text("none")
    embedded_BTD = model.model.embed_tokens(ids_BT)
    before_BTD, cache = embedded_BTD.clone(), SkipCache(model.config)
    parts = [
        model(inputs_embeds=embedded_BTD[:, columns], past_key_values=cache).logits
        for columns in (slice(0, 6), slice(6, 7), slice(7, T))
    ]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids_BT).logits, rtol=0, atol=1e-12)
    assert torch.equal(embedded_BTD, before_BTD)  # they are the caller's
