"""At random: the control for what it is worth to choose tokens.

N packed tokens.
"""

from typing import Any

from torch import Tensor

from midskip.model.packing import PackedBatch
from midskip.names import check_one_of
from midskip.policies.base import Policy, check_shares
from midskip.policies.decision import Decision
from midskip.policies.middle_out import nested
from midskip.policies.scored import DRAWN_BY, uniform

KINDS = ("independent", "early_exit", "middle_out")
FIXED_SEED = 1  # of one draw for good; those of steps come after it


class RandomSkips(Policy):
    """Each token skips layers by a draw from its id, the one before it and its position, or from fewer of these.

    Args:
        share: of block-tokens that run on average, in (0, 1]; by default 0.5.
        kind: as in the policy of that name: each layer drawn anew; leaving for good; or leaving until the mirrored
            layer. Depths of the last two are drawn evenly around their mean.
        outer: layers at the beginning (and their mirrors, but for `early_exit`) that run for every token.
        redraw: draw anew in every training step. In evaluation the draw is always the same.
        by: `"position"`, all three of them; `"pair"`, the ids: then a token after the same token always runs the same
            layers, which it can learn to use if it is not drawn anew, and each layer serves other pairs; or `"token"`,
            its own id alone.
        shares: of the tokens that run each layer (each sublayer, if those are skipped), L numbers in [0, 1], in the
            place of `share` and `outer`; of the kind `"independent"`.
    """

    counts_steps = True

    def __init__(
        self, num_layers: int, width: int, initializer_range: float = 0.02, share: float | None = None,
        kind: str = "independent", outer: int = 0, redraw: bool = True, by: str = "position",
        shares: list[float] | None = None,
    ):  # fmt: skip
        super().__init__(num_layers, width, initializer_range)
        check_one_of("kind", kind, KINDS)
        if shares is not None and (share is not None or kind != "independent" or outer):
            given = f"share {share}, kind {kind!r} and outer {outer}"
            raise ValueError(f"shares are given, and {given}; expected no share, kind 'independent' and outer 0")
        share = 0.5 if share is None else share
        check_shares(share=share)
        if isinstance(outer, bool) or not isinstance(outer, int) or not 0 <= outer <= num_layers // 2:
            raise ValueError(f"outer is {outer!r}; expected a whole number from 0 to {num_layers // 2}")
        if not isinstance(redraw, bool):
            raise ValueError(f"redraw is {redraw!r}; expected true or false")
        check_one_of("by", by, DRAWN_BY)
        self.kind, self.redraw, self.by, self.is_mirrored = kind, redraw, by, kind == "middle_out"
        self.needs_midskip_trainer = redraw
        if shares is not None:
            self.present = _checked(shares, num_layers)
            self.closed_layers = frozenset(n for n, one in enumerate(self.present) if not one)
            return
        profile = {
            "independent": [None if min(n, num_layers - 1 - n) < outer else 0.0 for n in range(num_layers)],
            "early_exit": [None if n < outer else float(n) for n in range(num_layers)],
            "middle_out": nested(num_layers, outer)[1],
        }[kind]
        num_inner = sum(depth is not None for depth in profile)
        mean = 1 - (1 - share) * num_layers / num_inner if num_inner else 1.0
        if mean < 0 or (not num_inner and share < 1):
            raise ValueError(f"share is {share!r} and outer {outer}, whose layers alone are more: lower outer")
        self.present = self._present(profile, mean)

    def _present(self, profile: list[float | None], mean: float) -> list[float]:
        """Share of the tokens in each layer."""
        depths = [depth for depth in profile if depth is not None]
        largest = max(depths, default=0.0) or 1.0
        middle = sum(depths) / len(depths) / largest if depths else 0.0
        # from the first to the last in order the share falls as far as it can
        reach = min(mean / (1 - middle), (1 - mean) / middle) if 0 < middle < 1 else 0.0
        return [1.0 if depth is None else mean + reach * (middle - depth / largest) for depth in profile]

    def decide(self, layer: int, h_ND: Tensor, state: dict[str, Any], batch: PackedBatch) -> Decision:
        if layer == 0:
            seed = FIXED_SEED + (1 + int(self.num_steps) if self.training and self.redraw else 0)
            seeds = [seed * self.num_layers + n * (self.kind == "independent") for n in range(self.num_layers)]
            draws = {seed: uniform(batch, seed, self.by) for seed in set(seeds)}
            keeps = [None if share == 1 else draws[n] < share for n, share in zip(seeds, self.present, strict=True)]
            state["decisions"] = [Decision(keep_N) for keep_N in keeps]
            batch.count(keeps)
        return state["decisions"][layer]


def _checked(shares: list[float], num_layers: int) -> list[float]:
    numbers = isinstance(shares, list) and all(type(one) in (int, float) and 0 <= one <= 1 for one in shares)
    if not numbers or len(shares) != num_layers:
        raise ValueError(f"shares is {shares!r}; expected {num_layers} numbers from 0 to 1, one for each layer")
    return [float(one) for one in shares]
