"""The objective and what happens around each optimizer step, on transformers.Trainer.

B sequences, T columns, L layers.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from midskip.data import TokenWindows, WindowOrder
from midskip.data.labelled import TrainingItems
from midskip.distributed import sum_over_ranks
from midskip.model.loss import IGNORED, next_targets
from midskip.model.modeling import MidskipForCausalLM
from midskip.regularizers import Regularizer
from midskip.runs import BEST_FILE, BEST_FOLDER, save_whole, write_atomically
from midskip.train.checkpoints import HISTORY_FILE, REGULARIZER_FILE, mark_complete, remove_old
from midskip.train.fsdp import whole_state
from midskip.train.health import Health
from midskip.train.optimizer import build_optimizer, build_scheduler, follow_settings, num_warmup_steps
from midskip.train.recipe import TrainingSettings
from midskip.train.record import Profiler, StepRecord

WHAT_TO_DO = "lower the learning rate or clip; a checkpoint from before, if there is one, is kept"


class MidskipTrainer(Trainer):
    """Cross-entropy plus the regularizer's term in training, cross-entropy alone in evaluation.

    Args:
        regularizer: the gate regularizer; it is updated after each optimizer step from the gates of the whole step.
        settings: the optimisation.
        measure: called by `evaluate` on all ranks, gives the metrics of the model on all held-out text.
        tokenizer: saved beside the best model; None if the data is no text.
        peak_flops: of one device in a second, for utilisation.
        arguments: those of `transformers.Trainer`.

    Attributes:
        history: a row a step; see `_AroundStep`.
    """

    def __init__(
        self,
        regularizer: Regularizer,
        settings: TrainingSettings,
        measure: Callable[[MidskipForCausalLM], dict[str, Any]],
        tokenizer: PreTrainedTokenizerBase | None,
        peak_flops: float,
        **arguments: Any,
    ):
        self.settings = settings
        super().__init__(**arguments)
        self.model_accepts_loss_kwargs = False  # `compute_loss` gives the mean of a pass
        self.regularizer, self.measure, self.tokenizer, self.peak_flops = regularizer, measure, tokenizer, peak_flops
        self.step = StepRecord()
        self.history: list[dict[str, Any]] = []
        self._measured: tuple[int, dict[str, Any]] | None = None  # the step, and what was measured after it
        self._num_passes, self._pass = 1, 0  # over a batch, under different scales of the scores
        self.add_callback(_AroundStep(self))

    @property
    def bare_model(self) -> MidskipForCausalLM:
        """The model without what accelerate wrapped around it."""
        return self.accelerator.unwrap_model(self.model)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """A pass over the batch under each scale of the scores that the regularizer asks for, and their mean loss."""
        score_scales, policy = self.regularizer.score_scales, self.bare_model.model.policy
        if score_scales == (1.0,):
            return super().training_step(model, inputs, num_items_in_batch)
        before, losses = (policy.score_scale, policy.max_layers), []
        self._num_passes = len(score_scales)
        try:
            for self._pass, score_scale in enumerate(score_scales):
                policy.set_limits(score_scale)  # ValueError for a policy that is not adjustable
                policy.is_observing = self._pass == self._num_passes - 1
                losses.append(super().training_step(model, inputs, num_items_in_batch))
        finally:
            policy.set_limits(*before)
            policy.is_observing, self._num_passes, self._pass = True, 1, 0
        return torch.stack(losses).sum()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of one forward pass, as a part of the mean over those of its batch; the Trainer divides it by the
        batches of a step, on this rank and on all."""
        outputs = model(**inputs, output_logits=return_outputs)
        loss = outputs.loss
        if not model.training:
            return (loss, outputs) if return_outputs else loss
        valid_BT = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
        regularizer = self.regularizer.loss(outputs.gates, valid_BT)
        auxiliary = 0 * regularizer if outputs.auxiliary_loss is None else outputs.auxiliary_loss
        if num_items_in_batch is not None:  # passes of the step have other numbers of targets
            num_passes = self.current_gradient_accumulation_steps * self.args.world_size
            weight = _num_targets(inputs) * num_passes / num_items_in_batch
            loss, auxiliary = loss * weight, auxiliary * weight
        if self._pass == self._num_passes - 1:
            self.step.add(loss, regularizer, auxiliary, outputs.gates, outputs.executed, valid_BT)
        total = (loss + regularizer) / self._num_passes + auxiliary  # which is of the last pass alone
        return (total, outputs) if return_outputs else total

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The batches of a step and, of labelled data, the targets in all of them, on all ranks. Windows of text have
        equally many."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches or not isinstance(self.train_dataset, TrainingItems):
            return batches, None
        count = torch.stack([_num_targets(batch) for batch in batches]).sum().to(self.args.device)
        sum_over_ranks(count)
        return batches, count.clamp(min=1)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """See `build_optimizer`."""
        if self.optimizer is None:
            wrapped: Any = self.model if model is None else model
            self.optimizer = build_optimizer(wrapped, self.settings)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """See `build_scheduler`."""
        if self.lr_scheduler is None:
            used: Any = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = build_scheduler(used, self.settings)
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> WindowOrder:
        windows: Any = self.train_dataset
        assert isinstance(windows, TokenWindows | TrainingItems)
        settings = self.settings
        per_device = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
        num_samples = settings.max_steps * per_device * self.args.world_size
        seed = settings.seed if settings.data_seed is None else settings.data_seed
        return WindowOrder(len(windows), num_samples, seed)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """To the reporters alone: what the run keeps is in its history, not in each checkpoint again."""
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """The metrics of `measure` on all held-out text, the regularizer never among them."""
        result = self.metrics()
        self.keep_best(result["loss"])
        metrics = {f"{metric_key_prefix}_{name}": float(v) for name, v in result.items() if isinstance(v, int | float)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def metrics(self) -> dict[str, Any]:
        """What `measure` gives after the step that was taken last; measured once, also where a run ends with it."""
        if self._measured is None or self._measured[0] != self.state.global_step:
            self._measured = self.state.global_step, self.measure(self.bare_model)
        return self._measured[1]

    def keep_best(self, loss: float) -> None:
        """Save the model, weights alone, if no evaluation was better; each file is replaced as a whole."""
        best = Path(str(self.args.output_dir)) / BEST_FOLDER
        earlier = json.loads((best / BEST_FILE).read_text())["loss"] if (best / BEST_FILE).is_file() else math.inf
        if not loss < earlier:
            return
        self.check_weights()
        state = whole_state(self)
        if self.args.should_save:
            save_whole(best, self.bare_model, self.tokenizer, state_dict=state)
            write_atomically(best / BEST_FILE, json.dumps({"step": self.state.global_step, "loss": loss}))

    def check_weights(self) -> None:
        """FloatingPointError if a weight is not finite."""
        finite = [parameter.detach().isfinite().all() for parameter in self.bare_model.parameters()]
        if not all(bool(one.full_tensor() if isinstance(one, DTensor) else one) for one in finite):
            raise FloatingPointError(f"a weight is no longer finite after step {self.state.global_step}: {WHAT_TO_DO}")


def _num_targets(batch: dict[str, Tensor]) -> Tensor:
    """int64 []: labels that count: each is predicted by the token before it, and neither is a pad."""
    labels_BT = batch["labels"]
    valid_BT = batch.get("attention_mask", torch.ones_like(labels_BT)).bool()
    return (next_targets(labels_BT, valid_BT) != IGNORED).sum()


class _AroundStep(TrainerCallback):
    """Stops before a step that is not finite, updates the regularizer, keeps the history, completes checkpoints."""

    def __init__(self, trainer: MidskipTrainer):
        self.trainer, self.folder = trainer, Path(str(trainer.args.output_dir))
        self.gradient_norm = math.nan

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._steer()
        follow_settings(self.trainer.lr_scheduler, self.trainer.settings)  # pyright: ignore[reportArgumentType]
        state.compute_steps(args, state.max_steps)  # of saving and evaluating, likewise
        earlier_s = self.trainer.history[-1]["seconds"] if self.trainer.history else 0.0
        self.started_s = time.perf_counter() - earlier_s
        self.resumed_s = time.perf_counter()
        self.profiler = Profiler(self.trainer.bare_model)  # now that it is wrapped for several devices
        self.rows: list[dict[str, Any]] = []  # since the last log
        self.health = Health(num_warmup_steps(self.trainer.settings), self.trainer.history)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.profiler.norms = (state.global_step + 1) % args.logging_steps == 0
        self.profiler.__enter__()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = self.trainer.step
        self.profiler.__exit__()
        self.profiler.update(step)
        step.reduce()
        parameters = self.trainer.model.parameters()  # pyright: ignore[reportOptionalMemberAccess]
        norm = nn.utils.clip_grad_norm_(parameters, self.trainer.settings.max_grad_norm or math.inf)
        self.gradient_norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        if not math.isfinite(step.cross_entropy + step.regularizer + step.auxiliary + self.gradient_norm):
            raise FloatingPointError(
                f"step {state.global_step + 1} is not finite (cross-entropy {step.cross_entropy:.4g}, regularizer "
                f"{step.regularizer:.4g}, the policy's own loss {step.auxiliary:.4g}, norm of the gradient "
                f"{self.gradient_norm:.4g}), so it was not taken: {WHAT_TO_DO}"
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self.trainer
        step, trainer.step = trainer.step, StepRecord()
        share_L = step.share_by_layer()
        mean_L, variance_L = step.statistics.mean("gate"), step.statistics.variance("gate")
        expected_share = trainer.regularizer.expected_share
        trainer.bare_model.model.policy.absorb()
        trainer.regularizer.update(mean_L.float(), variance_L.float(), share_L.float())
        self._steer()
        now_s = time.perf_counter()
        row = {
            "step": state.global_step,
            "cross_entropy": step.cross_entropy,
            "regularizer": step.regularizer,
            "auxiliary": step.auxiliary,
            "total": step.cross_entropy + step.regularizer + step.auxiliary,
            "gradient_norm": self.gradient_norm,
            "executed_share": share_L.mean().item(),
            "share_by_layer": share_L.tolist(),
            "gate_mean_by_layer": mean_L.tolist(),
            "gate_variance_by_layer": variance_L.tolist(),
            "num_tokens": step.num_tokens,
            "flops": step.flops,
            "step_seconds": now_s - self.resumed_s,
            "seconds": now_s - self.started_s,
        }
        if expected_share is not None:
            row["expected_share"] = expected_share
        self.rows.append(row)
        if state.global_step % args.logging_steps == 0:
            row.update(self._at_log(step))
            trainer.log(self._curves(row))
            self.rows = []
        trainer.history.append(row)
        was_well = not self.health.signs
        self.health.add(row)
        if state.is_world_process_zero:
            if was_well and self.health.signs:
                warnings.warn(self.health.warning(trainer.bare_model.model.policy.is_hard), stacklevel=2)
            with (self.folder / HISTORY_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        self.resumed_s = time.perf_counter()

    def _at_log(self, step: StepRecord) -> dict[str, Any]:
        """Work and speed, and the norms around the blocks, which are looked at when logging alone."""
        rate = sum(row["num_tokens"] for row in self.rows) / sum(row["step_seconds"] for row in self.rows)
        flops_per_token = step.flops / step.num_tokens
        sums = step.statistics.sums()
        norms = {
            f"{name}_by_layer": [total / count if count else None for count, total in sums[name][:2].T.tolist()]
            for name in ("norm_in", "norm_out")
        }
        return norms | {
            "tokens_per_s": rate,
            "flops_per_token": flops_per_token,
            "utilisation": rate * flops_per_token / (self.trainer.peak_flops * self.trainer.args.world_size),
        }

    def _curves(self, row: dict[str, Any]) -> dict[str, float]:
        """A row as numbers by name, those by layer as `name/layer_00`, with the regularizer's beside them."""
        rates = {
            f"learning_rate/{group['name']}": group["lr"]
            for group in self.trainer.lr_scheduler.optimizer.param_groups  # pyright: ignore[reportOptionalMemberAccess]
        }
        means = {
            name: sum(recent[name] for recent in self.rows) / len(self.rows)
            for name in (
                "cross_entropy",
                "regularizer",
                "auxiliary",
                "total",
                "executed_share",
                "gradient_norm",
                "step_seconds",
            )
        }
        by_layer = {name.removesuffix("_by_layer"): row[name] for name in row if name.endswith("_by_layer")}
        by_layer |= {name: values_L.tolist() for name, values_L in self.trainer.regularizer.curves().items()}
        curves = {
            f"{name}/layer_{layer:02}": value
            for name, values in by_layer.items()
            for layer, value in enumerate(values)
            if value is not None
        }
        speed = {name: row[name] for name in ("tokens_per_s", "flops_per_token", "utilisation")}
        return means | rates | speed | curves

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.resumed_s = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.check_weights()
        self.trainer.accelerator.wait_for_everyone()  # each rank wrote its random state
        if args.should_save:
            checkpoint = self.folder / f"checkpoint-{state.global_step}"
            write_atomically(checkpoint / REGULARIZER_FILE, json.dumps(self.trainer.regularizer.state_dict()))
            mark_complete(checkpoint)
            remove_old(self.folder, self.trainer.settings.save_total_limit)
        self.resumed_s = time.perf_counter()

    def _steer(self) -> None:
        self.trainer.regularizer.steer(self.trainer.bare_model.model.policy)
