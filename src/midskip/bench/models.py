"""The models that are timed, and how each is called.

B sequences, T columns.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from midskip.bench.kernels import BACKEND, attention_by
from midskip.bench.settings import BenchSettings
from midskip.model.config import MidskipConfig
from midskip.model.layers import compile_blocks
from midskip.model.modeling import MidskipForCausalLM
from midskip.policies import build_policy
from midskip.policies.middle_out import MiddleOut

FIXED_DEPTHS = "midskip.policies.controls:FixedDepths"

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Side:
    """One of those that are compared.

    Attributes:
        name: as reported.
        model: ours or transformers' Llama.
        skip_share: of block-tokens, where it is imposed.
        static: Llama's cache is allocated once, at its final length, and does not grow.
        stretch: positions between the first tokens of one row and the next; 0: all rows start at 0.
        attention: how that of packed tokens is computed; see `BenchSettings`.
    """

    name: str
    model: Any
    skip_share: float | None = None
    static: bool = False
    stretch: int = 0
    attention: str = "auto"

    @property
    def is_ours(self) -> bool:
        return isinstance(self.model, MidskipForCausalLM)

    def call(self, ids_BT: Tensor, cache: Any = None, **more: Any) -> Any:
        """A forward pass; with a cache, of what comes after its content."""
        if self.is_ours and cache is None and self.stretch:  # a cache goes on with each row's own positions
            more["position_ids"] = positions(ids_BT, self.stretch)
        if cache is not None:
            more["past_key_values"] = cache
        with attention_by(self.attention):
            return self.model(ids_BT, **more)

    def step(self, ids_B1: Tensor, cache: Any) -> Any:
        """A step of decoding, as `generate()` runs it."""
        unread = {"output_gates": False} if self.is_ours else {}
        return self.call(ids_B1, cache, use_cache=True, logits_to_keep=1, **unread)

    def empty_cache(self, num_columns: int) -> Any:
        """What a first pass takes to hold `num_columns` in the end; None where the model makes it itself."""
        return StaticCache(config=self.model.config, max_cache_len=num_columns) if self.static else None

    def prefilled(self, ids_BT: Tensor, num_columns: int) -> Any:
        """A cache with these tokens in it, that is to hold `num_columns` in the end."""
        return self.call(ids_BT, self.empty_cache(num_columns), use_cache=True, logits_to_keep=1).past_key_values


def positions(ids_BT: Tensor, stretch: int) -> Tensor:
    """int64 [B, T]: each row its own stretch of positions, so that each draws depths of its own."""
    row_B, column_T = (torch.arange(n, device=ids_BT.device) for n in ids_BT.shape)
    return row_B[:, None] * stretch + column_T


def build_ours(settings: BenchSettings, dtype: torch.dtype, norms: str | None = None) -> MidskipForCausalLM:
    """Our dense model, whose weights those that skip share."""
    torch.manual_seed(settings.seed)
    return placed(MidskipForCausalLM(settings.config(norms)), dtype, settings.device)


def build_llama(like: MidskipConfig, dtype: torch.dtype, device: str, seed: int = 0) -> LlamaForCausalLM:
    """transformers' Llama of the same shape, with SDPA."""
    torch.manual_seed(seed)
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
        "tie_word_embeddings", "initializer_range",
    )  # fmt: skip
    shape = {name: getattr(like, name) for name in names}
    config = LlamaConfig(**shape)
    config._attn_implementation = "sdpa"
    llama = LlamaForCausalLM(config)
    rotary = llama.model.rotary_emb
    frequencies = dict(rotary.named_buffers())
    placed(llama, dtype, device)
    for name, buffer in frequencies.items():  # not rounded, as in one that was loaded in this dtype
        setattr(rotary, name, buffer.to(device))
    return llama


def compiled(model: nn.Module) -> None:
    """Has torch.compile take our blocks, as `training.torch_compile` does, or the whole of Llama."""
    if isinstance(model, MidskipForCausalLM):
        compile_blocks(model.model.layers, BACKEND)
    else:
        model.compile(backend=BACKEND)


def placed(model: Model, dtype: torch.dtype, device: str) -> Model:
    """The model there, for evaluation."""
    nn.Module.to(model, device, dtype)
    return model.eval()


def with_policy(model: MidskipForCausalLM, policy: str, settings: dict[str, Any]) -> MidskipForCausalLM:
    """A model with another policy and the same weights, in the same memory."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    config = twin.config
    config.policy, config.policy_settings = policy, settings
    twin.model.policy = build_policy(
        policy, config.num_skip_units, config.hidden_size, config.initializer_range, settings
    )
    twin.model.policy.has_skip_paths = config.skip_path != "none"
    return twin.train(model.training)


def imposed(settings: BenchSettings, dense: MidskipForCausalLM, gates: str) -> list[Side]:
    """Our sides at each skip share."""
    sides = []
    for share in settings.shares:
        if gates == "hard":
            model, stretch = with_policy(dense, "middle_out", {"gates": "hard"}), 0
            _skip(model.model.policy, share)
        else:
            policy = {"skip_share": share, "fractional": gates == "fractional", "seed": settings.seed + 1}
            model, stretch = with_policy(dense, FIXED_DEPTHS, policy), settings.most_columns
        sides.append(Side(f"skip {share:g}", model, share, stretch=stretch))
    return by_attention(sides, settings.attention)


def by_attention(sides: list[Side], attention: tuple[str, ...]) -> list[Side]:
    """Each side as it computes attention in each of these ways."""
    return [
        side if name == "auto" else replace(side, name=f"{side.name}, {name}", attention=name)
        for side in sides
        for name in attention
    ]


@torch.no_grad()
def _skip(policy: MiddleOut, share: float) -> None:
    """Sets the biases of hard gates that go by a hash, so that this share of block-tokens is skipped where all pairs of
    tokens are equally frequent, spread over the layers as in `FixedDepths`."""
    policy.reset_parameters()
    if share == 0:
        return
    num_gates = policy.num_gates
    least, most = num_gates * max(0, 1 - 2 * share), num_gates * min(1, 2 - 2 * share)
    present = ((most - torch.arange(num_gates) - 0.5) / (most - least)).clamp(0, 1)
    # priorities are spread over [-2, 2), and a token is kept where its own is above the logarithm of the sum of exp(b)
    sums = (2.01 - 4.02 * present).exp()
    policy.bias.copy_(sums.diff(prepend=torch.zeros(1)).clamp(min=1e-6).log())


def llama_with_our_equations(llama: LlamaForCausalLM, config: MidskipConfig) -> MidskipForCausalLM:
    """Ours with Llama's norms, nothing skipped, and Llama's weights, in the same memory: the same function."""
    config = copy.deepcopy(config)
    config.norms, config.policy, config.policy_settings = "pre", "dense", {}
    config.skip_path, config.skip_path_rank = "none", None
    config.attention_bias = config.attention_out_bias = config.qk_norm = False
    config.no_rope_layers = None
    with torch.device("meta"):
        ours = MidskipForCausalLM(config)
    weights = {
        name.replace("post_attention_layernorm", "pre_feedforward_layernorm"): tensor
        for name, tensor in llama.state_dict().items()
    }
    ours.load_state_dict(weights, assign=True)
    ours.model.rotary.inv_freq = ours.model.rotary.compute().to(llama.device)
    return ours.eval()
