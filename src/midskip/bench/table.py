"""The rows of a case as a table for a terminal: a column for each side, times beside what really ran."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from midskip.report.tokens import visible

TIMES = {
    "prefill": "time to first token, ms", "decode": "time a token, ms", "training": "time a step, ms",
    "trainer": "time a step, ms", "products": "time, ms",
}  # fmt: skip

Row = Mapping[str, Any]


def case_table(rows: Sequence[Row]) -> Table:
    """What `case_rows` gave."""
    table = Table(title=Text(title(rows[0])), title_justify="left")
    table.add_column("")
    for row in rows:
        table.add_column(Text(visible(row["side"])), justify="right")
    for label, cell in _lines(rows[0]):
        table.add_row(label, *(cell(row) for row in rows))
    return table


def title(row: Row) -> str:
    """The case that a row is of, in words."""
    columns, steps = row["num_columns"], row["num_steps"]
    sizes = {
        "prefill": f"a prompt of {columns} tokens",
        "decode": f"batch {row['batch_size']}, {steps} tokens after {columns - steps}",
        "training": f"forward and backward of {row['batch_size']} x {columns} tokens",
        "trainer": f"optimizer steps in the Trainer, {row['batch_size']} x {columns} tokens",
        "products": f"the matrix products with weights of a prompt of {columns} tokens, alone",
    }
    how = f"{row['dtype']}{', compiled' if row['compiled'] else ''}, {row['norms']} norms, gates {row['gates']}"
    return f"{row['task']}: {sizes[row['task']]}; {how}"


def _lines(first: Row) -> list[tuple[str, Callable[[Row], str]]]:
    """Label and cell of each line."""
    decode, cached = first["task"] == "decode", first["task"] in ("prefill", "decode")
    against, each = first["ratios"], " a step" if first["num_steps"] > 1 else ""
    lines: list[tuple[str, Callable[[Row], str]]] = [
        (TIMES[first["task"]], lambda row: _ms(row["time_s"])),
        ("  quartiles of repeats", lambda row: " - ".join(_ms(row["repeat_s"][name]) for name in ("lower", "upper"))),
    ]
    if decode:
        lines[0] = (f"{lines[0][0]} (mean)", lines[0][1])
        lines.append(("  p50, p95, p99", lambda row: " ".join(_ms(s) for s in row["step_s"].values())))
    lines.append(("  of Llama", lambda row: _ratio(row, "llama", "time")))
    if against["fastest_llama"]["of"] != against["llama"]["of"]:
        lines.append(("  of Llama, static cache", lambda row: _ratio(row, "fastest_llama", "time")))
    if "dense" in against:
        lines.append((f"  of {against['dense']['of']}", lambda row: _ratio(row, "dense", "time")))
    lines += [
        ("blocks run", lambda row: f"{row['work']['executed_share']:.1%}"),
        (f"FLOPs{each}", lambda row: f"{row['work']['flops'] / row['num_steps']:.3g}"),
        ("  of Llama", lambda row: _ratio(row, "llama", "flops")),
    ]
    if decode:
        lines += [
            (f"weights read{each}, MB", lambda row: _mb(row["work"]["weight_bytes"] / row["num_steps"])),
            (f"cache read{each}, MB", lambda row: _mb(row["work"]["cache_bytes"] / row["num_steps"])),
            ("  both, of Llama", lambda row: _ratio(row, "llama", "work")),
        ]
    work = "bytes read" if decode else "FLOPs"
    lines.append((f"time / {work}, of Llama", lambda row: _ratio(row, "llama", "time_over_work")))
    if "dense" in against:
        lines.append((f"  of {against['dense']['of']}", lambda row: _ratio(row, "dense", "time_over_work")))
    if cached:
        lines += [
            ("KV used, MB", lambda row: _mb(row["work"]["kv_used_bytes"])),
            ("KV allocated, MB", lambda row: _mb(row["work"]["kv_allocated_bytes"])),
            ("  used, of Llama", lambda row: _ratio(row, "llama", "kv_used_bytes")),
            ("  allocated, of Llama", lambda row: _ratio(row, "llama", "kv_allocated_bytes")),
        ]
    if first["utilisation"]:
        lines.append(("share of the device's peak", lambda row: f"{row['utilisation']:.1%}"))
    if first["peak_bytes"] is not None:
        lines.append(("memory at its peak, MB", lambda row: _mb(row["peak_bytes"])))
        lines.append(("  of Llama", lambda row: _ratio(row, "llama", "peak_bytes")))
    if first["joules"]:
        lines.append((f"joules a {first['joules']['unit']}", lambda row: _number(row["joules"]["median"])))
        lines.append(("  of Llama", lambda row: _ratio(row, "llama", "joules")))
    return lines


def _ratio(row: Row, against: str, what: str) -> str:
    value = row["ratios"][against].get(what)
    return "" if value is None else f"{value:.3f}"


def _ms(seconds: float) -> str:
    return _number(seconds * 1e3)


def _mb(number_bytes: float) -> str:
    return _number(number_bytes / 1e6)


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
