"""The packed pass is the plain masked one: loss, outputs and every gradient, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from midskip import MidskipForCausalLM
from midskip.testing import reference_forward

GATES = ("kept", "open", "mixed", "one", "late", "gone")
FIXED = "midskip.policies.controls:FixedDepths"
OUTER = ("layers.0.self_attn.v_proj", "layers.0.mlp.up_proj", "embed_tokens", "model.norm", "lm_head")


def same(got: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(
        got, expected, rtol=1e-10, atol=1e-10, check_dtype=False, msg=lambda text: f"{what}: {text}"
    )


def outputs(result: Any) -> dict[str, Tensor]:
    hidden = result.hidden_states
    found = {
        "loss": result.loss,
        "logits": result.logits,
        "gates": result.gates,
        "hidden_states": hidden if isinstance(hidden, Tensor) else torch.stack(hidden),
    }
    if result.depth_scores is not None:
        found["depth_scores"] = result.depth_scores.clamp(max=1)
    return found


def gradients(model: MidskipForCausalLM, found: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """Of a sum that weighs each number of the loss, the logits, the gates and the hidden states differently."""
    model.zero_grad()
    draw = torch.Generator().manual_seed(1)
    parts = [
        (found[name] * torch.randn(found[name].shape, generator=draw, dtype=torch.float64)).mean()
        for name in ("logits", "gates", "hidden_states")
    ]
    (found["loss"] + sum(parts)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def check_equal(
    model: MidskipForCausalLM, ids_BT: Tensor, mask_BT: Tensor, position_BT: Tensor | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Packed in training = reference, with gradients; packed in evaluation = reference."""
    labels_BT = torch.where(torch.arange(ids_BT.shape[1]) % 4 == 2, -100, ids_BT)
    reference = outputs(reference_forward(model, ids_BT, mask_BT, labels_BT, position_BT))
    reference_gradients = gradients(model, reference)
    model.train()
    given = {"attention_mask": mask_BT, "position_ids": position_BT, "labels": labels_BT}
    packed = outputs(model(ids_BT, **given, output_hidden_states=True))
    packed_gradients = gradients(model, packed)
    assert packed.keys() == reference.keys()
    for name in packed:
        same(packed[name], reference[name], name)
    found = {}
    for name, got in packed_gradients.items():
        assert got is not None, f"{name} has no gradient"
        expected = reference_gradients[name]
        same(got, torch.zeros_like(got) if expected is None else expected, f"gradient of {name}")
        found[name] = got
    model.eval()
    with torch.no_grad():
        quick = model(ids_BT, **given)
    for name in ("loss", "logits", "gates"):
        same(getattr(quick, name), reference[name].detach(), f"{name} in evaluation")
    return packed, found


def norm(found: dict[str, Tensor], *parts: str) -> float:
    """Of all gradients whose name has one of these parts."""
    chosen = [x for name, x in found.items() if any(part in name for part in parts)]
    assert chosen
    return sum(x.square().sum().item() for x in chosen) ** 0.5


@pytest.mark.parametrize(("num_layers", "norms"), [(1, "sandwich"), (5, "pre"), (6, "sandwich")])
@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
@pytest.mark.parametrize("gates", GATES)
def test_middle_out_equals_the_reference(
    make_model: Callable[..., MidskipForCausalLM], ragged: tuple[Tensor, Tensor],
    gates: str, skipped_kv: str, num_layers: int, norms: str,
) -> None:  # fmt: skip
    model = make_model(gates, num_hidden_layers=num_layers, skipped_kv=skipped_kv, norms=norms)
    ids_BT, mask_BT = ragged
    packed, found = check_equal(model, ids_BT, mask_BT)
    gate_LN = packed["gates"][:, mask_BT.bool()]
    is_0, is_1 = gate_LN == 0, gate_LN == 1
    middle = (num_layers - 1) // 2
    if gates == "gone":
        assert is_0.all()
        assert norm(found, "layers.", "policy") == 0
        assert norm(found, "embed_tokens") > 0 and norm(found, "lm_head") > 0
        return
    for part in OUTER if gates != "one" or num_layers > 2 else ():
        assert norm(found, part) > 0, part
    if gates == "kept":
        assert is_1.all() and norm(found, "policy") == 0
        assert norm(found, f"layers.{middle}.mlp") > 0
    elif gates == "open":
        assert not (is_0 | is_1).any() and norm(found, "policy.weight") > 0 and norm(found, "policy.bias") > 0
    elif gates == "one":
        assert is_0[middle].all() and not is_0[:middle].any()
        assert (found["model.policy.bias"][middle] == 0) and (found["model.policy.bias"][:middle] != 0).all()
        assert norm(found, f"layers.{middle}.") == 0
    else:
        assert norm(found, "policy.weight") > 0
        assert is_0.any() and is_1.any() and (~is_0 & ~is_1).any()
        assert is_0.all(0).any()  # some token skips every block
        if gates == "late" and num_layers > 2:
            assert is_0[middle].all() and norm(found, f"layers.{middle}.") == 0


@pytest.mark.parametrize("fractional", [False, True])
@pytest.mark.parametrize(("num_layers", "skip_share"), [(5, 0.0), (4, 0.3), (5, 1.0)])
@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
def test_fixed_depths_equal_the_reference(
    make_model: Callable[..., MidskipForCausalLM], ragged: tuple[Tensor, Tensor],
    skipped_kv: str, num_layers: int, skip_share: float, fractional: bool,
) -> None:  # fmt: skip
    settings = {"skip_share": skip_share, "fractional": fractional}
    model = make_model(num_hidden_layers=num_layers, skipped_kv=skipped_kv, policy=FIXED, policy_settings=settings)
    packed, found = check_equal(model, *ragged)
    present = packed["gates"][:, ragged[1].bool()] > 0
    assert present.all() if skip_share == 0 else not present.all()
    assert present.any() == (skip_share < 1)
    assert (norm(found, "layers.0.mlp") > 0) == (skip_share < 1)


def test_blocks_of_different_width_equal_the_reference(
    make_model: Callable[..., MidskipForCausalLM], ragged: tuple[Tensor, Tensor]
) -> None:
    model = make_model("mixed", intermediate_size=[24, 40, 56, 16])
    assert [block.mlp.up_proj.out_features for block in model.model.layers] == [24, 40, 56, 16]
    check_equal(model, *ragged)


@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
@pytest.mark.parametrize("length", [1, 7, 63])
def test_odd_sizes_equal_the_reference(
    make_model: Callable[..., MidskipForCausalLM], skipped_kv: str, length: int
) -> None:
    model = make_model(skipped_kv=skipped_kv, num_hidden_layers=3, tie_word_embeddings=True, num_key_value_heads=1)
    ids_BT = torch.randint(31, (1, length))
    check_equal(model, ids_BT, torch.ones_like(ids_BT))


def test_llama3_rope_and_wide_heads_equal_the_reference(
    make_model: Callable[..., MidskipForCausalLM], ragged: tuple[Tensor, Tensor]
) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    model = make_model(head_dim=6, rope_parameters=rope)
    plain = make_model(head_dim=6, rope_parameters={"rope_theta": 100.0})
    check_equal(model, *ragged)
    assert (model(ragged[0]).logits - plain(ragged[0]).logits).abs().max() > 1e-4


def test_gate_dtype_does_not_round_the_keys(make_model: Callable[..., MidskipForCausalLM]) -> None:
    # FixedDepths draws float32 gates; their logarithm must be as exact as the rest
    model = make_model(policy=FIXED, policy_settings={"skip_share": 0.0, "fractional": True})
    ids_BT = torch.randint(31, (2, 8))
    same(model(ids_BT).logits, reference_forward(model, ids_BT).logits, "logits")


@pytest.mark.parametrize(
    ("policy", "mode"), [("middle_out", "train"), ("middle_out", "eval"), ("dense", "eval"), (FIXED, "eval")]
)
@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
def test_no_future_leak(make_model: Callable[..., MidskipForCausalLM], policy: str, skipped_kv: str, mode: str) -> None:
    model = make_model(skipped_kv=skipped_kv, policy=policy, num_hidden_layers=5).train(mode == "train")
    ids_BT = torch.randint(31, (3, 8))
    before = model(ids_BT, output_hidden_states=True)
    for column in range(8):
        changed_BT = ids_BT.clone()
        changed_BT[:, column] = (changed_BT[:, column] + 7) % 31
        after = model(changed_BT, output_hidden_states=True)
        for old, new in (
            (before.logits, after.logits),
            (before.gates.movedim(0, -1), after.gates.movedim(0, -1)),
            (torch.stack(before.hidden_states, 2), torch.stack(after.hidden_states, 2)),
        ):
            torch.testing.assert_close(new[:, :column], old[:, :column], rtol=0, atol=1e-12)
        assert (after.logits[:, column] - before.logits[:, column]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
def test_no_gradient_from_the_past_to_the_future(
    make_model: Callable[..., MidskipForCausalLM], skipped_kv: str
) -> None:
    model = make_model(skipped_kv=skipped_kv)
    embedded = model.model.embed_tokens(torch.randint(31, (2, 8))).detach().requires_grad_()
    output = model(inputs_embeds=embedded)
    for column in range(8):
        reached = output.logits[:, column].sum() + output.gates[:, :, column].sum()
        (gradient,) = torch.autograd.grad(reached, embedded, retain_graph=True)
        assert (gradient[:, column + 1 :] == 0).all()
        assert (gradient[:, column] != 0).any()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
def test_padding_batch_mates_and_their_order_change_nothing(
    make_model: Callable[..., MidskipForCausalLM], ragged: tuple[Tensor, Tensor], skipped_kv: str, mode: str
) -> None:
    model = make_model(skipped_kv=skipped_kv).train(mode == "train")
    ids_BT, mask_BT = ragged
    together = model(ids_BT, attention_mask=mask_BT, labels=ids_BT)
    assert (together.gates == 0).any() and (together.gates > 0).any()
    order = torch.randperm(len(ids_BT))
    shuffled = model(ids_BT[order], attention_mask=mask_BT[order], labels=ids_BT[order])
    same(shuffled.logits, together.logits[order], "order")
    same(shuffled.loss, together.loss, "loss in another order")
    noise_BT = torch.where(mask_BT.bool(), ids_BT, torch.randint(31, ids_BT.shape))
    same(model(noise_BT, attention_mask=mask_BT).logits, together.logits, "the ids at pads")
    for left, right in ((3, 0), (0, 5), (2, 1)):
        wide_ids, wide_mask = (torch.nn.functional.pad(x, (left, right)) for x in ragged)
        wide = model(wide_ids, attention_mask=wide_mask, labels=wide_ids)
        same(wide.logits[:, left : left + 9], together.logits, "more pads")
        same(wide.gates[:, :, left : left + 9], together.gates, "gates with more pads")
        same(wide.loss, together.loss, "loss with more pads")
    for b in range(len(ids_BT)):
        valid_T = mask_BT[b].bool()
        if valid_T.any():
            alone = model(ids_BT[b : b + 1, valid_T])
            same(alone.logits[0], together.logits[b, valid_T], f"logits of member {b}")
            same(alone.gates[:, 0], together.gates[:, b, valid_T], f"gates of member {b}")
    assert (together.logits[~mask_BT.bool()] == 0).all() and (together.gates[:, ~mask_BT.bool()] == 0).all()


def test_a_batch_has_the_gradients_of_its_members(make_model: Callable[..., MidskipForCausalLM]) -> None:
    model = make_model()
    ids_BT = torch.randint(31, (3, 8))
    model(ids_BT, labels=ids_BT).loss.backward()
    together = {name: x.grad.clone() for name, x in model.named_parameters()}
    model.zero_grad()
    for b in range(3):
        (model(ids_BT[b : b + 1], labels=ids_BT[b : b + 1]).loss / 3).backward()
    for name, parameter in model.named_parameters():
        same(parameter.grad, together[name], name)
