"""What of a model learns, and the original that it learns from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

from midskip.budget.monitor import temporary_limits
from midskip.model.modeling import MidskipForCausalLM
from midskip.names import check_one_of

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TRAINABLE = ("skips", "lora", "all")

# gives, while it is entered, a model that computes what the original does
Original = Callable[[], AbstractContextManager[MidskipForCausalLM]]


@contextmanager
def learning(model: MidskipForCausalLM, trainable: str, lora_rank: int = 16) -> Iterator[Original]:
    """Within, the parameters that are to learn ask for gradients, and no others do.

    Args:
        trainable: `"skips"`: skip paths and the policy. `"lora"`: these, and low-rank adapters (peft) of the linear
            maps of all blocks, which are merged into the weights at the end, unless an error ends it. `"all"`:
            everything; a frozen copy of the model is then the original.
        lora_rank: of the adapters.

    Raises:
        ValueError: another `trainable`.
    """
    check_one_of("trainable", trainable, TRAINABLE)
    tuner: Any = None
    original: Original = partial(temporary_limits, model, score_scale=0.0)
    if trainable == "all":
        copy = deepcopy(model).requires_grad_(False)
        original = partial(temporary_limits, copy, score_scale=0.0)
    elif trainable == "lora":
        from peft import LoraConfig, LoraModel

        config = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules=LINEAR)
        tuner = LoraModel(model, config, "default")
        original = partial(_without_adapters, model, tuner)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            trainable == "all" or any(part in name for part in (".policy.", ".skip_paths.", ".lora_"))
        )
    try:
        yield original
        if tuner is not None:
            tuner.merge_and_unload()
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(True)


@contextmanager
def _without_adapters(model: MidskipForCausalLM, tuner: Any) -> Iterator[MidskipForCausalLM]:
    tuner.disable_adapter_layers()
    try:
        with temporary_limits(model, score_scale=0.0):
            yield model
    finally:
        tuner.enable_adapter_layers()
