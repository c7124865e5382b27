"""A tiny model to check a policy in, and how its results are compared.

B sequences, T columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from midskip.model.config import MidskipConfig
from midskip.model.modeling import MidskipForCausalLM
from midskip.regularizers import build_regularizer

TOLERANCE = 1e-6  # of the largest number of a tensor; wide enough for a policy that works in float32
NUM_COLUMNS = 7
STEPS_OF_BUDGET = 30  # in which a regularizer brings about half of the tokens to leave
ROWS = "1111111 0011111 1111000 0111110 0001000 0000000 1100111"  # all, pads left, right, both, one token, none, a hole
VALID_BT = torch.tensor([[digit == "1" for digit in row] for row in ROWS.split()])


@dataclass
class Trial:
    """A tiny model with the policy, tokens for it, and where it stands among all trials."""

    model: MidskipForCausalLM
    ids_BT: Tensor
    generator: torch.Generator
    where: str

    @classmethod
    def make(
        cls,
        policy: str,
        settings: dict,
        num_layers: int,
        skipped_kv: str,
        skip_unit: str,
        skip_path: str,
        moved: bool,
        seed: int,
    ) -> Trial:
        config = MidskipConfig(
            vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=num_layers, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=2 * NUM_COLUMNS, initializer_range=0.3,
            skipped_kv=skipped_kv, skip_unit=skip_unit, skip_path=skip_path, policy=policy, policy_settings=settings,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = MidskipForCausalLM(config).double().eval()
        generator = torch.Generator().manual_seed(seed)
        ids_BT = torch.randint(config.vocab_size, VALID_BT.shape, generator=generator)
        if moved:
            _move(model, ids_BT, generator)
        state = "with its parameters moved" if moved else "as it starts"
        where = f"{policy!r}, {num_layers} layers, skipped_kv={skipped_kv!r}, skip_unit={skip_unit!r}, "
        where += f"skip_path={skip_path!r}, {state}"
        return cls(model, ids_BT, generator, where)

    def failed(self, check: str, what: str) -> AssertionError:
        return AssertionError(f"check {check!r} failed: {what} ({self.where})")

    @torch.no_grad()
    def run(self, ids_BT: Tensor, valid_BT: Tensor | None = None) -> dict[str, Tensor]:
        """The output's tensors as [B, T, ...], 0 at pads."""
        return by_token(self.model(ids_BT, attention_mask=valid_BT, output_hidden_states=True, use_cache=False))

    def same(self, check: str, got: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
        if got.keys() != expected.keys():
            raise self.failed(check, f"{what}: got {sorted(got)}, expected {sorted(expected)}")
        for name, tensor in got.items():
            if distance := distance_of(tensor, expected[name]):
                raise self.failed(check, f"{what}; {name} differ by {distance}")


@torch.no_grad()
def _move(model: MidskipForCausalLM, ids_BT: Tensor, generator: torch.Generator) -> None:
    """Move what was learnt at random; where a regularizer has to close gates, until about half are."""
    policy = model.model.policy
    for parameter in (*policy.parameters(), *model.model.skip_paths.parameters()):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter += noise.to(parameter) / policy.width**0.5
    if policy.needs_target_share:
        for buffer in policy.buffers():
            buffer += torch.rand(buffer.shape, generator=generator, dtype=torch.float64).to(buffer)
        regularizer = build_regularizer("target_share", policy.num_layers, target_share=0.5, ramp_steps=1)
        for _ in range(STEPS_OF_BUDGET):
            regularizer.steer(policy)
            output = model(ids_BT, attention_mask=VALID_BT, use_cache=False)
            gates_LN, executed_LN = output.gates[:, VALID_BT], output.executed[:, VALID_BT]
            regularizer.update(gates_LN.mean(1), gates_LN.var(1), executed_LN.float().mean(1))


def by_token(output: Any) -> dict[str, Tensor]:
    hidden = output.hidden_states
    tensors = {
        "gates": output.gates.movedim(0, -1),
        "hidden states": (hidden if isinstance(hidden, Tensor) else torch.stack(hidden)).movedim(0, 2),
        "logits": output.logits,
    }
    if output.depth_scores is not None:
        tensors["depth scores"] = output.depth_scores.movedim(0, -1).clamp(max=1)
    return tensors


def distance_of(got: Tensor, expected: Tensor) -> str:
    """Empty if the two agree; NaN agrees with nothing."""
    if not expected.numel():
        return ""
    largest = (got.double() - expected.double()).abs().max().item()
    return "" if largest <= TOLERANCE * expected.abs().max().item() + 1e-9 else f"{largest:.3g}"
