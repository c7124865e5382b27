"""Picture of a frontier: a panel for each cost, with the dense envelope, every point and its seeds."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from midskip.frontier.compare import ELSEWHERE
from midskip.frontier.labels import NAME_LENGTH, amount, shortened
from midskip.frontier.read import COSTS

# Okabe and Ito's colours, but for yellow, which is faint on white, and black, which is for dense models.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # one more than there are colours: pairs come again after 42 arms
INK = "#1b1b20"


def write_frontier(path: str | os.PathLike[str], result: Mapping[str, Any]) -> None:
    """Draws what `frontier` gave, as PNG or SVG by the ending of the path.

    Raises ValueError if no cost was measured.
    """
    costs = result["costs"]
    if not costs:
        raise ValueError("there is no cost to draw; expected at least one that was measured for dense models")

    # Imported here, because matplotlib is slow to import and only pictures need it.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    styles = _styles(result["points"])
    columns = 2 if len(costs) in (2, 4) else len(costs)
    rows = -(-len(costs) // columns)
    legend_rows = -(-(len(styles) + 2) // 4)
    with rc_context({"svg.hashsalt": "midskip", "text.color": INK, "axes.labelcolor": INK, "font.size": 10}):
        figure = Figure(figsize=(12, 4.1 * rows + 0.3 * legend_rows + 0.5), dpi=125, layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
        for axes, cost in zip(panels, costs, strict=True):
            _panel(axes, cost, result, styles)
        for first in range(0, len(costs), columns):
            figure.axes[first].set_ylabel("held-out loss (nats a token)")
        handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels())}
        legend = figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
        figure.suptitle(
            f"Held-out loss against cost; means of seeds {', '.join(result['seeds'])}", fontsize=13, parse_math=False
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # a name may be in any script
            svg = str(path).endswith(".svg")
            figure.savefig(path, facecolor="white", metadata={"Date": None} if svg else None)


def _styles(points: Sequence[Mapping[str, Any]]) -> dict[tuple[str, bool], dict[str, Any]]:
    """Colour, marker and label of each arm, of its dense points apart from others."""
    styles: dict[tuple[str, bool], dict[str, Any]] = {}
    for point in points:
        key = point["arm"], point["dense"]
        if key in styles:
            continue
        number = sum(dense == point["dense"] for _, dense in styles)
        colour = INK if point["dense"] else COLOURS[number % len(COLOURS)]
        label = shortened(point["arm"], NAME_LENGTH) + (
            " (dense)" if point["dense"] and "dense" not in point["arm"] else ""
        )
        styles[key] = {
            "color": colour,
            "marker": MARKERS[number % len(MARKERS)],
            "markerfacecolor": "white" if point["dense"] else colour,
            "markeredgecolor": INK if point["dense"] else "white",
            "markeredgewidth": 1.2 if point["dense"] else 0.8,
            "markersize": 7 if point["dense"] else 9,
            # a label that begins with "_" would not be shown
            "label": f" {label}" if label.startswith("_") else label,
        }
    return styles


def _panel(axes: Any, cost: str, result: Mapping[str, Any], styles: Mapping[tuple[str, bool], dict[str, Any]]) -> None:
    seen: list[float] = []
    envelope = result["envelopes"][cost].get("mean")
    axes.set_xscale("log")
    if envelope:
        costs, losses = zip(*envelope["knots"], strict=True)
        ends = (*costs, envelope["dearest"]), (*losses, losses[-1])
        axes.plot(*ends, color=INK, linewidth=1.5, zorder=1, label="envelope of the dense models")
    for (arm, dense), style in styles.items():
        own = [point for point in result["points"] if (point["arm"], point["dense"]) == (arm, dense)]
        own = [point for point in own if dense or point["against_dense"][cost]["verdict"] != ELSEWHERE]
        dots = [
            (point["costs_by_seed"][seed][cost], loss)
            for point in own
            for seed, loss in point["losses"].items()
            if loss is not None and cost in point["costs_by_seed"][seed]
        ]
        means = [(point["costs"][cost], point["loss"]) for point in own if cost in point["costs"] and point["loss"]]
        seen += [value for value, _ in dots]
        colour = style["color"]
        axes.plot(*_xy(dots), ".", color=colour, markersize=3.5, alpha=0.6, zorder=2)
        axes.plot(*_xy(means), linestyle="", zorder=3, **style)
    axes.plot([], [], ".", color="#77777f", markersize=4, label="small dots: each seed")
    axes.set_title(COSTS[cost].words[0].upper() + COSTS[cost].words[1:], fontsize=10)
    axes.set_xlabel(f"{COSTS[cost].heading}, log scale")
    if seen:  # else no loss is finite
        _ticks(axes, min(seen), max(seen))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _xy(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in pairs], [y for _, y in pairs]


def _ticks(axes: Any, low: float, high: float) -> None:
    """Round numbers, as many as can be read, also where all costs are near each other."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = low / 1.1, high * 1.1
    axes.set_xlim(low, high)
    in_decade = (1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)
    ticks: list[float] = []
    for locator in (*(LogLocator(subs=subs) for subs in in_decade), MaxNLocator(5)):
        ticks = [tick for tick in locator.tick_values(low, high) if low <= tick <= high]
        if len(ticks) >= 4:
            break
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
