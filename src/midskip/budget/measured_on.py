"""What a calibration was measured on, weights and settings: under others its curve means nothing."""

from __future__ import annotations

import json
from collections import defaultdict
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from midskip.budget.calibration import SETTINGS, Calibration, calibration_in

NUM_VALUES = 256  # of each tensor, about: evenly spread
SMALLEST = 2.0**-14  # below it float16 is coarser than bfloat16


def hashes_of(model: nn.Module) -> dict[str, str] | None:
    """SHA-256 of the model's weights, once rounded to bfloat16 and once to float16.

    A model that is cast to either afterwards still has the hash of that dtype, and so has one that is moved, compiled,
    saved or loaded. Hashed are the names, the shapes and some 256 values of every floating-point tensor of the
    `state_dict`. Training moves more than a few values of a tensor, so some of them tell. A change that is lost in
    rounding all of them to 8 bits is not seen.

    Returns:
        Hexadecimal by name of the dtype; None for weights that are not all here (sharded, or on the meta device).
    """
    state = {
        name.replace("_orig_mod.", ""): tensor  # which torch.compile puts into names
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point()
    }
    if any(type(tensor) is not Tensor or tensor.is_meta for tensor in state.values()):
        return None
    names = "".join(f"{name} {list(state[name].shape)}\n" for name in sorted(state)).encode()
    values = _values(state)
    rounded = values.bfloat16(), values.half()
    rounded = torch.where(rounded[0].abs() < SMALLEST, 0, rounded[0]), rounded[1]
    hashes = (sha256(names + part.view(torch.int16).numpy().tobytes()).hexdigest() for part in rounded)
    return dict(zip(("bfloat16", "float16"), hashes, strict=True))


def _values(state: dict[str, Tensor]) -> Tensor:
    """Some of each tensor, by name, float32 on the CPU; the host waits once for each device."""
    picked: dict[torch.device, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in state.items():
        step = max(1, tensor.numel() // NUM_VALUES) | 1  # odd: else it might stay within a few columns
        picked[tensor.device][name] = tensor.flatten()[::step]
    values: dict[str, Tensor] = {}
    for parts in picked.values():
        together = torch.cat([part.float() for part in parts.values()]).cpu()
        values |= zip(parts, together.split([len(part) for part in parts.values()]), strict=True)
    return torch.cat([values[name] for name in sorted(values)])


def settings_of(config: Any) -> dict[str, Any]:
    """Those settings of a `MidskipConfig` that say who skips and what, and may change while the weights stay."""
    return json.loads(json.dumps({name: getattr(config, name) for name in SETTINGS}))  # as a file would give them


def calibration_of(model: Any) -> Calibration:
    """The calibration of a `MidskipForCausalLM`, which budgets go by.

    Raises:
        ValueError: there is none, it is broken or of other weights or settings, or the policy is not adjustable.
    """
    calibration = calibration_in(model.config.calibration, model.model.policy.adjustable)
    measured = calibration.weights
    now = None if measured is None else hashes_of(model)
    if measured is not None and now is not None and not measured.items() & now.items():
        raise ValueError(
            f"the model's calibration on {calibration.text!r} was measured on other weights than it has now, as before "
            "a fine-tune, and does not say what a budget means for them: run `midskip calibrate` on its run folder, or "
            "midskip.budget.calibrate.calibrate on the model"
        )
    settings = settings_of(model.config)
    for name, value in (calibration.settings or {}).items():
        if settings[name] != value:
            raise ValueError(
                f"the model's calibration on {calibration.text!r} was measured with {name}: {value!r}, and the model "
                f"has {settings[name]!r}: set it back, or run `midskip calibrate` on its run folder, or "
                "midskip.budget.calibrate.calibrate on the model"
            )
    return calibration
