"""The shape of a model and who may skip in it. Strict: what is unknown or impossible is refused."""

import os
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from midskip.budget.calibration import Calibration
from midskip.names import check_one_of, near
from midskip.plugins import check_saved

NORMS = ("sandwich", "pre")
SKIPPED_KV = ("drop", "keep")
SKIP_PATHS = ("none", "linear", "low_rank", "adapter")
PARTS = {"block": ("block",), "sublayer": ("attention", "feed_forward")}  # of a block, which a token skips apart
SKIPPING_WEIGHTS = ("model.policy.", "model.skip_paths.")  # how their names begin; a dense model has none

# What transformers itself hands to a configuration beside its declared fields.
_FROM_TRANSFORMERS = {
    "model_type", "torch_dtype", "name_or_path", "_name_or_path", "_commit_hash", "rope_theta", "rope_scaling",
    "attn_implementation", "output_attentions", "experts_implementation", "per_layer_config", "num_labels",
    "auto_map", "quantization_config",
}  # fmt: skip
_ROPE_KEYS = {
    "default": {"rope_theta"},
    "linear": {"rope_theta", "factor"},
    "llama3": {"rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"rope_theta", "factor", "original_max_position_embeddings"},
}
_ROPE_OPTIONS = {"yarn": {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}}


REMOTE_MODULE = "load_midskip"  # in a saved folder, for `trust_remote_code=True` where midskip was not imported
REMOTE_CODE = """# The model's code is the package midskip, which has to be installed.
from midskip import MidskipConfig, MidskipForCausalLM, MidskipModel

__all__ = ["MidskipConfig", "MidskipForCausalLM", "MidskipModel"]
"""
AUTO_MAP = {
    "AutoConfig": f"{REMOTE_MODULE}.MidskipConfig",
    "AutoModel": f"{REMOTE_MODULE}.MidskipModel",
    "AutoModelForCausalLM": f"{REMOTE_MODULE}.MidskipForCausalLM",
}


def num_skip_units(num_hidden_layers: int, skip_unit: str) -> int:
    """What a policy decides about: blocks, or twice as many sublayers."""
    return num_hidden_layers * len(PARTS[skip_unit])


def intermediate_sizes(config: Any) -> list[int]:
    """Width of each block's feed-forward layer; `config` may be Llama's too."""
    sizes = config.intermediate_size
    return list(sizes) if isinstance(sizes, list) else [sizes] * config.num_hidden_layers


class MidskipConfig(PretrainedConfig):
    """Configuration of a Transformer whose tokens skip layers.

    Field names follow transformers' `LlamaConfig`. `rope_parameters` may be of the types `"default"`, `"linear"`,
    `"llama3"` and `"yarn"`. Fields that other models of that family have, or that are our own:

    Attributes:
        intermediate_size: width of the feed-forward layers, or, as in Gemma3n, a list of L, one of each block.
        attention_bias: whether the projections of queries, keys and values have a bias.
        attention_out_bias: whether the output projection of attention has one. (Llama's `attention_bias` is both.)
        qk_norm: whether each head's queries and keys go through an RMSNorm, as in Qwen3.
        no_rope_layers: L numbers as in SmolLM3, 1 for a block with rotary embedding, 0 for one without; None: all have
            it.
        norms: `"sandwich"` (RMSNorm before and after both branches, after the embedding and before the head, as in
            the paper) or `"pre"` (before both branches and before the head, as in Llama).
        skipped_kv: `"drop"`, a token that skips a layer has no key and value there and others see it scaled by its gate
            (the paper's equations), or `"keep"`, every valid token makes keys and values at every layer and no key is
            gated (what the paper's released code computes).
        skip_unit: what a token skips: `"block"`, or `"sublayer"`, attention and feed-forward apart. With `"sublayer"`
            the layers of policies, regularizers, gates, shares and reports are sublayers: 2 l is the attention of block
            l, and 2 l + 1 its feed-forward. Weights are the same.
        skip_path: what a token that skips a layer gets instead of it: `"none"`, nothing, or a map with few FLOPs, for
            each layer: `"linear"`, `"low_rank"` or `"adapter"` (`model.skip_path.SkipPath`). A new one gives nothing.
        skip_path_rank: hidden features of the last two; by default 64.
        policy: who skips: a name in `midskip.policies` (`"middle_out"`, `"dense"`), that of an entry point of an
            installed package, or `"package.module:Class"`, which is imported when a model is built. A configuration
            from a file names the last only with the caller's consent, `trust` (`from_dict`).
        policy_settings: keyword arguments of that policy.
        use_cache: whether `generate()`, and a forward pass without gradients, use a cache unless they are told.
        calibration: what `midskip calibrate` measured, for a budget at run time: a `Calibration` as a dictionary.

    The defaults are the shape of the paper's 12-layer model with GPT-2's vocabulary (arXiv 2506.21103).

    Raises:
        ValueError: an unknown key, or a value that cannot be built; the message names it, what it was and what is
            accepted.
    """

    model_type = "midskip"
    keys_to_ignore_at_inference = ["past_key_values", "gates", "depth_scores", "executed", "executed_share"]

    vocab_size: int = 50257
    hidden_size: int = 768
    intermediate_size: int | list[int] = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int = None  # pyright: ignore[reportAssignmentType]
    head_dim: int = None  # pyright: ignore[reportAssignmentType]
    max_position_embeddings: int = 1024
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    rope_parameters: dict = None  # pyright: ignore[reportAssignmentType]
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    qk_norm: bool = False
    no_rope_layers: list[int] | None = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    norms: str = "sandwich"
    skipped_kv: str = "drop"
    skip_unit: str = "block"
    skip_path: str = "none"
    skip_path_rank: int | None = None
    policy: str = "middle_out"
    policy_settings: dict = None  # pyright: ignore[reportAssignmentType]
    calibration: Any = None  # checked here, so that what is wrong in it is named

    def __post_init__(self, **kwargs: Any):
        _refuse_unknown(kwargs, {field.name for field in fields(self)})
        for name in ("policy_settings", "rope_parameters"):
            if not isinstance(getattr(self, name), dict | None):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a dictionary")
        self.policy_settings = dict(self.policy_settings or {})
        self.rope_parameters = dict(self.rope_parameters or {})
        _check_positive_integers(self)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads "
                    f"({self.num_attention_heads}): change one of them, or give MidskipConfig a head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        _check_inherited(self)
        super().__post_init__(**kwargs | {"auto_map": dict(AUTO_MAP)})
        self._check()

    @property
    def num_skip_units(self) -> int:
        """The L of policies, gates and reports; see `skip_unit`."""
        return num_skip_units(self.num_hidden_layers, self.skip_unit)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], trust: Collection[str] = (), **kwargs: Any) -> Any:
        """As transformers does, and `from_pretrained` of configurations and models, which come through here.

        Args:
            trust: modules that a policy may be imported from because the file says so: `["package.module"]`. What is
                built in, and what an installed package offers as an entry point, needs none.

        Raises:
            ValueError: a policy from a module that is not among them, or a setting that the constructor refuses; those
                given beside the dictionary are checked too.
        """
        if "policy" not in kwargs:  # which would be the caller's own
            folder = kwargs.get("name_or_path")  # of the Auto classes
            where = "the configuration" if folder is None else f"the configuration of {str(folder)!r}"
            check_saved(config_dict.get("policy"), "policy", trust, where)
        names = {field.name for field in fields(cls)} - {"dtype"}
        own = {name: kwargs.pop(name) for name in names & kwargs.keys()}
        if "skip_path" in own:
            own = {"skip_path_rank": None} | own  # that of the file is of another path
        return super().from_dict(config_dict | own, **kwargs)  # transformers would set them past the constructor

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> Any:
        """As transformers does; see `from_dict`."""
        return cls.from_dict(cls._dict_from_json_file(json_file))

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As transformers does, with a module beside it that imports midskip, so that `AutoModelForCausalLM` loads the
        folder with `trust_remote_code=True` where nobody has imported it."""
        super().save_pretrained(save_directory, **kwargs)
        Path(save_directory, f"{REMOTE_MODULE}.py").write_text(REMOTE_CODE, encoding="utf-8")

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing to do; transformers would copy the package's files beside each model."""

    def _check(self) -> None:
        for field in fields(self):
            if field.name not in ("policy_settings", "calibration"):  # which are checked by those who read them
                _check_finite(field.name, getattr(self, field.name))
        check_one_of("norms", self.norms, NORMS)
        check_one_of("skipped_kv", self.skipped_kv, SKIPPED_KV)
        check_one_of("skip_unit", self.skip_unit, tuple(PARTS))
        check_one_of("skip_path", self.skip_path, SKIP_PATHS)
        has_rank = self.skip_path in ("low_rank", "adapter")
        if self.skip_path_rank is not None and not has_rank:
            raise ValueError(
                f"skip_path_rank is {self.skip_path_rank!r} with skip_path {self.skip_path!r}, which has none: leave "
                "it out, or set skip_path to 'low_rank' or 'adapter'"
            )
        self.skip_path_rank = self.skip_path_rank or (64 if has_rank else None)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) is not a multiple of num_key_value_heads "
                f"({self.num_key_value_heads}); each key head serves an equal number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embedding turns pairs of features: make it even")
        for name in ("rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
                raise ValueError(f"{name} is {value!r}; expected a number above 0")
        if not isinstance(self.policy, str) or not self.policy:
            raise ValueError(f"policy is {self.policy!r}; expected a name or 'package.module:Class'")
        if self._attn_implementation not in (None, "sdpa"):
            raise ValueError(
                f"attn_implementation is {self._attn_implementation!r}; midskip chooses its own packed attention: "
                "leave it out"
            )
        for name in ("tie_word_embeddings", "attention_bias", "attention_out_bias", "qk_norm", "use_cache"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected True or False")
        if self.output_attentions or self.chunk_size_feed_forward:
            raise ValueError(
                "output_attentions and chunk_size_feed_forward would have no effect: packed attention never holds its "
                "weights, and a block always runs whole; leave them out"
            )
        if not self.return_dict:
            told = f"return_dict is {self.return_dict!r}; expected True"
            raise ValueError(f"{told}: for a tuple give return_dict=False to the call")
        self._check_rope()
        if self.calibration is not None:
            self.calibration = Calibration.from_dict(self.calibration).to_dict()

    def _check_rope(self) -> None:
        rope = self.rope_parameters
        kind = rope.get("rope_type", "default")
        check_one_of("rope_parameters['rope_type']", kind, tuple(_ROPE_KEYS))
        expected = _ROPE_KEYS[kind]
        options = _ROPE_OPTIONS.get(kind, set())
        given = set(rope) - {"rope_type", "type"}
        if given - options != expected:
            beside = f", and maybe {sorted(options)}" if options else ""
            raise ValueError(
                f"rope_parameters of type {kind!r} has the keys {sorted(given)}; expected exactly {sorted(expected)}"
                f"{beside}"
            )
        for name in given:
            if name == "truncate":
                if not isinstance(rope[name], bool):
                    raise ValueError(f"rope_parameters['truncate'] is {rope[name]!r}; expected True or False")
            elif not isinstance(rope[name], int | float) or rope[name] <= 0:
                raise ValueError(f"rope_parameters[{name!r}] is {rope[name]!r}; expected a number above 0")
        layers = self.no_rope_layers
        fits = isinstance(layers, list) and len(layers) == self.num_hidden_layers and all(x in (0, 1) for x in layers)
        if layers is not None and not fits:
            raise ValueError(
                f"no_rope_layers is {layers!r}; expected a list of {self.num_hidden_layers} numbers, one for each "
                "block: 1 with rotary embedding, 0 without"
            )


def _refuse_unknown(kwargs: dict[str, Any], known: set[str]) -> None:
    for name in kwargs:
        if name in _FROM_TRANSFORMERS:
            continue
        hint = near(name, sorted(known)) or f"; known settings: {', '.join(sorted(known))}"
        raise ValueError(f"MidskipConfig does not know the setting {name!r}{hint}")


def _check_positive_integers(config: MidskipConfig) -> None:
    names = [
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
    ]  # fmt: skip
    names += [
        name for name in ("num_key_value_heads", "head_dim", "skip_path_rank") if getattr(config, name) is not None
    ]
    for name in names:
        if not _is_count(value := getattr(config, name)):
            raise ValueError(f"{name} is {value!r}; expected a whole number of at least 1")
    sizes, num_layers = config.intermediate_size, config.num_hidden_layers
    fits = isinstance(sizes, list) and len(sizes) == num_layers and all(map(_is_count, sizes))
    if not _is_count(sizes) and not fits:
        raise ValueError(
            f"intermediate_size is {sizes!r}; expected a whole number of at least 1, or a list of {num_layers}, one "
            "for each block"
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_inherited(config: MidskipConfig) -> None:
    """What transformers reads without asking what it is."""
    dtype = config.dtype
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not isinstance(named, torch.dtype):
        raise ValueError(f"dtype is {dtype!r}; expected the name of a dtype of torch, as 'float32', or None")
    for name in ("id2label", "label2id"):
        if not isinstance(getattr(config, name), dict | None):
            raise ValueError(f"{name} is {getattr(config, name)!r}; expected a dictionary, or None")
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(config, name)
        several = name == "eos_token_id" and isinstance(value, list)
        ids = [part for part in (value if several else [value]) if several or part is not None]
        if not all(type(part) is int and -(2**63) <= part < 2**63 for part in ids):
            raise ValueError(f"{name} is {value!r}; expected the id of a token, or None")


def _check_finite(name: str, value: object) -> None:
    """ValueError for a number within `value`, or within what it holds, that is none or too large for float32."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            _check_finite(f"{name}[{key!r}]", part)
    elif isinstance(value, int | float) and not abs(value) <= torch.finfo(torch.float32).max:  # true of NaN too
        raise ValueError(f"{name} is {value!r}; expected a finite number that float32 can hold")
