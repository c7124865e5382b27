"""What a pass gives: packed, as the model works, and as the rectangles a user sees.

B sequences, T columns, N valid tokens, D width, V vocabulary, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from midskip.model.cache import SkipCache
from midskip.model.packing import PackedBatch
from midskip.policies import Decision


@dataclass
class MidskipModelOutput(ModelOutput):
    """What `MidskipModel` gives.

    L is 2 * num_hidden_layers with `skip_unit="sublayer"`, but in `hidden_states`.

    Attributes:
        last_hidden_state: [B, T, D], after the last norm; 0 at pads.
        gates: float32 [L, B, T], the gate of each token in each layer; exactly 0 where it was not present.
        depth_scores: float32 [ceil(L/2), B, T] with the policy `middle_out`, else None. A score grows until it
            reaches 1 and then stays.
        executed: bool [L, B, T], whether each token ran each layer; False at pads.
        hidden_states: L + 1 tensors [B, T, D] if asked for, as Llama gives them: the embedding, then the output of each
            block, the last one after the last norm; 0 at pads.
        past_key_values: the cache, if one was given or asked for.
        executed_share: share of block-tokens that ran in this pass, of valid tokens times layers.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: SkipCache | None = None
    gates: Tensor | None = None
    depth_scores: Tensor | None = None
    executed: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    executed_share: float | None = None


@dataclass
class MidskipCausalLMOutput(ModelOutput):
    """What `MidskipForCausalLM` gives; see `MidskipModelOutput` for the fields not named here.

    Attributes:
        loss: mean cross-entropy in nats of the next tokens, if labels were given.
        logits: [B, T, V], or [B, k, V] with `logits_to_keep=k`; 0 at pads.
        auxiliary_loss: what the policy wants added to `loss` in training (`Policy.objective`); None if nothing.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: SkipCache | None = None
    gates: Tensor | None = None
    depth_scores: Tensor | None = None
    executed: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    executed_share: float | None = None
    auxiliary_loss: Tensor | None = None


@dataclass
class Packed:
    """One pass through the layers, still packed."""

    h_ND: Tensor
    batch: PackedBatch
    decisions: list[Decision]
    state: dict[str, Any]
    hidden_states: list[Tensor] | None
    cache: SkipCache | None

    @property
    def num_block_tokens(self) -> int:
        """Tokens that ran, summed over the layers; the host knows it already."""
        return sum(self.batch.keep(decision.keep_N).num_tokens for decision in self.decisions)

    @property
    def executed_share(self) -> float:
        """Share of block-tokens that ran."""
        return self.num_block_tokens / max(1, self.batch.num_tokens * len(self.decisions))

    def gates_LBT(self) -> Tensor:
        ones_N = torch.ones(self.batch.num_tokens, device=self.h_ND.device)
        gates: dict[Decision, Tensor] = {}  # mirrored layers share a decision
        for decision in self.decisions:
            if decision not in gates:
                gate_N = ones_N if decision.output_gate_N is None else decision.output_gate_N
                gates[decision] = gate_N if decision.keep_N is None else torch.where(decision.keep_N, gate_N, 0)
        return self.batch.unpack(torch.stack([gates[one] for one in self.decisions], 1)).movedim(-1, 0)

    def executed_LBT(self) -> Tensor:
        all_N = torch.ones(self.batch.num_tokens, dtype=torch.bool, device=self.h_ND.device)
        kept = [all_N if decision.keep_N is None else decision.keep_N for decision in self.decisions]
        return self.batch.unpack(torch.stack(kept, 1)).movedim(-1, 0)

    def outputs(self, output_gates: bool) -> dict[str, Any]:
        """The fields of both kinds of output."""
        scores, hidden = self.state.get("depth_scores"), self.hidden_states
        found = {
            "hidden_states": None if hidden is None else tuple(self.batch.unpack(h_ND) for h_ND in hidden),
            "past_key_values": self.cache,
            "executed_share": self.executed_share,
        }
        if output_gates:
            found |= {"gates": self.gates_LBT(), "executed": self.executed_LBT()}
            if scores:
                found["depth_scores"] = self.batch.unpack(torch.stack(scores, 1)).movedim(-1, 0)
        return found
