"""A policy of an outside author: frequent tokens leave the middle layers, rare ones stay.

It needs no edit of midskip: a recipe names it as `rare_words:RareWords`, and this folder has to be on the import path.
Or install it, `pip install examples/rare_words`: `pyproject.toml` offers it to midskip as `rare_words`, and whoever has
it installed loads models with it without further consent.
"""

import torch
from torch import nn

from midskip.policies import Decision, Policy

NUM_KINDS = 2**14  # tokens are told apart by their id modulo this


class RareWords(Policy):
    """A token runs the middle layers where exp(b - r) is below 1: its rarity r, in nats, lies above the bias b.

    r is - log of the token's share in the text seen so far. Nothing has a gradient, so b is set by the regularizer
    `target_share`: there is one gate, which all layers but the first and the last go by.
    """

    adjustable = True
    is_hard = True
    needs_target_share = True

    def __init__(self, num_layers, width, initializer_range=0.02):
        super().__init__(num_layers, width, initializer_range)
        self.middle = range(1, num_layers - 1)
        self.gate_of_layer = tuple(0 if layer in self.middle else None for layer in range(num_layers))
        self.bias = nn.Parameter(torch.empty(1), requires_grad=False)
        self.seen = nn.Buffer(torch.ones(NUM_KINDS))
        self.new = None

    def reset_parameters(self, init=nn.init):
        init.constant_(self.bias, self.open_bias)
        init.ones_(self.seen)

    def share_profile(self, outer):
        return [0.0 if layer in self.middle else None for layer in range(self.num_layers)]

    def decide(self, layer, h_ND, state, batch):
        if layer == 0:
            state["kinds"] = batch.token_N % NUM_KINDS
            rarity_N = -(self.seen / self.seen.sum()).log().index_select(0, state["kinds"]).float()
            readiness_N = self.score_scale * (self.bias.float() - rarity_N).exp()
            state["middle"] = Decision(readiness_N < 1)
        allowed = self.num_layers if self.max_layers is None else self.max_layers
        if layer >= allowed:
            return Decision(torch.zeros(len(h_ND), dtype=torch.bool, device=h_ND.device))
        return state["middle"] if layer in self.middle else Decision()

    def observe(self, state, nats_N, scored_N):
        ones_N = torch.ones_like(state["kinds"], dtype=self.seen.dtype)
        new = torch.zeros_like(self.seen).index_add(0, state["kinds"], ones_N)
        self.new = new if self.new is None else self.new + new

    def absorb(self):
        if self.new is not None:
            self.seen += self.new
            self.new = None
