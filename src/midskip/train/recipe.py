"""A recipe: everything that decides a run, typed."""

import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

if TYPE_CHECKING:  # else `midskip train --help` would wait for torch
    from midskip.model.config import MidskipConfig
    from midskip.regularizers import Regularizer


@dataclass
class DataSettings:
    """The text, or labelled data.

    Args:
        source: what `midskip prepare` takes (pydocs, files, globs, a folder, hub:NAME), prepared into the run's folder;
            or a folder that `midskip prepare` wrote, with a tokenizer and held-out text of its own; or shards of
            tokens (a glob that ends in .bin); or labelled data, "pointers" or "package.module:Class", of which only
            `settings` and `length` are to be given.
        settings: keyword arguments of the labelled data.
        validation: the held-out text or shards; null to hold out a share of the documents of `source`.
        validation_share: that share; null for 0.05.
        tokenizer: "bpe" (byte-level, trained on the text), "bytes", or a Hugging Face one by folder or name.
        vocab_size: tokens of the "bpe" tokenizer; null for 2048.
        pad_token: a special token for padding, as "<|pad|>", one of `vocab_size`; null to pad with the end of text.
        length: tokens of a training window, and the longest input of the model; items may be shorter.
        separate_documents: keep attention within documents; false lets those that share a window see each other.
        max_tokens: stop reading `source` after so many training tokens; null for all.
        max_validation_tokens: the same for the held-out text.
        text_field: where .jsonl, .parquet and hub data sets have the text.
    """

    source: str = "pydocs"
    settings: dict[str, Any] = field(default_factory=dict)
    validation: str | None = None
    validation_share: float | None = None
    tokenizer: str = "bpe"
    vocab_size: int | None = None
    pad_token: str | None = None
    length: int = 256
    separate_documents: bool = True
    max_tokens: int | None = None
    max_validation_tokens: int | None = None
    text_field: str = "text"


@dataclass
class ModelSettings:
    """The shape of the model; see MidskipConfig.

    Args:
        hidden_size: width of the hidden states.
        intermediate_size: width of the feed-forward layers, or a list of each block's.
        num_hidden_layers: blocks.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads; as many as query heads if null.
        norms: "sandwich" (the paper's) or "pre" (Llama's).
        skipped_kv: "drop" (a token that skips a layer has no key there) or "keep".
        skip_unit: "block", or "sublayer": attention and feed-forward are skipped apart.
        skip_path: what a token that skips gets instead: "none", "linear", "low_rank" or "adapter".
        skip_path_rank: hidden features of the last two; null for 64.
        policy: who skips: "middle_out", "dense" or "package.module:Class".
        policy_settings: settings of the policy.
        tie_word_embeddings: one matrix for the embedding and the head.
        pad_vocab_to_multiple_of: rows of embedding and head, the tokenizer's tokens rounded up to a multiple of this;
            8 or more makes the matrix products of the head several times faster on a GPU in half precision.
        init_from: the folder of a run, or of a saved midskip model of this shape and of the text's tokenizer, whose
            weights training starts from; null for random ones.
        initializer_range: standard deviation of the weights at the start.
        rope_theta: base of the rotary embedding.
    """

    hidden_size: int = 128
    intermediate_size: int | list[int] = 384
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    norms: Literal["sandwich", "pre"] = "sandwich"
    skipped_kv: Literal["drop", "keep"] = "drop"
    skip_unit: Literal["block", "sublayer"] = "block"
    skip_path: Literal["none", "linear", "low_rank", "adapter"] = "none"
    skip_path_rank: int | None = None
    policy: str = "middle_out"
    policy_settings: dict[str, Any] = field(default_factory=dict)
    tie_word_embeddings: bool = False
    pad_vocab_to_multiple_of: int = 1
    init_from: str | None = None
    initializer_range: float = 0.02
    rope_theta: float = 10000.0


@dataclass
class RegularizerSettings:
    """The gate regularizer; see midskip.build_regularizer.

    Args:
        name: "none", "target_share", one of the paper's ("adaptive", "proportional", ...) or "package.module:Class".
        settings: its settings, for target_share {target_share: 0.5}.
    """

    name: str = "none"
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class TrainingSettings:
    """The optimisation.

    Args:
        max_steps: optimizer steps.
        per_device_train_batch_size: windows in a forward pass of one device.
        gradient_accumulation_steps: forward passes in an optimizer step.
        learning_rate: its peak.
        gate_learning_rate_scale: the policy's own learning rate, as a factor of the others'.
        warmup_ratio: share of the steps in which it rises to the peak; then it falls to 0 on a cosine.
        warmup_start: where it rises from, as a share of the peak.
        adam_beta1: AdamW's.
        adam_beta2: AdamW's.
        adam_epsilon: AdamW's.
        weight_decay: AdamW's, on matrices.
        max_grad_norm: largest norm of the gradient; 0 for no clipping.
        seed: of the weights.
        data_seed: of the order of the windows; null for that of the weights.
        logging_steps: steps between two points of the curves by layer, of throughput and of utilisation.
        eval_steps: steps between two evaluations on all held-out text, of which the best model is kept; 0 for
            one at the end.
        save_steps: steps between two checkpoints; 0 for none but the model at the end.
        save_total_limit: how many of the newest stay.
        gradient_checkpointing: work activations out again in the backward pass, to save memory.
        bf16: autocast to bfloat16.
        torch_compile: compile the blocks with torch.compile.
        peak_flops: FLOP/s of one device, for utilisation; null for what its maker says, or what a matrix product
            reaches on a device that is not known.
        report_to: where else to log, by transformers' names: "tensorboard", "wandb", ...
    """

    max_steps: int = 400
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float = 3e-3
    gate_learning_rate_scale: float = 0.1
    warmup_ratio: float = 0.1
    warmup_start: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    data_seed: int | None = None
    logging_steps: int = 10
    eval_steps: int = 0
    save_steps: int = 200
    save_total_limit: int = 2
    gradient_checkpointing: bool = False
    bf16: bool = False
    torch_compile: bool = False
    peak_flops: float | None = None
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])

    def __post_init__(self) -> None:
        counts = ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps")
        for name in (*counts, "save_total_limit"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name} is {getattr(self, name)}; expected at least 1")
        if self.max_steps >= 2**31:
            raise ValueError(f"training.max_steps is {self.max_steps}; expected below 2**31")
        for name in ("eval_steps", "save_steps", "gate_learning_rate_scale", "weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:  # false for NaN too
                raise ValueError(f"training.{name} is {getattr(self, name)}; expected 0 or more")
        if not 0 <= self.warmup_start <= 1:
            raise ValueError(f"training.warmup_start is {self.warmup_start}; expected from 0 to 1")
        for name in ("warmup_ratio", "adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"training.{name} is {getattr(self, name)}; expected from 0 to below 1")
        for name in ("learning_rate", "adam_epsilon", "peak_flops"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"training.{name} is {getattr(self, name)}; expected above 0")
        for name in ("seed", "data_seed"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < 2**32:
                raise ValueError(f"training.{name} is {getattr(self, name)}; expected from 0 to below 2**32")


@dataclass
class Recipe:
    """A run.

    Args:
        output: folder of the run, made if it does not exist.
        data: the text.
        model: the shape of the model.
        regularizer: the gate regularizer.
        training: the optimisation.
        dense_layers: depths of dense models that are trained before, on the same text and for as long, and reported
            beside it: a gated model says nothing without a dense one of its FLOPs. Empty for none.
    """

    output: str = "runs/default"
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    regularizer: RegularizerSettings = field(default_factory=RegularizerSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    dense_layers: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.output = os.path.expanduser(self.output)
        if not all(num_layers >= 1 for num_layers in self.dense_layers):
            raise ValueError(f"dense_layers is {self.dense_layers}; expected numbers of layers, each at least 1")
        if len(set(self.dense_layers)) < len(self.dense_layers):
            raise ValueError(f"dense_layers is {self.dense_layers}; expected different numbers of layers")
        if (multiple := self.model.pad_vocab_to_multiple_of) < 1:
            raise ValueError(f"model.pad_vocab_to_multiple_of is {multiple}; expected at least 1")

    def build_config(self, vocab_size: int, end_of_text: int | None = None, pad: int | None = None) -> "MidskipConfig":
        """The model's configuration, for a tokenizer of `vocab_size` tokens that pads with the end of text, or with
        `pad`. Raises ValueError as it does."""
        from midskip.model.config import MidskipConfig

        model = asdict(self.model)
        rope = {"rope_type": "default", "rope_theta": model.pop("rope_theta")}
        multiple = model.pop("pad_vocab_to_multiple_of")
        del model["init_from"]
        return MidskipConfig(
            **model,
            vocab_size=-(-vocab_size // multiple) * multiple,
            max_position_embeddings=self.data.length,
            rope_parameters=rope,
            eos_token_id=end_of_text,
            pad_token_id=end_of_text if pad is None else pad,
        )

    def build_regularizer(self) -> "Regularizer":
        """The gate regularizer. Raises ValueError for settings that do not fit."""
        from midskip.model.config import num_skip_units
        from midskip.regularizers import build_regularizer

        num_units = num_skip_units(self.model.num_hidden_layers, self.model.skip_unit)
        return build_regularizer(self.regularizer.name, num_units, **self.regularizer.settings)

    def save(self, path: Path) -> None:
        """Write it as YAML that `read_recipe` reads."""
        from midskip.runs import write_atomically

        write_atomically(path, yaml.safe_dump(asdict(self), sort_keys=False))


GROUPS = {
    "data": DataSettings,
    "model": ModelSettings,
    "regularizer": RegularizerSettings,
    "training": TrainingSettings,
}


def changes(earlier: Recipe, now: Recipe) -> list[str]:
    """The settings that differ, as `group.name: old -> new`; the output folder may have moved, and is not looked at."""
    found = []
    for group in GROUPS:
        old, new = asdict(getattr(earlier, group)), asdict(getattr(now, group))
        found += [f"{group}.{name}: {old[name]!r} -> {new[name]!r}" for name in old if old[name] != new[name]]
    if earlier.dense_layers != now.dense_layers:
        found.append(f"dense_layers: {earlier.dense_layers} -> {now.dense_layers}")
    return found
