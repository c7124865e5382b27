"""Blocks with biases, norms of heads, stretched RoPE or none, where tokens skip: exact, compiled, and their cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_pretrained import LINEAR, YARN

import midskip
from midskip import MidskipForCausalLM
from midskip.model.layers import compile_blocks
from midskip.reference import reference_forward

BLOCKS: dict[str, dict[str, Any]] = {
    "bias": {"attention_bias": True, "attention_out_bias": True, "rope_parameters": LINEAR},
    "qk_norm": {"qk_norm": True, "attention_bias": True, "head_dim": 6},
    "no_rope": {"no_rope_layers": [1, 0, 1, 0], "rope_parameters": YARN},
}


@pytest.mark.parametrize("changes", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
def test_packed_loss_and_gradients_are_the_references(
    make_model: Callable[..., MidskipForCausalLM], changes: dict, skipped_kv: str
) -> None:
    model = make_model(norms="pre", skipped_kv=skipped_kv, **changes)
    disturb(model)
    ids_BT, mask_BT = torch.randint(31, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask_BT[0, :4] = 0
    results = []
    for forward in (model, lambda *arguments, **named: reference_forward(model, *arguments, **named)):
        model.zero_grad()
        output = forward(ids_BT, attention_mask=mask_BT, labels=ids_BT)
        output.loss.backward()
        results.append([output.loss, *(parameter.grad.clone() for parameter in model.parameters())])
        gates = output.gates[:, mask_BT.bool()]
        assert (gates == 0).any() and (gates > 0).any()
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    new = [grad for (name, _), grad in zip(model.named_parameters(), results[1][1:], strict=True) if is_new(name)]
    assert all(grad.abs().max() > 1e-6 for grad in new)


@torch.no_grad()
@pytest.mark.integration
def test_compiled_blocks_give_the_same(make_model: Callable[..., MidskipForCausalLM]) -> None:
    model = make_model(norms="pre", **BLOCKS["bias"] | BLOCKS["qk_norm"] | BLOCKS["no_rope"]).eval()
    disturb(model)
    ids_BT = torch.randint(31, (2, 12))
    expected = model(ids_BT).logits
    compile_blocks(model.model.layers, backend="eager")
    torch.testing.assert_close(model(ids_BT).logits, expected)
    torch._dynamo.reset()


def is_new(name: str) -> bool:
    """Whether a weight is one that Llama without biases does not have. A bias of keys alone changes no softmax."""
    return ("bias" in name and "policy" not in name and "k_proj" not in name) or "q_norm" in name or "k_norm" in name


@torch.no_grad()
def disturb(model: MidskipForCausalLM) -> None:
    """Biases and norms of heads start where they do nothing."""
    for name, parameter in model.named_parameters():
        if is_new(name) or "k_proj.bias" in name:
            parameter.add_(torch.randn_like(parameter) * 0.3)


@torch.no_grad()
def test_bytes_have_all_weights_and_flops_only_products(make_model: Callable[..., MidskipForCausalLM]) -> None:
    ids_BT = torch.randint(31, (1, 9))
    flops = []
    for changes in ({}, {"attention_bias": True, "attention_out_bias": True, "qk_norm": True}):
        model = make_model(norms="pre", policy="dense", skipped_kv="keep", **changes).eval()
        with midskip.meter(model) as work:
            model(ids_BT)
        table = model.model.embed_tokens.weight
        weights = sum(parameter.nbytes for parameter in model.parameters()) - table.nbytes + 9 * 16 * 8
        assert work.bytes.weights == weights
        flops.append(work.flops().total)
    assert flops[0] == flops[1]
    block = model.model.layers[0]
    keys = sum(parameter.nbytes for module in block.modules_of("keys") for parameter in module.parameters())
    attention = block.self_attn
    wanted = [block.input_layernorm, attention.k_proj, attention.v_proj, attention.k_norm]
    assert keys == sum(parameter.nbytes for module in wanted for parameter in module.parameters())
