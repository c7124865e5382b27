"""How far training is: a bar in a terminal, lines elsewhere; a line for each evaluation and each checkpoint."""

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from midskip.data.progress import begin_silence, is_silent, say
from midskip.runs import BEST_FILE, BEST_FOLDER


class ProgressBar(TrainerCallback):
    """Loss, share of block-tokens that ran, tokens a second and time left: a bar in a terminal, else a line every ten
    seconds, and at the end. Evaluations and checkpoints have a line each in both."""

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
        begin_silence()
        self.first_step, self.started_s = state.global_step, time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        recent = self.history[-10:]
        loss, share = (sum(row[name] for row in recent) / len(recent) for name in ("cross_entropy", "executed_share"))
        steps_per_s = (state.global_step - self.first_step) / (time.perf_counter() - self.started_s)
        numbers = f"loss {loss:.3f}, {share:.0%} ran, {steps_per_s * recent[-1]['num_tokens']:,.0f} tokens/s"
        self.bar.update(self.task, completed=state.global_step, numbers=numbers)
        if not self.console.is_terminal and (is_silent() or state.global_step == state.max_steps):
            left_s = (state.max_steps - state.global_step) / steps_per_s
            self._say(state, f"{numbers}, {left_s:.0f} s left")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        best = Path(str(args.output_dir), BEST_FOLDER, BEST_FILE)
        is_best = best.is_file() and json.loads(best.read_text(encoding="utf-8"))["step"] == state.global_step
        kept = f", the best so far: saved in {BEST_FOLDER}" if is_best else ""
        self._say(state, f"held-out loss {metrics['eval_loss']:.4f}, {metrics['eval_executed_share']:.0%} ran{kept}")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._say(state, f"saved checkpoint-{state.global_step}")

    def _say(self, state: TrainerState, text: str) -> None:
        say(self.console, f"{self.title}, step {state.global_step}/{state.max_steps}: {text}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar.stop()
