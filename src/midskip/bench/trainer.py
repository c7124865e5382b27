"""Whole optimizer steps in the Trainer: batches, gradient norm, AdamW and callbacks included.

Ours run in the `MidskipTrainer` that `midskip train` uses, Llama in transformers' own, with the same optimizer and
arguments. A Trainer runs all its steps at once, so sides take turns stretch by stretch and not step by step.
"""

from __future__ import annotations

import copy
import itertools
import json
import random
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback

from midskip.bench.kernels import attention_by
from midskip.bench.models import Side, compiled
from midskip.bench.tasks import Training, Work
from midskip.bench.timing import Clock
from midskip.data import TokenWindows
from midskip.plugins import check_saved
from midskip.policies import Policy
from midskip.regularizers import Regularizer
from midskip.runs import RECIPE_FILE
from midskip.train.arguments import training_arguments
from midskip.train.checkpoints import REGULARIZER_FILE, find_checkpoint
from midskip.train.optimizer import build_optimizer
from midskip.train.recipe import TrainingSettings
from midskip.train.saved import read_saved_recipe
from midskip.train.trainer import MidskipTrainer

WARM_UP_STEPS, TIMED_STEPS = 2, 8  # of a stretch


def last_regularizer(run: Path, trust: Collection[str] = ()) -> Regularizer | None:
    """That of a run, as in its newest whole checkpoint; None if it kept none.

    Args:
        trust: modules that it may be imported from because the run's recipe says so.

    Raises:
        ValueError: it is from another module, and no installed package offers it.
    """
    checkpoint, _ = find_checkpoint(run)
    if checkpoint is None or not (run / RECIPE_FILE).is_file():
        return None
    recipe = read_saved_recipe(run / RECIPE_FILE)
    check_saved(recipe.regularizer.name, "regularizer", trust, f"the recipe in {str(run)!r}")
    regularizer = recipe.build_regularizer()
    state = (checkpoint / REGULARIZER_FILE).read_text(encoding="utf-8")
    regularizer.load_state_dict(json.loads(state))
    return regularizer


class Unsteered(Regularizer):
    """No term, and gates that stay as they are."""

    def steer(self, policy: Policy) -> None:
        """Leaves hard gates, too, where they were set."""


class Rows(TokenWindows):
    """The rows of one batch, each a window, with positions `stretch` apart if that is not 0."""

    def __init__(self, ids_BT: Tensor, stretch: int):
        super().__init__(list(ids_BT.cpu().numpy()), ids_BT.shape[1])
        self.stretch = stretch

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = super().__getitem__(index)
        if self.stretch:
            window["position_ids"] = index * self.stretch + torch.arange(self.length)
        return window


class _Marks(TrainerCallback):
    """The end of every step."""

    def __init__(self, clock: Clock):
        self.clock, self.marks = clock, []

    def on_step_end(self, *arguments: Any, **more: Any) -> None:
        self.marks.append(self.clock.end())


class TrainerSteps(Training):
    """Some optimizer steps on one batch.

    Args:
        ids_BT: int64, the batch.
        regularizer: of a trained model; None: its gates stay as they are.
        torch_compile: as in `BenchSettings`.
    """

    name = "trainer"

    def __init__(self, ids_BT: Tensor, regularizer: Regularizer | None = None, torch_compile: bool = False):
        super().__init__(ids_BT, TIMED_STEPS)
        self.regularizer, self.torch_compile = regularizer, torch_compile

    @property
    def num_units(self) -> int:
        return WARM_UP_STEPS + TIMED_STEPS

    def begin(self, side: Side) -> Callable[[int], Any]:
        """The first step is the whole stretch, and gives the seconds of its timed steps; the others do nothing."""
        trainer, marks, folder = self._trainer(side)

        def run(step: int) -> list[float] | None:
            if step:
                return None
            with folder, attention_by(side.attention):
                trainer.train()
            marks.clock.wait()
            pairs = itertools.pairwise(marks.marks[WARM_UP_STEPS - 1 :])
            return [marks.clock.seconds(*pair) for pair in pairs]

        return run

    def time(
        self, sides: Sequence[Side], repeats: int, order: random.Random, device: str, tick: Callable[[], None]
    ) -> dict[str, list[list[float]]]:
        seconds: dict[str, list[list[float]]] = {side.name: [] for side in sides}
        for _ in range(repeats):
            for side in order.sample(sides, len(sides)):
                seconds[side.name].append(self.begin(side)(0))
                tick()
        return seconds

    def peak_bytes(self, side: Side, device: str) -> int | None:
        return None  # AdamW's numbers apart, that of `Training`

    def work(self, side: Side) -> Work:
        work = super().work(side)
        return replace(work, flops=work.flops * TIMED_STEPS)

    def _trainer(self, side: Side) -> tuple[Trainer, _Marks, tempfile.TemporaryDirectory[str]]:
        """A Trainer of a copy of the side's model: in float32, as its weights are kept where products are rounded."""
        settings = TrainingSettings(
            max_steps=WARM_UP_STEPS + TIMED_STEPS, per_device_train_batch_size=self.batch_size,
            warmup_ratio=0.0, learning_rate=1e-6,
            logging_steps=WARM_UP_STEPS + TIMED_STEPS, save_steps=0, report_to=[],
            bf16=side.model.dtype == torch.bfloat16,
        )  # fmt: skip
        model = copy.deepcopy(side.model).float()
        if self.torch_compile:
            compiled(model)
        folder = tempfile.TemporaryDirectory()
        arguments = training_arguments(settings, Path(folder.name))
        marks = _Marks(Clock(model.device))
        common: dict[str, Any] = {"model": model, "args": arguments, "train_dataset": Rows(self.ids_BT, side.stretch)}
        if side.is_ours:
            regularizer = copy.deepcopy(self.regularizer)
            if regularizer is None or side.skip_share is not None or model.config.policy == "dense":
                regularizer = Unsteered(model.config.num_skip_units)
            tokenizer: Any = None  # nothing is saved
            trainer: Trainer = MidskipTrainer(regularizer, settings, lambda model: {}, tokenizer, 1.0, **common)
        else:
            arguments.max_grad_norm = settings.max_grad_norm
            trainer = Trainer(optimizers=(build_optimizer(model, settings), None), **common)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(marks)
        return trainer, marks, folder
