"""The settings of a run as transformers' Trainer has them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations

from midskip.distributed import num_launched
from midskip.train.fsdp import check_fsdp
from midskip.train.recipe import TrainingSettings


def training_arguments(settings: TrainingSettings, folder: Path) -> TrainingArguments:
    """The settings as transformers has them; making them joins the other processes, if there are any."""
    on_cpu = not torch.cuda.is_available()
    check_fsdp(on_cpu)
    num_processes = num_launched()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        max_grad_norm=0.0,  # clipped by the trainer's callback, which looks at the norm anyway
        seed=settings.seed,
        bf16=settings.bf16,
        use_cpu=on_cpu,  # else bf16 is refused there
        ddp_backend="gloo" if on_cpu and num_processes > 1 else None,
        ddp_find_unused_parameters=False,  # a block that no token reaches has gradients of 0, not none
        ddp_timeout=7200,  # the others wait while the first prepares text
        logging_strategy="no",
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if settings.eval_steps else "no",
        eval_steps=settings.eval_steps or None,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        report_to=settings.report_to,
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cache=True,  # is written into the saved configuration; a training pass makes no cache anyway
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # without torchrun one device, not nn.DataParallel over all
    return arguments


def check_reporters(names: list[str]) -> None:
    """ValueError unless each is a reporter of transformers' that is installed."""
    installed = get_available_reporting_integrations()
    for name in names:
        if name not in installed:
            raise ValueError(
                f"training.report_to names {name!r}, which is not installed or not known to transformers; installed: "
                f"{', '.join(sorted(installed)) or 'none'}"
            )
