"""AdamW over weights, norms and gates, and its learning rate: up on a line, down on a cosine."""

import math
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from midskip.train.recipe import TrainingSettings


def build_optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.AdamW:
    """AdamW over three groups: weights (matrices, decayed), norms, and gates (the policy) with a rate of their own;
    what is frozen is in none."""
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "norms": [], "gates": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        groups["gates" if ".policy." in name else "weights" if parameter.ndim > 1 else "norms"].append(parameter)
    return torch.optim.AdamW(
        [
            {"name": name, "params": parameters} | group_settings(name, settings)
            for name, parameters in groups.items()
            if parameters
        ],
        fused=next(model.parameters()).is_cuda,  # one pass over memory instead of many
    )


def group_settings(name: str, settings: TrainingSettings) -> dict[str, Any]:
    """AdamW's settings of one of the groups."""
    return {
        "lr": settings.learning_rate * (settings.gate_learning_rate_scale if name == "gates" else 1),
        "weight_decay": settings.weight_decay if name == "weights" else 0.0,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_epsilon,
    }


def follow_settings(scheduler: LambdaLR, settings: TrainingSettings) -> None:
    """Give the optimizer of a resumed run the settings of its recipe: a checkpoint brings those that it was saved with,
    and the recipe may have changed."""
    for number, group in enumerate(scheduler.optimizer.param_groups):
        group.update(group_settings(group["name"], settings))
        scheduler.base_lrs[number] = group["initial_lr"] = group["lr"]
        group["lr"] *= scheduler.lr_lambdas[number](scheduler.last_epoch)


def build_scheduler(optimizer: torch.optim.Optimizer, settings: TrainingSettings) -> LambdaLR:
    """From `warmup_start` of the peak to the peak over the first `warmup_ratio` of the steps, then a cosine to 0."""
    num_warmup = num_warmup_steps(settings)

    def share_of_peak(step: int) -> float:
        if step < num_warmup:
            return settings.warmup_start + (1 - settings.warmup_start) * step / num_warmup
        return 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / max(1, settings.max_steps - num_warmup)))

    return LambdaLR(optimizer, share_of_peak)


def num_warmup_steps(settings: TrainingSettings) -> int:
    """Steps in which the learning rate rises."""
    return int(settings.warmup_ratio * settings.max_steps)
