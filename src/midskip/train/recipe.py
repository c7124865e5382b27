"""A recipe: everything that decides a run, typed, from YAML and the command line."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser

from midskip.config import MidskipConfig
from midskip.controllers import Controller, build_controller


@dataclass
class DataSettings:
    """The text.

    Args:
        source: "pydocs" (built from the running interpreter), a .txt file, or a folder of them.
        vocab_size: tokens of the byte-level BPE tokenizer that is trained on the text.
        length: tokens of a training window, and the longest input of the model.
        validation_share: share of the documents that is held out.
    """

    source: str = "pydocs"
    vocab_size: int = 2048
    length: int = 256
    validation_share: float = 0.05


@dataclass
class ModelSettings:
    """The shape of the model; see MidskipConfig.

    Args:
        hidden_size: width of the hidden states.
        intermediate_size: width of the feed-forward layers.
        num_hidden_layers: blocks.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads; as many as query heads if null.
        norms: "sandwich" (the paper's) or "pre" (Llama's).
        keys: "gated" (a token that skips a layer has no key there) or "all".
        policy: who skips: "middle_out", "dense" or "package.module:Class".
        policy_settings: settings of the policy.
        tie_word_embeddings: one matrix for the embedding and the head.
        initializer_range: standard deviation of the weights at the start.
        rope_theta: base of the rotary embedding.
    """

    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    norms: Literal["sandwich", "pre"] = "sandwich"
    keys: Literal["gated", "all"] = "gated"
    policy: str = "middle_out"
    policy_settings: dict[str, Any] = field(default_factory=dict)
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    rope_theta: float = 10000.0


@dataclass
class ControllerSettings:
    """The gate regulariser; see midskip.build_controller.

    Args:
        name: "none", "budget", one of the paper's ("adaptive", "proportional", ...) or "package.module:Class".
        settings: its settings, for budget {target_share: 0.5}.
    """

    name: str = "none"
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class TrainingSettings:
    """The optimisation.

    Args:
        steps: optimizer steps.
        batch_size: windows in a forward pass.
        accumulation_steps: forward passes in an optimizer step.
        learning_rate: its peak.
        gate_learning_rate_scale: the policy's own learning rate, as a factor of the others'.
        warmup_share: share of the steps in which it rises to the peak; then it falls to 0 on a cosine.
        beta1: AdamW's.
        beta2: AdamW's.
        epsilon: AdamW's.
        weight_decay: AdamW's, on matrices.
        clip_norm: largest norm of the gradient; 0 for no clipping.
        seed: of the weights and of the order of the windows.
        log_steps: steps between two lines of the log.
        evaluation_steps: steps between two evaluations on all held-out text; 0 for one at the end.
        save_steps: steps between two checkpoints; 0 for none but the model at the end.
        gradient_checkpointing: work activations out again in the backward pass, to save memory.
        bf16: autocast to bfloat16.
        report_to: where else to log, by transformers' names: "tensorboard", "wandb", ...
    """

    steps: int = 400
    batch_size: int = 8
    accumulation_steps: int = 1
    learning_rate: float = 3e-3
    gate_learning_rate_scale: float = 0.1
    warmup_share: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    seed: int = 0
    log_steps: int = 10
    evaluation_steps: int = 0
    save_steps: int = 200
    gradient_checkpointing: bool = False
    bf16: bool = False
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation_steps", "log_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name} is {getattr(self, name)}; expected at least 1")
        for name in ("evaluation_steps", "save_steps", "gate_learning_rate_scale", "weight_decay", "clip_norm"):
            if not 0 <= getattr(self, name) < math.inf:  # false for NaN too
                raise ValueError(f"training.{name} is {getattr(self, name)}; expected 0 or more")
        for name in ("warmup_share", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"training.{name} is {getattr(self, name)}; expected from 0 to below 1")
        for name in ("learning_rate", "epsilon"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"training.{name} is {getattr(self, name)}; expected above 0")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"training.seed is {self.seed}; expected from 0 to below 2**32")


@dataclass
class Recipe:
    """A run.

    Args:
        output: folder of the run, made if it does not exist.
        data: the text.
        model: the shape of the model.
        controller: the gate regulariser.
        training: the optimisation.
    """

    output: str = "runs/default"
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    controller: ControllerSettings = field(default_factory=ControllerSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)

    def build_config(self, vocab_size: int, end_of_text: int | None = None) -> MidskipConfig:
        """The model's configuration, for a tokenizer of `vocab_size` tokens. Raises ValueError as it does."""
        model = asdict(self.model)
        rope = {"rope_type": "default", "rope_theta": model.pop("rope_theta")}
        return MidskipConfig(
            **model,
            vocab_size=vocab_size,
            max_position_embeddings=self.data.length,
            rope_parameters=rope,
            eos_token_id=end_of_text,
            pad_token_id=end_of_text,
        )

    def build_controller(self) -> Controller:
        """The gate regulariser. Raises ValueError for settings that do not fit."""
        return build_controller(self.controller.name, self.model.num_hidden_layers, **self.controller.settings)

    def save(self, path: Path) -> None:
        """Write it as YAML that `read_recipe` reads."""
        path.write_text(yaml.safe_dump(asdict(self), sort_keys=False), encoding="utf-8")


def recipe_parser() -> ArgumentParser:
    """The command line of a recipe: a YAML file by --config, single settings by --group.name=value."""
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, default_env=False)
    parser.add_argument("--config", action="config", help="recipe, a YAML file")
    parser.add_class_arguments(Recipe, as_group=False)
    return parser


def read_recipe(path: str | Path | None = None, overrides: list[str] | None = None) -> Recipe:
    """The recipe in a YAML file, with `--group.name=value` overrides.

    Raises:
        ValueError: no such file, not YAML, an unknown setting or one of the wrong type, with its name.
    """
    arguments = [] if path is None else ["--config", str(path)]
    if path is not None and not Path(path).is_file():
        raise ValueError(f"there is no recipe at {str(path)!r}; expected a YAML file")
    parser = recipe_parser()
    try:
        parsed = parser.parse_args(arguments + (overrides or []))
    except Exception as error:  # jsonargparse raises its own kinds for YAML, names and types
        raise ValueError(f"the recipe cannot be used: {error}") from error
    groups = {
        "data": DataSettings,
        "model": ModelSettings,
        "controller": ControllerSettings,
        "training": TrainingSettings,
    }
    given = parsed.as_dict()
    for name in groups:
        if not isinstance(given[name], dict):
            raise ValueError(f"the recipe cannot be used: {name} is {given[name]!r}; expected settings by name")
    return Recipe(given["output"], **{name: group(**given[name]) for name, group in groups.items()})
