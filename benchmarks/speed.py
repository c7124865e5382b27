"""Tables of `midskip bench` for docs/results.md: one row for each kind of gates and share, against Llama.

`tables.py` writes them into the page. Fastest: of Llama's caches, the growing one and the static one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from midskip.bench.results import LLAMA
from midskip.card import markdown

Row = Mapping[str, Any]


def table(rows: Sequence[Row], task: str) -> str:
    """Markdown of all rows of a task, of one batch size after the other, without Llama's own."""
    ours = [row for row in rows if row["task"] == task and not row["side"].startswith(LLAMA)]
    if not ours:
        raise ValueError(f"no row is of the task {task!r}; there are {sorted({row['task'] for row in rows})}")
    products = {_case(row): row for row in rows if row["task"] == "products"} if task == "prefill" else {}
    several = {name: len({row[name] for row in ours}) > 1 for name in ("batch_size", "norms")}
    lines = []
    for row in sorted(ours, key=lambda row: row["batch_size"]):
        cells = {"batch": f"{row['batch_size']}"} if several["batch_size"] else {}
        cells |= {"dtype": row["dtype"]} | ({"norms": row["norms"]} if several["norms"] else {})
        cells |= {"gates": row["gates"], "block-tokens run": f"{row['work']['executed_share']:.1%}"}
        cells |= _decode(row) if task == "decode" else _pass(row, products.get(_case(row)))
        lines.append(cells)
    return markdown.table(list(lines[0]), [list(cells.values()) for cells in lines])


def _case(row: Row) -> tuple[Any, ...]:
    return row["dtype"], row["norms"], row["gates"], row["side"]


def _pass(row: Row, products: Row | None) -> dict[str, str]:
    llama = row["ratios"]["llama"]
    cells = {
        "ms": _ms(row["time_s"]),
        "FLOPs, of Llama's": f"{llama['flops']:.3f}",
        "time, of Llama's": f"{llama['time']:.3f}",
        "time over FLOPs": f"{llama['time_over_work']:.2f}",
    }
    if "dense" in row["ratios"]:
        cells["that, against ours with nothing skipped"] = f"{row['ratios']['dense']['time_over_work']:.2f}"
    if products is not None:
        cells["that, of the products alone"] = f"{products['ratios']['dense']['time_over_work']:.2f}"
    return cells


def _decode(row: Row) -> dict[str, str]:
    fastest, growing = row["ratios"]["fastest_llama"], row["ratios"]["llama"]
    kv = " ".join(f"{growing[name]:.3f}" for name in ("kv_used_bytes", "kv_allocated_bytes"))
    return {
        "bytes read, of Llama's": f"{fastest['work']:.3f}",
        "time, of the fastest Llama's": f"{fastest['time']:.3f}",
        "time over bytes": f"{fastest['time_over_work']:.2f}",
        "time, of Llama's with a growing cache": f"{growing['time']:.3f}",
        "ms a token": _ms(row["time_s"]),
        "p50 p95 p99": " ".join(_ms(seconds) for seconds in row["step_s"].values()),
        "KV used, allocated": kv,
    }


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f}" if seconds < 0.1 else f"{1e3 * seconds:,.0f}"
