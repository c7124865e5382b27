"""Names, settings and numbers as table and picture show them: short, and harmless in a terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from midskip.report.tokens import visible

NAME_LENGTH, SETTINGS_LENGTH = 40, 60  # characters of an arm's name and of its settings


def shortened(text: str, length: int) -> str:
    """On one line, control characters visible, and the middle left out of what is longer."""
    text = visible(" ".join(text.split()))
    half = (length - 1) // 2
    return text if len(text) <= length else f"{text[:half]}…{text[-half:]}"


def settings_label(settings: Mapping[str, Any], names: Mapping[str, str] = {}) -> str:
    """As `num_hidden_layers=4, hidden_size=64`; `names` has other names for some settings."""
    values = {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}
    return ", ".join(f"{names.get(name, name)}={value}" for name, value in values.items())


def short_names(settings: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Of each setting of all points what stands behind its last dot, unless two of them would be the same."""
    full = sorted({name for of_point in settings for name in of_point})
    last = [name.rsplit(".", 1)[-1] for name in full]
    return {name: short if last.count(short) == 1 else name for name, short in zip(full, last, strict=True)}


def amount(value: float) -> str:
    """Three digits and a prefix, as `2.26 M`."""
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g}"
