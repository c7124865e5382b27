"""Benchmarks of tiny models: what the tests of `midskip bench` share."""

from typing import Any

import torch
from torch import Tensor

from midskip.bench import BenchSettings
from midskip.bench.models import Side, build_ours, imposed

DTYPE = torch.float32


def settings(**changes: Any) -> BenchSettings:
    given: dict[str, Any] = {"dtypes": ("float32",), "gates": ("fractional",), "shares": (0.0, 0.5), "device": "cpu"}
    return BenchSettings.of("tiny", **(given | changes))


def ids(num_rows: int = 3, num_columns: int = 20) -> Tensor:
    return torch.randint(61, (num_rows, num_columns))


def side(share: float = 0.5, gates: str = "fractional", **changes: Any) -> Side:
    given = settings(shares=(share,), **changes)
    return imposed(given, build_ours(given, DTYPE), gates)[0]
