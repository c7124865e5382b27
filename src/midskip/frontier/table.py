"""A frontier at one cost as a table, for a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from midskip.frontier.labels import NAME_LENGTH, SETTINGS_LENGTH, amount, settings_label, short_names, shortened
from midskip.frontier.read import COSTS


def frontier_table(result: Mapping[str, Any], cost: str = "flops") -> Table:
    """Of what `frontier` gave: dense points by cost, then the others in the order of the sweep. Two lines a point.

    A seed that is missing is "-". The last three columns are of the distance to dense models, or to the one model
    that `frontier` was told to compare with.

    Raises ValueError for a cost that is not among the measured ones.
    """
    _check(result, cost)
    title = f"Held-out loss against {COSTS[cost].words}; means of seeds {', '.join(result['seeds'])}"
    table = Table(title=Text(title), title_justify="left", box=SIMPLE)
    interval = f"{result['confidence']:.0%} interval"
    table.add_column("arm\nsettings", overflow="fold")
    distance, relative = _headings(result)
    for heading in (
        COSTS[cost].heading, "share run", "loss, nats\nby seed", f"{distance}, nats\n{interval}", relative
    ):  # fmt: skip
        table.add_column(heading, justify="right", overflow="fold")
    table.add_column("verdict", overflow="fold")
    rows = _rows(result, cost)
    for number, (point, cells) in enumerate(rows, 1):
        is_last_dense = point["dense"] and (number == len(rows) or not rows[number][0]["dense"])
        table.add_row(*map(Text, cells), end_section=is_last_dense)
    return table


def frontier_markdown(result: Mapping[str, Any], cost: str = "flops") -> str:
    """The same in Markdown, a line a point."""
    _check(result, cost)
    from midskip.card.markdown import plain, table  # which imports torch

    distance, relative = map(plain, _headings(result))
    columns = (
        "arm, settings", COSTS[cost].heading, "share run", "loss, nats, and by seed",
        f"{distance}, nats, {result['confidence']:.0%} interval", relative, "verdict",
    )  # fmt: skip
    rows = [["<br>".join(map(plain, cell.strip().split("\n"))) for cell in cells] for _, cells in _rows(result, cost)]
    return table(columns, rows)


def _check(result: Mapping[str, Any], cost: str) -> None:
    if cost not in result["costs"]:
        measured = ", ".join(result["costs"]) or "none"
        raise ValueError(f"the dense models have no {cost!r} that can be compared; expected one of: {measured}")


def _headings(result: Mapping[str, Any]) -> tuple[str, str]:
    """Of the columns of distance and cost."""
    if result["against"] is None:
        return "from dense", "cost at equal loss"
    return f"from {shortened(result['against'], NAME_LENGTH)}", "relative cost"


def _rows(result: Mapping[str, Any], cost: str) -> list[tuple[Mapping[str, Any], tuple[str, ...]]]:
    """Each point and its cells."""
    names = short_names([point["settings"] for point in result["points"]])
    dense = sorted((point for point in result["points"] if point["dense"]), key=lambda point: _cost(point, cost))
    rows = []
    for point in (*dense, *(point for point in result["points"] if not point["dense"])):
        settings = shortened(settings_label(point["settings"], names), SETTINGS_LENGTH)
        seeds = dict.fromkeys((*result["seeds"], *point["losses"]))
        by_seed = [_loss(point["losses"][seed]) if seed in point["losses"] else "-" for seed in seeds]
        cells = (
            f"{shortened(point['arm'], NAME_LENGTH)}\n{settings}",
            amount(point["costs"][cost]) if cost in point["costs"] else "",
            f"{share:.0%}" if (share := point["measures"].get("executed_share")) is not None else "",
            f"{_loss(point['loss'])}\n{' '.join(by_seed)}",
            *_comparison(point, cost),
        )
        rows.append((point, cells))
    return rows


def _comparison(point: Mapping[str, Any], cost: str) -> tuple[str, str, str]:
    """The last three cells."""
    if (other := point.get("against_other")) is not None:
        found, remarks = other | {"cost_percent": other["cost_percents"].get(cost)}, other["remarks"]
    elif point["dense"]:
        where = {True: "dense", False: "dense, above the envelope", None: "dense, loss or cost not known"}
        return "", "", where[point["on_envelope"][cost]]
    else:
        found, remarks = point["against_dense"][cost], point["remarks"]
    distance, interval, percent = found["distance"], found["interval"], found["cost_percent"]
    between = "" if interval is None else f"\n{interval[0]:+.4f} to {interval[1]:+.4f}"
    return (
        "" if distance is None else f"{distance:+.4f}{between}",
        "" if percent is None else f"{percent:+.1f} %",
        "\n".join((found["verdict"], *remarks)),
    )


def _cost(point: Mapping[str, Any], cost: str) -> float:
    return point["costs"].get(cost, float("inf"))


def _loss(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"
