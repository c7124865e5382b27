"""Weights that accelerate shards over processes (FSDP2): the settings a run takes, and the weights as a whole."""

from __future__ import annotations

import os
from typing import Any

from accelerate.utils import parse_flag_from_env
from transformers import Trainer

SETTINGS = {
    "FSDP_VERSION": ("fsdp_version", "2"),
    "FSDP_STATE_DICT_TYPE": ("fsdp_state_dict_type", "FULL_STATE_DICT"),
    "FSDP_AUTO_WRAP_POLICY": ("fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
}


def check_fsdp(on_cpu: bool) -> None:
    """Refuses what `accelerate launch` may have been told and a run cannot have.

    Raises:
        ValueError: FSDP without a GPU; or with another version, kind of checkpoints, or parts to shard than were
            tested.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return
    if on_cpu:
        raise ValueError(
            "accelerate was told to use FSDP, which it does on GPUs alone (here it would be DDP, and not say so): "
            "leave --use_fsdp out, or start it as `torchrun -m midskip.cli train ...`"
        )
    for name, (option, wanted) in SETTINGS.items():
        if (got := os.environ.get(name)) != wanted:
            options = " ".join(f"--{option} {wanted}" for option, wanted in SETTINGS.values())
            raise ValueError(
                f"accelerate was told to use FSDP with {option} {got}; expected {wanted}: accelerate launch --use_fsdp "
                f"{options} ..."
            )


def whole_state(trainer: Trainer) -> dict[str, Any] | None:
    """What `save_pretrained` takes as the state of a model whose weights are sharded, on the first process; None for
    one that it saves as it is. Every process calls it."""
    return trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
