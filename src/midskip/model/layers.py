"""The block and its parts, over packed tokens.

N queries (tokens that run), M keys, D width, H query heads, G key heads, K head width, J features of a head (K, or
K + 1 with gates), F feed-forward.
"""

import math
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from midskip.model.attention import Attention
from midskip.model.layer_cache import LayerCache
from midskip.model.ops import scaled_norm
from midskip.model.packing import PackedBatch, Rotary


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, the mean square taken in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_ND: Tensor, gate_N: Tensor | None = None, residual_ND: Tensor | None = None) -> Tensor:
        """residual + gate * norm(x): a branch's last norm, its gate and the sum in one."""
        if x_ND.ndim != 2 and gate_N is None and residual_ND is None:  # a user's, of any shape
            return scaled_norm(x_ND.reshape(-1, x_ND.shape[-1]), self.weight, self.eps).view_as(x_ND)
        return scaled_norm(x_ND, self.weight, self.eps, gate_N, residual_ND)


class _GatedSum(nn.Module):
    """Stands where a block has no norm after a branch: residual + gate * x."""

    def forward(self, x_ND: Tensor, gate_N: Tensor | None, residual_ND: Tensor) -> Tensor:
        if gate_N is None:
            return residual_ND + x_ND
        return torch.addcmul(residual_ND, x_ND, gate_N.to(x_ND.dtype)[:, None])


class RotaryEmbedding(nn.Module):
    """Cosines and sines of the angles by which each position turns each pair of features (i, i + K/2).

    Args:
        width: K, even.
        rope: `rope_parameters` of the configuration: `rope_theta` and, by `rope_type`, how waves are stretched
            (`"linear"`: all; `"llama3"`: long ones; `"yarn"`: long ones, and cosines and sines are scaled).

    Attributes:
        attention_factor: what cosines and sines are multiplied by.
    """

    def __init__(self, width: int, rope: dict):
        super().__init__()
        self.width, self.rope = width, rope
        self.attention_factor = _yarn_attention_factor(rope) if rope.get("rope_type") == "yarn" else 1.0
        self.inv_freq = nn.Buffer(self.compute(), persistent=False)

    def compute(self) -> Tensor:
        """float32 [K/2], radians a position."""
        rope = self.rope
        radians = rope["rope_theta"] ** -(torch.arange(0, self.width, 2, dtype=torch.float64) / self.width)
        kind = rope.get("rope_type")
        if kind == "linear":
            radians = radians / rope["factor"]
        elif kind == "yarn":
            kept = _yarn_kept(self.width, rope)
            radians = radians * (kept + (1 - kept) / rope["factor"])
        elif kind == "llama3":
            turns = rope["original_max_position_embeddings"] * radians / (2 * math.pi)
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1: short waves stay, 0: long ones are stretched
            radians = radians * (kept + (1 - kept) / rope["factor"])
        return radians.float()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.inv_freq = self.compute().to(self.inv_freq.device)  # never rounded to half precision
        return self

    def forward(self, position_N: Tensor, dtype: torch.dtype) -> Rotary:
        """Cosines [N, 1, K], one for each feature, and sines [N, 1, K/2], one for each pair."""
        wide = torch.promote_types(dtype, torch.float32)
        angle = position_N.to(wide)[:, None, None] * self.inv_freq.to(wide)
        cos, sin = angle.cos(), angle.sin()
        if self.attention_factor != 1:
            cos, sin = cos * self.attention_factor, sin * self.attention_factor
        return cos.to(dtype).repeat(1, 1, 2), sin.to(dtype)


def _yarn_kept(width: int, rope: dict) -> Tensor:
    """float64 [K/2]: 1 for waves that turn often within the context of pretraining and stay, 0 for those that are
    stretched, on a line between (arXiv 2309.00071)."""
    context, theta = rope["original_max_position_embeddings"], rope["rope_theta"]
    low, high = (
        width * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (rope.get("beta_fast", 32), rope.get("beta_slow", 1))
    )
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    span = high - low or 0.001  # as transformers does where both ends meet
    return 1 - ((torch.arange(width // 2, dtype=torch.float64) - low) / span).clamp(0, 1)


def _yarn_attention_factor(rope: dict) -> float:
    def factor(strength: float) -> float:
        return 0.1 * strength * math.log(rope["factor"]) + 1 if rope["factor"] > 1 else 1.0

    if "attention_factor" in rope:
        return rope["attention_factor"]
    if "mscale" in rope and "mscale_all_dim" in rope:
        return factor(rope["mscale"]) / factor(rope["mscale_all_dim"])
    return factor(1)


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        open_NF = F.silu(self.gate_proj(x_ND))
        if open_NF.requires_grad:
            return self.down_proj(open_NF * self.up_proj(x_ND))
        return self.down_proj(open_NF.mul_(self.up_proj(x_ND)))  # nobody else holds it, and fresh memory costs more


class Block(nn.Module):
    """One layer, or one sublayer of it, on the tokens that are present, as if no others existed.

    x = x + g post_norm(attention(pre_norm(x)));  x = x + g post_norm(swiglu(pre_norm(x)))

    Names follow transformers' Llama; `post_*` norms exist only with `norms="sandwich"`.

    Attributes:
        backend: of torch.compile, for what stands before and after attention; None: not compiled.
    """

    backend: str | None = None

    def __init__(
        self, width: int, hidden: int, num_heads: int, num_key_heads: int, head_width: int, eps: float, norms: str,
        attention_bias: bool = False, attention_out_bias: bool = False, qk_norm: bool = False, rope: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.input_layernorm = RMSNorm(width, eps)
        q_norm, k_norm = (RMSNorm(head_width, eps), RMSNorm(head_width, eps)) if qk_norm else (None, None)
        self.self_attn = Attention(
            width, num_heads, num_key_heads, head_width, attention_bias, attention_out_bias, rope, q_norm, k_norm
        )
        self.pre_feedforward_layernorm = RMSNorm(width, eps)
        self.mlp = SwiGLU(width, hidden)
        if norms == "sandwich":
            self.post_attention_layernorm = RMSNorm(width, eps)
            self.post_feedforward_layernorm = RMSNorm(width, eps)
        else:
            self.post_attention_layernorm = self.post_feedforward_layernorm = _GatedSum()

    def forward(
        self, x_ND: Tensor, others_MD: Tensor | None, queries: PackedBatch, keys: PackedBatch,
        output_gate_N: Tensor | None = None, key_gate_M: Tensor | None = None, past: LayerCache | None = None,
        part: str = "block",
    ) -> Tensor:  # fmt: skip
        """Run the block, or a part of it.

        Args:
            x_ND: hidden states of the tokens present, which ask.
            others_MD: hidden states of all tokens that own a key; None: those of `x_ND` do.
            queries, keys: who the rows of both are, with their rotary angles.
            output_gate_N, key_gate_M: float32, gates of what is added and of the keys; None means 1.
            past: keys and values of earlier columns, which are seen too; the new ones are added to it.
            part: `"block"`, `"attention"` or `"feed_forward"`; the last one reads `x_ND` and `output_gate_N` alone.

        Returns:
            [N, D], the new hidden states of the tokens present.
        """
        assert queries.rotary and keys.rotary, "the model sets the angles before the first block"
        # none or one row would each be compiled apart, for nothing
        before, after, feed_forward = (
            STRETCHES if self.backend is None or x_ND.shape[0] <= 1 else _compiled(self.backend)
        )
        if part == "feed_forward":
            return feed_forward(self, x_ND, output_gate_N)
        indices_N = None if others_MD is None else queries.indices_N
        in_cache = past is not None and past.num_tokens  # against a cache, gates are in there
        gates = None if in_cache else key_gate_M
        q_NHJ, k_MGJ, v_MGJ = before(self, x_ND, others_MD, indices_N, queries.rotary, keys.rotary, gates)
        out_NHJ = self.self_attn.attend(q_NHJ, k_MGJ, v_MGJ, queries, keys, key_gate_M, past)
        return after(self, x_ND, out_NHJ, output_gate_N, part == "block")

    def modules_of(self, part: str) -> tuple[nn.Module, ...]:
        """Whose weights a part takes; `"keys"`: the keys and values of tokens that do not run it."""
        if part == "keys":
            k_norm = self.self_attn.k_norm
            norms = (self.input_layernorm,) if k_norm is None else (self.input_layernorm, k_norm)
            return *norms, self.self_attn.k_proj, self.self_attn.v_proj
        attention = self.input_layernorm, self.self_attn, self.post_attention_layernorm
        feed_forward = self.pre_feedforward_layernorm, self.mlp, self.post_feedforward_layernorm
        return {"attention": attention, "feed_forward": feed_forward, "block": attention + feed_forward}[part]

    # What stands before and after the attention kernel: arithmetic on rows, which torch.compile may take

    def _before_attention(
        self, x_ND: Tensor, others_MD: Tensor | None, indices_N: Tensor | None, queries: Rotary, keys: Rotary,
        key_gate_M: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        if others_MD is None or indices_N is None:
            normed = context = self.input_layernorm(x_ND)
        else:
            context = self.input_layernorm(others_MD)
            normed = context.index_select(0, indices_N)
        return self.self_attn.project(normed, context, queries, keys, key_gate_M)

    def _after_attention(self, x_ND: Tensor, out_NHJ: Tensor, output_gate_N: Tensor | None, goes_on: bool) -> Tensor:
        x_ND = self.post_attention_layernorm(self.self_attn.output(out_NHJ), output_gate_N, x_ND)
        return self._feed_forward(x_ND, output_gate_N) if goes_on else x_ND

    def _feed_forward(self, x_ND: Tensor, output_gate_N: Tensor | None) -> Tensor:
        ahead = self.mlp(self.pre_feedforward_layernorm(x_ND))
        return self.post_feedforward_layernorm(ahead, output_gate_N, x_ND)


def compile_blocks(layers: Iterable[nn.Module], backend: str = "inductor") -> None:
    """Have torch.compile fuse what stands before and after the attention of each `Block`; nothing else changes.

    All blocks of one shape share a graph, for any number of tokens; who belongs to which sequence, which changes from
    call to call, stays outside.
    """
    for block in layers:
        assert isinstance(block, Block)
        block.backend = backend


STRETCHES = (Block._before_attention, Block._after_attention, Block._feed_forward)


@cache
def _compiled(backend: str) -> tuple[Callable[..., Any], ...]:
    """The stretches of a block, as functions of it, so that it can still be copied and pickled."""
    return tuple(torch.compile(stretch, dynamic=True, backend=backend) for stretch in STRETCHES)
