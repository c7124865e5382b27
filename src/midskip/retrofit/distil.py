"""A model that skips, trained towards the original.

B sequences, T columns, N valid tokens, V vocabulary.
"""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import PrinterCallback, set_seed

from midskip.data import TokenWindows
from midskip.model.loss import divergence
from midskip.model.modeling import MidskipForCausalLM
from midskip.report import print_line
from midskip.retrofit.learning import Original, learning
from midskip.retrofit.shares import DrawnShares
from midskip.train.arguments import training_arguments
from midskip.train.checkpoints import HISTORY_FILE, REGULARIZER_FILE, history_until, newest_checkpoint, step_of
from midskip.train.progress import ProgressBar
from midskip.train.recipe import TrainingSettings
from midskip.train.trainer import MidskipTrainer


class Distiller(MidskipTrainer):
    """Its loss is the divergence (Kullback and Leibler's) of the predictions from those of the original."""

    original: Original

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        given = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        valid_BT = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
        with torch.no_grad(), self.original() as original:
            target_BTV = original(**given, use_cache=False).logits
        outputs = model(**given, use_cache=False)
        logits_NV, target_NV = (
            x_BTV.flatten(0, 1) if valid_BT is None else x_BTV[valid_BT] for x_BTV in (outputs.logits, target_BTV)
        )
        loss = divergence(logits_NV, target_NV).mean()
        nothing = 0 * loss.detach()
        self.step.add(loss, nothing, nothing, outputs.gates, outputs.executed, valid_BT)
        return (loss, outputs) if return_outputs else loss


def distil(
    model: MidskipForCausalLM,
    windows: TokenWindows,
    folder: Path,
    settings: TrainingSettings,
    shares: DrawnShares,
    console: Console | None = None,
    trainable: str = "skips",
    lora_rank: int = 16,
) -> list[dict[str, Any]]:
    """Train `model` in place. As long as only skip paths and the policy learn, the model in which every token runs
    every layer stays the same to the last bit.

    Args:
        windows: text for training.
        folder: of checkpoints, from the newest of which it goes on.
        settings: the optimisation.
        shares: of block-tokens, of which one is drawn a step.
        console: where progress is shown.
        trainable, lora_rank: what is trained, see `learning`.

    Returns:
        The history, a row a step; `cross_entropy` in it is the divergence. Its `flops` are not to be used: they count
        the pass of the original as if it went backward too, and not at all if that is a copy.

    Raises:
        FloatingPointError: the loss or a weight is no longer finite.
    """
    console = console or Console(stderr=True)
    arguments = training_arguments(settings, folder)
    checkpoint = newest_checkpoint(folder, partial(print_line, console))
    if checkpoint is not None:
        shares.load_state_dict(json.loads((checkpoint / REGULARIZER_FILE).read_text(encoding="utf-8")))
    set_seed(settings.seed)  # adapters are drawn
    with learning(model, trainable, lora_rank) as original:
        trainer = Distiller(
            shares, settings, lambda model: {}, None, math.inf, model=model, args=arguments, train_dataset=windows
        )  # no utilisation: FLOPs of the original are not known
        trainer.original = original
        trainer.history += history_until(folder / HISTORY_FILE, 0 if checkpoint is None else step_of(checkpoint))
        trainer.remove_callback(PrinterCallback)
        progress = ProgressBar("training", trainer.history, console)
        trainer.add_callback(progress)
        try:
            if checkpoint is None or step_of(checkpoint) < settings.max_steps:  # else the Trainer would add a step
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            else:
                trainer._load_from_checkpoint(str(checkpoint))
        finally:
            progress.bar.stop()
        trainer.check_weights()
    return trainer.history
