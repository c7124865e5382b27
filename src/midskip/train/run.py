"""One run, from text to a folder with a model, its numbers, its picture and its page."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PrinterCallback, TrainingArguments, set_seed
from transformers.integrations.integration_utils import get_available_reporting_integrations

from midskip.data import (
    TokenWindows,
    encode_documents,
    load_documents,
    split_documents,
    token_bytes,
    train_tokenizer,
)
from midskip.evaluate import depth_of_tokens, evaluate
from midskip.model import MidskipForCausalLM
from midskip.report import write_page, write_picture
from midskip.runs import PAGE_FILE, PICTURE_FILE, RECIPE_FILE, REPORT_FILE
from midskip.train.recipe import DataSettings, Recipe, TrainingSettings, read_recipe
from midskip.train.trainer import CONTROLLER_FILE, HISTORY_FILE, MidskipTrainer, ProgressBar

# The Trainer goes on without any of these, from other numbers and in silence.
CHECKPOINT_PARTS = ("model*.safetensors", "optimizer*", "scheduler.pt", "trainer_state.json", "rng_state*.pth")


@dataclass
class PreparedData:
    """Text ready to train on."""

    tokenizer: PreTrainedTokenizerBase
    training: TokenWindows
    validation: TokenWindows
    token_bytes: torch.Tensor


def prepare_data(
    settings: DataSettings, progress: bool = True, tokenizer: PreTrainedTokenizerBase | None = None
) -> PreparedData:
    """Load the text, hold some out, train a tokenizer on the rest (unless one is given), cut it into windows.

    Raises:
        DataError: no text, or not enough of it.
    """
    training, validation = split_documents(load_documents(settings.source, progress), settings.validation_share)
    tokenizer = tokenizer or train_tokenizer(training, settings.vocab_size)
    return PreparedData(
        tokenizer,
        TokenWindows(encode_documents(tokenizer, training, progress), settings.length),
        TokenWindows(encode_documents(tokenizer, validation, progress), settings.length, drop_last=False),
        token_bytes(tokenizer),
    )


def train(
    recipe: Recipe,
    resume: bool = False,
    data: PreparedData | None = None,
    title: str = "training",
    console: Console | None = None,
) -> dict[str, Any]:
    """Train what the recipe says and write its folder; returns what is in `report.json`.

    Args:
        resume: go on from the newest complete checkpoint in the folder; a run that is finished stays as it is.
        data: what `prepare_data` gave for `recipe.data`, if it is already there.
        title: of the progress bar.

    Raises:
        ValueError: something in the recipe, the text or the folder does not fit; found before training starts.
        FloatingPointError: the loss or a weight is no longer finite.
    """
    console = console or Console(stderr=True)
    folder = Path(recipe.output)
    _check_folder(folder, recipe, resume)
    if (folder / PAGE_FILE).is_file():  # written last: the run is finished
        return json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
    checkpoint = _newest_checkpoint(folder)
    first_step = 0 if checkpoint is None else _step_of(checkpoint)
    controller = recipe.build_controller()
    if checkpoint is not None:
        controller.load_state_dict(json.loads((checkpoint / CONTROLLER_FILE).read_text(encoding="utf-8")))
    recipe.build_config(vocab_size=2)  # what is wrong with the shape is found before the text is read
    _check_reporters(recipe.training.report_to)
    if data is None:
        tokenizer = None if checkpoint is None else AutoTokenizer.from_pretrained(folder)
        data = prepare_data(recipe.data, console.is_terminal, tokenizer)
    set_seed(recipe.training.seed)
    trained = checkpoint is not None and first_step == recipe.training.steps
    model = (
        MidskipForCausalLM.from_pretrained(checkpoint)
        if trained
        else MidskipForCausalLM(recipe.build_config(len(data.tokenizer), _end_of_text(data.tokenizer)))
    )
    controller.steer(model.model.policy)
    if recipe.training.gradient_checkpointing:
        # transformers 5.23 renamed it and warns of the old name
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()

    def measure(module: nn.Module) -> dict[str, float]:
        metrics = evaluate(module, data.validation, data.token_bytes, recipe.training.batch_size)  # pyright: ignore[reportArgumentType]
        return {name: value for name, value in metrics.items() if not isinstance(value, list)}

    trainer = MidskipTrainer(
        controller,
        measure,
        model=model,
        args=_arguments(recipe.training, folder),
        train_dataset=data.training,
        eval_dataset=data.validation,
        optimizers=(build_optimizer(model, recipe.training), None),
    )
    trainer.remove_callback(PrinterCallback)
    progress = ProgressBar(title, trainer.history, console)
    trainer.add_callback(progress)
    folder.mkdir(parents=True, exist_ok=True)
    recipe.save(folder / RECIPE_FILE)
    data.tokenizer.save_pretrained(folder)
    trainer.history += _history_until(folder / HISTORY_FILE, first_step)
    if not trained:  # the Trainer would add a step
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            progress.bar.stop()
        trainer.check_weights()
    model.save_pretrained(folder)
    return write_reports(folder, model, data, recipe, trainer.history)


def build_optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.AdamW:
    """AdamW over three groups: matrices (decayed), vectors, and the policy with its own learning rate."""
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "vectors": [], "policy": []}
    for name, parameter in model.named_parameters():
        kind = "policy" if ".policy." in name else "matrices" if parameter.ndim > 1 else "vectors"
        groups[kind].append(parameter)
    scale = {"policy": settings.gate_learning_rate_scale}
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": settings.learning_rate * scale.get(kind, 1.0),
                "weight_decay": settings.weight_decay if kind == "matrices" else 0.0,
            }
            for kind, parameters in groups.items()
            if parameters
        ],
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
    )


def write_reports(
    folder: Path, model: MidskipForCausalLM, data: PreparedData, recipe: Recipe, history: list[dict]
) -> dict[str, Any]:
    """Evaluate on all held-out text and write `report.json`, the picture and the page."""
    metrics = evaluate(model, data.validation, data.token_bytes, recipe.training.batch_size)
    report = {
        "validation": metrics,
        "training": {
            "steps": history[-1]["step"],
            "num_tokens": sum(row["num_tokens"] for row in history),
            "seconds": history[-1]["seconds"],
            "executed_share": sum(row["executed_share"] for row in history) / len(history),
        },
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "recipe": RECIPE_FILE,
    }
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    shares = [(row["step"], row["share_by_layer"]) for row in history]
    write_picture(folder / PICTURE_FILE, metrics["share_by_layer"], shares, f"Share of tokens that ran: {folder.name}")
    num_passages = min(4, len(data.validation))
    passages = []
    for number in range(num_passages):
        window = data.validation[number * len(data.validation) // num_passages]
        ids = window["input_ids"][window["attention_mask"].bool()].tolist()
        passages.append((f"held-out text, passage {number + 1}", depth_of_tokens(model, data.tokenizer, ids)))
    summary = {
        "validation loss": f"{metrics['loss']:.4f} nats a token",
        "block-tokens that ran": f"{metrics['executed_share']:.1%}",
    }
    write_page(folder / PAGE_FILE, f"Depth by token: {folder.name}", passages, model.config.num_hidden_layers, summary)
    return report


def _check_folder(folder: Path, recipe: Recipe, resume: bool) -> None:
    """Refuses a folder that holds something else, or another run."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output is {str(folder)!r}, which is a file; expected a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / RECIPE_FILE).is_file():
        raise ValueError(f"output is {str(folder)!r}, which holds other files; give a new or empty folder")
    if not resume:
        raise ValueError(f"{str(folder)!r} already holds a run; go on with it by --resume, or give another --output")
    if replace(read_recipe(folder / RECIPE_FILE), output=recipe.output) != recipe:  # a folder may have moved
        raise ValueError(
            f"the recipe is not the one in {str(folder / RECIPE_FILE)!r}: resume with that, or give another --output"
        )


def _newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint to go on from, if any; removes those that were half-written when the run was killed."""
    complete = []
    for path in folder.glob("checkpoint-*"):
        if not path.name.removeprefix("checkpoint-").isdecimal():
            continue  # none of ours
        if (path / CONTROLLER_FILE).is_file():
            complete.append(path)
        else:
            shutil.rmtree(path)
    if not complete:
        return None
    newest = max(complete, key=_step_of)
    if lacking := [part for part in CHECKPOINT_PARTS if not any(newest.glob(part))]:
        raise ValueError(
            f"the checkpoint {str(newest)!r} lacks {', '.join(lacking)}, so the run would not go on as it was: put it "
            "back, or remove the checkpoint to go on from the one before"
        )
    return newest


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _check_reporters(names: list[str]) -> None:
    """ValueError unless each is a reporter of transformers' that is installed."""
    installed = get_available_reporting_integrations()
    for name in names:
        if name not in installed:
            raise ValueError(
                f"training.report_to names {name!r}, which is not installed or not known to transformers; installed: "
                f"{', '.join(sorted(installed)) or 'none'}"
            )


def _history_until(path: Path, step: int) -> list[dict[str, Any]]:
    """The rows up to `step`, which are also all that is left in the file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break  # cut short when the run was killed
        if row["step"] <= step:
            rows.append(row)
    part = path.with_suffix(".part")  # renamed when whole
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    part.replace(path)
    return rows


def _end_of_text(tokenizer: PreTrainedTokenizerBase) -> int | None:
    return tokenizer.eos_token_id if isinstance(tokenizer.eos_token_id, int) else None


def _arguments(settings: TrainingSettings, folder: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=int(settings.warmup_share * settings.steps),
        max_grad_norm=settings.clip_norm,
        seed=settings.seed,
        bf16=settings.bf16,
        use_cpu=not torch.accelerator.is_available(),  # else bf16 is refused there
        logging_strategy="no",
        logging_steps=settings.log_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if settings.evaluation_steps else "no",
        eval_steps=settings.evaluation_steps or None,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        save_total_limit=2,
        report_to=settings.report_to,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
