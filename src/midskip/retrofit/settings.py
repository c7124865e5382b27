"""What decides a retrofit, checked before anything long begins."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from midskip.policies import build_policy
from midskip.retrofit.price import BUDGETS
from midskip.retrofit.shares import DrawnShares
from midskip.train.recipe import TrainingSettings

FEWEST_TOKENS = 2048  # that a calibration needs
CHOICES = {
    "choice": ("tokens", "layers"), "skip_unit": ("block", "sublayer"), "skip_path": ("linear", "low_rank"),
    "skipped_kv": ("keep", "drop"),
}  # fmt: skip
OF_DISTILLING = ("distil_steps", "batch_size", "learning_rate", "gate_learning_rate_scale", "seed", "shares")


@dataclass
class RetrofitSettings:
    """A retrofit.

    Args:
        model: folder or hub name of the pretrained model, a GGUF file, or the folder of a dense run.
        data: text to fit and to train on, as `midskip prepare` takes it.
        validation: held-out text by name, on which budgets are priced; the first is also calibrated on.
        output: folder, made if it does not exist.
        choice: who skips: `"tokens"`, each layer by token, or `"layers"`, the same layers for all.
        skip_unit: what a token skips: `"block"`, or `"sublayer"`.
        skip_path: what it gets instead: `"linear"`, or `"low_rank"`.
        skip_path_rank: of the latter; None for 64.
        skipped_kv: whether keys of skipped tokens are kept.
        outer: first and as many last layers that every token runs.
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
        shares: of block-tokens, of which each step of training draws one.

    Raises:
        ValueError: a value out of range.
    """

    model: str
    data: str
    validation: dict[str, str]
    output: str
    choice: str = "tokens"
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
    shares: list[float] = field(default_factory=lambda: list(BUDGETS))

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {' or '.join(map(repr, known))}")
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
        if self.distil_steps < 0:
            raise ValueError(f"distil_steps is {self.distil_steps}; expected 0 or more")
        self.training()
        DrawnShares(1, self.shares, [1.0] * len(self.shares))
        if self.outer < 0 or self.first_tokens < 0:
            raise ValueError(f"outer is {self.outer} and first_tokens {self.first_tokens}; expected 0 or more")

    def policy_settings(self) -> dict[str, Any]:
        """Of the policy `independent`."""
        return {"router": "linear", "outer": self.outer, "first_tokens": self.first_tokens}

    def training(self) -> TrainingSettings:
        """The optimisation. With the same layers for all there is nothing to learn about who skips."""
        return TrainingSettings(
            max_steps=max(1, self.distil_steps), per_device_train_batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            gate_learning_rate_scale=self.gate_learning_rate_scale if self.choice == "tokens" else 0.0,
            warmup_ratio=0.05, save_steps=self.save_steps, save_total_limit=1, report_to=[], seed=self.seed,
        )  # fmt: skip

    def check_layers(self, num_layers: int) -> None:
        """Raises ValueError if a model of so many layers cannot be left with this share."""
        build_policy("independent", num_layers, 1, 0.02, self.policy_settings())
        if self.share <= 2 * self.outer / num_layers:
            raise ValueError(
                f"share is {self.share} and outer {self.outer} of {num_layers} layers, which alone are more: raise "
                "share or lower outer"
            )

    def changed(self, earlier: dict[str, Any], has_distilled: bool) -> list[str]:
        """What differs from the settings that a folder was begun with; those of a stage to come may."""
        free = ("output", "save_steps", *(() if has_distilled else OF_DISTILLING))
        now = asdict(self)
        names = [name for name in dict.fromkeys([*earlier, *now]) if name not in free]
        return [
            f"{name}: {earlier.get(name)!r} -> {now.get(name)!r}"
            for name in names
            if earlier.get(name) != now.get(name)
        ]
