"""The objective and what happens around each optimizer step, on transformers.Trainer.

B sequences, T columns, L layers.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from midskip.controllers import Controller
from midskip.statistics import LayerStatistics

CONTROLLER_FILE = "controller.json"  # in a checkpoint; written last, it marks the checkpoint as complete
HISTORY_FILE = "history.jsonl"  # in the run folder, a line a step


class MidskipTrainer(Trainer):
    """Cross-entropy plus the controller's term in training, cross-entropy alone in evaluation.

    Args:
        controller: the gate regulariser; it is updated after each optimizer step from the gates of the whole step.
        measure: called by `evaluate`, gives the metrics of the model on all held-out text.
        arguments: those of `transformers.Trainer`.
    """

    def __init__(self, controller: Controller, measure: Callable[[nn.Module], dict[str, float]], **arguments: Any):
        super().__init__(**arguments)
        self.controller, self.measure = controller, measure
        self.step = StepRecord()
        self.history: list[dict[str, Any]] = []
        self.add_callback(_AfterStep(self))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of one forward pass; the Trainer divides it by the passes of a step."""
        outputs = model(**inputs)
        if not model.training:
            return (outputs.loss, outputs) if return_outputs else outputs.loss
        valid_BT = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
        regulariser = self.controller.loss(outputs.gates, valid_BT)
        self.step.add(outputs.loss, regulariser, outputs.gates, valid_BT)
        total = outputs.loss + regulariser
        if not math.isfinite(total.item()):
            raise FloatingPointError(
                f"the loss is {total.item()} in step {self.state.global_step + 1} (cross-entropy "
                f"{outputs.loss.item():.4g}, regulariser {regulariser.item():.4g}): lower the learning rate or clip; "
                "the last checkpoint is kept"
            )
        return (total, outputs) if return_outputs else total

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """The metrics of `measure` on all held-out text, the regulariser never among them."""
        metrics = {
            f"{metric_key_prefix}_{name}": value
            for name, value in self.measure(self.accelerator.unwrap_model(self.model)).items()
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def check_weights(self) -> None:
        """FloatingPointError if a weight is not finite: a gradient that overflows shows in no loss of its own step."""
        model = self.accelerator.unwrap_model(self.model)
        if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
            raise FloatingPointError(
                f"a weight is no longer finite after step {self.state.global_step}: lower the learning rate or clip; "
                "the last checkpoint is kept"
            )

    def steer(self) -> None:
        """Let the controller set what the policy leaves to it."""
        self.controller.steer(self.accelerator.unwrap_model(self.model).model.policy)


class StepRecord:
    """What is known of one optimizer step: the parts of its loss and its gates, over all its forward passes."""

    def __init__(self) -> None:
        self.cross_entropy: list[float] = []
        self.regulariser: list[float] = []
        self.statistics = LayerStatistics()
        self.num_tokens = 0

    def add(self, cross_entropy: Tensor, regulariser: Tensor, gates_LBT: Tensor, valid_BT: Tensor | None) -> None:
        self.cross_entropy.append(cross_entropy.item())
        self.regulariser.append(regulariser.item())
        self.statistics.add_gates(gates_LBT.detach(), valid_BT=valid_BT)
        self.num_tokens += gates_LBT[0].numel() if valid_BT is None else int(valid_BT.sum())

    def losses(self) -> tuple[float, float]:
        """Cross-entropy and regulariser, each the mean over the passes."""
        return sum(self.cross_entropy) / len(self.cross_entropy), sum(self.regulariser) / len(self.regulariser)

    def share_by_layer(self) -> Tensor:
        """Share of the valid tokens that was present, [L]."""
        return 1 - self.statistics.mean("skipped")


class _AfterStep(TrainerCallback):
    """Updates the controller, keeps the history, and saves the controller with each checkpoint, as its last file."""

    def __init__(self, trainer: MidskipTrainer):
        self.trainer, self.folder = trainer, Path(str(trainer.args.output_dir))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.steer()
        earlier_s = self.trainer.history[-1]["seconds"] if self.trainer.history else 0.0
        self.started_s = time.perf_counter() - earlier_s

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step, self.trainer.step = self.trainer.step, StepRecord()
        share_L = step.share_by_layer()
        mean_L, variance_L = step.statistics.mean("gate"), step.statistics.variance("gate")
        self.trainer.controller.update(mean_L.float(), variance_L.float(), share_L.float())
        self.trainer.steer()
        cross_entropy, regulariser = step.losses()
        row = {
            "step": state.global_step,
            "cross_entropy": cross_entropy,
            "regulariser": regulariser,
            "total": cross_entropy + regulariser,
            "executed_share": share_L.mean().item(),
            "share_by_layer": share_L.tolist(),
            "gate_mean_by_layer": mean_L.tolist(),
            "num_tokens": step.num_tokens,
            "seconds": time.perf_counter() - self.started_s,
        }
        self.trainer.history.append(row)
        with (self.folder / HISTORY_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if state.global_step % args.logging_steps == 0:
            self.trainer.log({name: row[name] for name in ("cross_entropy", "regulariser", "total", "executed_share")})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.check_weights()
        marker = self.folder / f"checkpoint-{state.global_step}" / CONTROLLER_FILE
        part = marker.with_suffix(".part")  # renamed when whole
        part.write_text(json.dumps(self.trainer.controller.state_dict()), encoding="utf-8")
        part.replace(marker)


class ProgressBar(TrainerCallback):
    """Loss, share of block-tokens that ran, tokens a second and time left: a bar in a terminal, else lines."""

    def __init__(self, title: str, history: list[dict[str, Any]], console: Console):
        self.title, self.history, self.console = title, history, console
        columns = "[bold]{task.description}", "{task.completed:.0f}/{task.total:.0f} steps", "{task.fields[numbers]}"
        self.bar = Progress(
            TextColumn(columns[0]), BarColumn(bar_width=20), TextColumn(columns[1]), TextColumn(columns[2]),
            TimeRemainingColumn(), console=console, disable=not console.is_terminal,
        )  # fmt: skip

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar.start()
        self.task = self.bar.add_task(escape(self.title), total=state.max_steps, numbers="")
        self.first_step, self.started_s = state.global_step, time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        recent = self.history[-10:]
        loss, share = (sum(row[name] for row in recent) / len(recent) for name in ("cross_entropy", "executed_share"))
        steps_per_s = (state.global_step - self.first_step) / (time.perf_counter() - self.started_s)
        numbers = f"loss {loss:.3f}, {share:.0%} ran, {steps_per_s * recent[-1]['num_tokens']:,.0f} tokens/s"
        self.bar.update(self.task, completed=state.global_step, numbers=numbers)
        if not self.console.is_terminal and (
            state.global_step % (10 * args.logging_steps) == 0 or state.global_step == state.max_steps
        ):
            left_s = (state.max_steps - state.global_step) / steps_per_s
            progress = f"step {state.global_step}/{state.max_steps}: {numbers}, {left_s:.0f} s left"
            self.console.print(f"{escape(self.title)}, {progress}", highlight=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar.stop()
