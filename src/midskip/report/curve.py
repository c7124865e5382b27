"""Loss against the share of blocks that ran, on several texts: as a picture and as a table."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from midskip.budget.calibration import Calibration
from midskip.report.terminal import comparison_table
from midskip.report.tokens import ANCHORS, visible


def write_curves(
    path: str | os.PathLike[str], curves: Sequence[tuple[str, Sequence[tuple[float, float]]]], title: str = "",
    as_trained: Sequence[tuple[float, float]] = (),
) -> None:  # fmt: skip
    """Writes a PNG with a line for each text: its name and points (executed share in 0..1, loss in nats a token).

    `as_trained` has the point of the model without a budget on each of the texts; it is marked.

    Raises ValueError for a text without points, or a share out of range.
    """
    for name, points in curves:
        if not points or not all(0 <= share <= 1 for share, _ in points):
            raise ValueError(f"the curve of {name!r} is {list(points)}; expected points with a share from 0 to 1")

    # Imported here, because matplotlib is slow to import and only pictures need it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 4.0), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for number, (name, points) in enumerate(curves):
        shares, losses = zip(*sorted(points), strict=True)
        colour, line = ANCHORS[(3 + 3 * number) % len(ANCHORS)], "--" if number else "-"
        label = f"on {visible(name)}"
        axes.plot(shares, losses, line, color=colour, marker="o", markersize=4, linewidth=2, label=label)
        if as_trained:
            share, loss = as_trained[number]
            marks = {"marker": "D", "markersize": 9, "markerfacecolor": "none", "markeredgewidth": 2}
            label = "_" if number else "as trained"  # named once
            axes.plot(share, loss, color=colour, linestyle="none", zorder=3, label=label, **marks)
    axes.set(xlim=(0, 1.02), xlabel="share of blocks that ran", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    for text in axes.legend().get_texts():
        text.set_parse_math(False)
    if title:
        figure.suptitle(visible(title), parse_math=False)
    figure.savefig(path, format="png")


def calibration_table(calibration: Calibration) -> Table:
    """The curve, a row for each point."""
    points = zip(calibration.score_scale, calibration.share, calibration.loss, strict=True)
    rows = [(f"{score_scale:.4g}", f"{share:.3f}", f"{loss:.4f}") for score_scale, share, loss in points]
    columns = "scale of the scores", "share that ran", "loss (nats)"
    return comparison_table(rows, columns, f"Calibrated on {calibration.text}, {calibration.num_tokens:,} tokens")


def budget_table(rows: Sequence[Mapping[str, Any]], text: str) -> Table:
    """What `loss_by_budget` and `beside_calibration` give on a text of this name, beside the calibration text. A row
    whose budget is None is that of the model as trained."""
    shown = []
    for row in rows:
        before = row["calibration"]
        shares = f"{row['executed_share']:.3f}", f"{before['executed_share']:.3f}"
        losses = f"{row['loss']:.4f}", f"{before['loss']:.4f}"
        shown.append(
            (
                "as trained" if row["budget"] is None else f"{row['budget']:g}", f"{row['score_scale']:.4g}", *shares,
                *losses, "yes" if row["in_band"] else "no",
            )
        )  # fmt: skip
    columns = "budget", "scale of the scores", "share here", "share there", "loss here", "loss there", "in the band"
    return comparison_table(shown, columns, f"Here: {text}; there: {rows[0]['calibration']['text']}")


def budget_note(calibration: Calibration) -> str:
    """What a budget does not promise, for below a table of them."""
    more = (
        "A larger one may be worse: it is the share that runs, not the one of the lowest loss."
        if calibration.rule == "share"
        else "A larger one is never worse there; on other text it may be."
    )
    return f"A budget is an average over text like the calibration's, and no limit for each prompt. {more}"
