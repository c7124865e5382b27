"""What decides a retrofit, checked before anything long begins."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

from midskip.policies import build_policy
from midskip.retrofit.fit import ORDERS
from midskip.retrofit.price import BUDGETS
from midskip.retrofit.shares import DrawnShares
from midskip.train.recipe import TrainingSettings

FEWEST_TOKENS = 2048  # that a calibration needs
CHOICES = {
    "choice": ("tokens", "spans", "exits", "layers"), "order": ORDERS, "skip_unit": ("block", "sublayer"),
    "skip_path": ("linear", "low_rank"), "skipped_kv": ("keep", "drop"), "finetune": ("lora", "all"),
}  # fmt: skip
OF_STAGE = {  # settings that may still change until the stage begins
    "distil": ("distil_steps", "batch_size", "learning_rate", "gate_learning_rate_scale", "seed", "shares"),
    "finetune": ("finetune_steps", "finetune", "finetune_learning_rate", "lora_rank"),
}


@dataclass
class RetrofitSettings:
    """A retrofit.

    Args:
        model: folder or hub name of the pretrained model, a GGUF file, or the folder of a dense run.
        data: text to fit and to train on, as `midskip prepare` takes it.
        validation: held-out text by name, on which budgets are priced; the first is also calibrated on.
        text_field: where .jsonl, .parquet and hub data sets have the text.
        output: folder, made if it does not exist.
        choice: who skips: `"tokens"`, each layer by token; `"spans"`, tokens leave and come back at the mirrored layer
            (`middle_out`); `"exits"`, they leave and never return (`early_exit`); `"layers"`, the same layers for all.
        order: of layers that are left out for all: `"loss"`, `"adjacent"` or `"influence"`, see `fit`.
        skip_unit: what a token skips: `"block"`, or `"sublayer"`.
        skip_path: what it gets instead: `"linear"`, or `"low_rank"`.
        skip_path_rank: of the latter; None for 64.
        skipped_kv: whether keys of skipped tokens are kept.
        outer: first and as many last layers that every token runs; of exits first layers alone.
        first_tokens: of a sequence, which run every layer.
        share: of block-tokens that run as the model is left, without a budget.
        length: tokens of a window; windows follow each other in the text, across documents.
        max_position_embeddings: the longest input, if not the original's.
        fit_tokens: of `data`, on which the fit looks.
        price_tokens: of each held-out text for prices, and as many to calibrate.
        distil_steps: of training; 0 for none.
        batch_size: windows of a step of training.
        learning_rate: of the skip paths.
        gate_learning_rate_scale: of the routers, as a factor of it.
        seed: of the order of windows and shares.
        save_steps: steps between two checkpoints.
        shares: of block-tokens, of which each step of training draws one; with one share alone, the model is trained
            for that budget. None for 0.95, 0.9, 0.83, 0.75, 0.6 and 0.5, as far down as the model can run.
        finetune_steps: of training the original's weights too, after the other training; 0 for none.
        finetune: `"lora"` (low-rank adapters, merged at the end; needs peft) or `"all"` (with a copy of the original
            in memory).
        finetune_learning_rate: of all weights but the routers.
        lora_rank: of adapters.

    Raises:
        ValueError: a value out of range.
    """

    model: str
    data: str
    validation: dict[str, str]
    output: str
    text_field: str = "text"
    choice: str = "tokens"
    order: str = "loss"
    skip_unit: str = "block"
    skip_path: str = "linear"
    skip_path_rank: int | None = None
    skipped_kv: str = "keep"
    outer: int = 1
    first_tokens: int = 2
    share: float = 0.75
    length: int = 512
    max_position_embeddings: int | None = None
    fit_tokens: int = 22_000
    price_tokens: int = 6_144
    distil_steps: int = 0
    batch_size: int = 4
    learning_rate: float = 3e-4
    gate_learning_rate_scale: float = 0.3
    seed: int = 0
    save_steps: int = 100
    shares: list[float] | None = None
    finetune_steps: int = 0
    finetune: str = "lora"
    finetune_learning_rate: float = 1e-4
    lora_rank: int = 16

    def __post_init__(self) -> None:
        self.output = os.path.expanduser(self.output)
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {' or '.join(map(repr, known))}")
        if self.order != "loss" and self.choice != "layers":
            raise ValueError(f"order is {self.order!r} and choice {self.choice!r}; an order is of choice 'layers'")
        if not 0 < self.share < 1:
            raise ValueError(f"share is {self.share!r}; expected a number above 0 and below 1")
        count = self.price_tokens // max(1, self.length)
        if self.length < 2 or count * self.length < FEWEST_TOKENS:
            raise ValueError(
                f"price_tokens is {self.price_tokens}, which holds {count} windows of {self.length} tokens; expected "
                f"windows that hold {FEWEST_TOKENS} tokens or more together"
            )
        if not self.validation:
            raise ValueError("there is no held-out text: give validation, NAME=TEXT")
        for name in ("distil_steps", "finetune_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more")
        if self.finetune_steps and not self.distil_steps:
            raise ValueError(
                f"finetune_steps is {self.finetune_steps} and distil_steps 0; routers have to settle before the other "
                "weights move: give distil_steps too"
            )
        if self.finetune_steps and self.finetune == "lora" and find_spec("peft") is None:
            raise ValueError(
                "finetune is 'lora', which needs peft: pip install 'midskip[lora]', or give finetune 'all'"
            )
        if self.lora_rank < 1:
            raise ValueError(f"lora_rank is {self.lora_rank}; expected at least 1")
        for stage in OF_STAGE:
            self.training(stage)
        if self.shares is not None:
            DrawnShares(1, self.shares, [1.0] * len(self.shares))
        if self.outer < 0 or self.first_tokens < 0:
            raise ValueError(f"outer is {self.outer} and first_tokens {self.first_tokens}; expected 0 or more")

    def changes(self) -> dict[str, Any]:
        """What of the model's configuration is not as the original has it."""
        names = ("skip_path", "skip_path_rank", "skip_unit", "skipped_kv", "max_position_embeddings")
        given = {name: getattr(self, name) for name in names}
        return self.policy() | {name: value for name, value in given.items() if value is not None}

    def policy(self) -> dict[str, Any]:
        """`policy` and `policy_settings` of the model."""
        settings: dict[str, Any] = {"first_tokens": self.first_tokens}
        if self.choice == "spans":
            return {"policy": "middle_out", "policy_settings": {"gates": "hard", "scores": "linear"} | settings}
        settings["router"] = "linear"
        if self.choice == "exits":
            return {"policy": "early_exit", "policy_settings": {"scores": "straight_through"} | settings}
        return {"policy": "independent", "policy_settings": {"outer": self.outer} | settings}

    def stages(self) -> list[str]:
        """That are asked for, in their order."""
        return ["fit", *(stage for stage in OF_STAGE if getattr(self, f"{stage}_steps"))]

    def training(self, stage: str) -> TrainingSettings:
        """The optimisation. With the same layers for all there is nothing to learn about who skips."""
        steps, rate = {
            "distil": (self.distil_steps, self.learning_rate),
            "finetune": (self.finetune_steps, self.finetune_learning_rate),
        }[stage]
        return TrainingSettings(
            max_steps=max(1, steps), per_device_train_batch_size=self.batch_size, learning_rate=rate,
            gate_learning_rate_scale=0.0 if self.choice == "layers" else self.gate_learning_rate_scale,
            warmup_ratio=0.05, save_steps=self.save_steps, save_total_limit=1, report_to=[], seed=self.seed,
        )  # fmt: skip

    def check_layers(self, num_layers: int) -> None:
        """Raises ValueError if a model of so many layers cannot be run at the shares asked for."""
        policy = self.policy()
        build_policy(policy["policy"], num_layers, 1, 0.02, policy["policy_settings"])
        lowest = self.lowest_share(num_layers)
        for name, shares in (("share", [self.share]), ("shares", self.shares or [])):
            if any(share <= lowest for share in shares):
                raise ValueError(
                    f"{name} is {getattr(self, name)}; of {num_layers} layers and {self.length} tokens, outer "
                    f"{self.outer} and first_tokens {self.first_tokens} alone are {lowest:.3f}: raise {name}, or lower "
                    "outer or first_tokens"
                )

    def lowest_share(self, num_layers: int) -> float:
        """Of block-tokens, that run in any case."""
        always = min(1.0, (self.outer if self.choice == "exits" else 2 * self.outer) / num_layers)
        return always + (1 - always) * min(1.0, self.first_tokens / self.length)

    def trained_shares(self, num_layers: int) -> list[float]:
        """Of which each step of training draws one."""
        lowest = self.lowest_share(num_layers)
        return self.shares or [share for share in BUDGETS if share > lowest] or [self.share]

    def changed(self, earlier: dict[str, Any], begun: list[str]) -> list[str]:
        """What differs from the settings that a folder was begun with; those of a stage to come may."""
        free = ["output", "save_steps", "text_field"]  # the texts are compared themselves
        free += [name for stage, names in OF_STAGE.items() if stage not in begun for name in names]
        now = asdict(self)
        names = [name for name in dict.fromkeys([*earlier, *now]) if name not in free]
        return [
            f"{name}: {earlier.get(name)!r} -> {now.get(name)!r}"
            for name in names
            if earlier.get(name) != now.get(name)
        ]
