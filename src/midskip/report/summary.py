"""What a command says at its end: the numbers that matter, and where all of them are."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from midskip.report.terminal import comparison_table
from midskip.report.tokens import visible


def duration(seconds: float) -> str:
    """ "41 s", "12 min 5 s", "3 h 20 min"; seconds below two minutes."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s" if whole >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


ROWS = (
    ("loss", "loss (nats a token)", "{:.4f}".format),
    ("bits_per_byte", "bits a byte", "{:.4f}".format),
    ("accuracy", "labels with the largest logit", "{:.1%}".format),
    ("executed_share", "block-tokens that ran", "{:.1%}".format),
    ("flops_per_token", "FLOPs a token", "{:,.0f}".format),
    ("dense_flops_per_token", "  with nothing skipped", "{:,.0f}".format),
    ("seconds", "training", duration),
)


def results_table(models: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """A column for each model, by its name; a row for each of `ROWS` that one of them has.

    Args:
        models: `loss`, `bits_per_byte`, `accuracy`, `executed_share`, `flops_per_token`, `dense_flops_per_token` and
            `seconds` of training, those that are known.
    """
    cells = []
    for name, label, shown in ROWS:
        values = [found.get(name) for found in models.values()]
        if any(value is not None for value in values):
            cells.append([label, *("" if value is None else shown(value) for value in values)])
    return comparison_table(cells, ["", *models], title)


def print_paths(console: Console, paths: Mapping[str, object]) -> None:
    """A line for each: what it is, and where."""
    width = max(map(len, paths), default=0)
    for name, path in paths.items():
        print_line(console, f"{name:<{width}}  {path}")


def print_line(console: Console, text: str) -> None:
    """As it is, however long its lines; what would steer a terminal is made visible."""
    console.print(visible(text), markup=False, highlight=False, emoji=False, soft_wrap=True)
