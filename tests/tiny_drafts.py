"""Tiny models that draft, and what their passes did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tiny_curve import CURVE
from torch import Tensor, nn

from midskip import MidskipForCausalLM
from midskip.model.drafts import DraftReport
from midskip.policies.middle_out import MiddleOut

Make = Callable[..., MidskipForCausalLM]
DRAFTS: dict[str, Any] = {"draft_budget": 0.6, "draft_confidence": 0.0}
POLICIES = ["middle_out", "independent"]


def model_that_drafts(make_model: Make, name: str = "middle_out", **changes: Any) -> MidskipForCausalLM:
    """float64, all tokens with keys, blocks run at random, and a calibration that was never measured.

    Args:
        make_model: the fixture of that name.
        name: of the policy.
    """
    settings: dict[str, Any] = {"skipped_kv": "keep", "max_position_embeddings": 128, "policy": name}
    model = make_model("mixed", **(settings | changes)).eval()
    policy = model.model.policy
    with torch.no_grad():
        if isinstance(policy, MiddleOut):
            assert policy.weight is not None
            policy.weight.mul_(0.4)
        elif name != "dense":
            nn.init.constant_(policy.bias, -0.5)  # pyright: ignore[reportArgumentType]
        for key, weight in model.model.layers.named_parameters():
            if key.split(".")[1].startswith("post_"):  # a block adds little, so that some drafts are right
                weight.mul_(0.3)
    model.config.calibration = CURVE
    return model


def prompt(*shape: int) -> Tensor:
    return torch.randint(31, shape)


def left_padded() -> tuple[Tensor, Tensor]:
    mask_BT = torch.ones(3, 9, dtype=torch.long)
    mask_BT[1, :4] = mask_BT[2, :7] = 0
    return prompt(3, 9), mask_BT


def generate(model: MidskipForCausalLM, ids_BT: Tensor | None, **options: Any) -> Any:
    return model.generate(ids_BT, **{"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0} | options)


def whole(model: MidskipForCausalLM, ids_BT: Tensor | None, **options: Any) -> Any:
    """Greedy search with every block run, without drafts."""
    policy = model.model.policy
    before = policy.score_scale, policy.max_layers
    policy.set_limits(0.0)
    try:
        return generate(model, ids_BT, **options)
    finally:
        policy.set_limits(*before)


def report_of(model: MidskipForCausalLM) -> DraftReport:
    assert model.last_drafts is not None
    return model.last_drafts


@dataclass
class Pass:
    num_columns: int
    score_scale: float
    max_layers: int | None
    executed_share: float


def passes_of(model: MidskipForCausalLM) -> list[Pass]:
    """Every pass from now on."""
    passes: list[Pass] = []

    def note(_: Any, arguments: tuple, keywords: dict, output: Any) -> None:
        given = keywords.get("input_ids", arguments[0] if arguments else None)
        policy, cache = model.model.policy, output.past_key_values
        tokens, ran = cache.num_valid_tokens - counts[0], cache.num_block_tokens - counts[1]
        assert given is not None
        counts[:] = cache.num_valid_tokens, cache.num_block_tokens
        passes.append(
            Pass(given.shape[1], policy.score_scale, policy.max_layers, ran / (tokens * model.config.num_skip_units))
        )

    counts = [0, 0]
    model.register_forward_hook(note, with_kwargs=True)
    return passes
