"""Pictures: the share of tokens present in each layer, now and over training (PNG); the idea itself (SVG)."""

import math
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from midskip.report.tokens import ANCHORS, palette, visible

# The example of `write_idea`: each token with how many layers of the first half it runs before it leaves.
IDEA_LAYERS = 8
IDEA_TOKENS = {"The": 2, "moon": 4, "is": 1, "made": 3, "of": 1, "green": 4, "che": 3, "ese": 1, ".": 2}


def write_picture(
    path: str | os.PathLike[str],
    share_by_layer: Sequence[float],
    history: Sequence[tuple[int, Sequence[float]]],
    title: str = "",
) -> None:
    """Writes a PNG: left, the share of tokens present by layer; right, its history by layer and in the mean.

    share_by_layer: [L] values in 0..1, layer 0 first. history: (step, share by layer [L]), steps rising; if
    empty the left panel stands alone. Raises ValueError for shares or steps that do not fit.
    """
    _check_shares(share_by_layer, len(share_by_layer), "share_by_layer")
    for step, shares in history:
        _check_shares(shares, len(share_by_layer), f"the history at step {step}")
    steps = [step for step, _ in history]
    if any(later <= earlier for earlier, later in pairwise(steps)):
        raise ValueError(f"the steps of the history are {steps}; expected each to be above the one before")

    # Imported here, because matplotlib is slow to import and only pictures need it.
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, MaxNLocator

    num_layers = len(share_by_layer)
    height = min(max(2.8, 1.4 + 0.2 * num_layers), 7.5)  # inches
    if not steps:
        figure = Figure(figsize=(5.0, height), dpi=150, layout="constrained")
        bars = figure.add_subplot()
    else:
        figure = Figure(figsize=(10.0, height + 1.5), dpi=150, layout="constrained")
        cells = figure.add_gridspec(2, 2, width_ratios=(2, 3), height_ratios=(1.5, height))
        heat, mean, number = (figure.add_subplot(cell) for cell in (cells[1, 1], cells[0, 1], cells[0, 0]))
        bars = figure.add_subplot(cells[1, 0], sharey=heat)
        columns = _edges(steps)
        rows = [layer - 0.5 for layer in range(num_layers + 1)]
        by_layer = [[shares[layer] for _, shares in history] for layer in range(num_layers)]
        colours = LinearSegmentedColormap.from_list("depth", ANCHORS)
        image = heat.pcolormesh(columns, rows, by_layer, cmap=colours, vmin=0, vmax=1)
        figure.colorbar(image, ax=heat, label="share present", pad=0.02, aspect=30)
        heat.set(xlabel="training step")
        means = [math.fsum(shares) / num_layers for _, shares in history]
        mean.plot(steps, means, linewidth=2.5, color=ANCHORS[3], marker="o" if len(steps) == 1 else "")
        mean.set(ylim=(0, 1.05), yticks=(0, 0.5, 1), ylabel="mean share")
        mean.tick_params(labelbottom=False)
        mean.grid(alpha=0.3)
        mean.spines[["top", "right"]].set_visible(False)
        for axis in (heat, mean):
            axis.set_xlim(columns[0], columns[-1])
            axis.xaxis.set_major_locator(FixedLocator(steps) if len(steps) == 1 else MaxNLocator(6))
        number.set_axis_off()
        now = math.fsum(share_by_layer) / num_layers
        number.text(0, 0.5, f"{now:.1%}", fontsize=26, fontweight="bold", color=ANCHORS[3], va="center")
        number.text(0, 0.2, "of tokens present, mean over layers", color="#5d5d68", va="center")
    bars.barh(range(num_layers), share_by_layer, color=ANCHORS[3], height=0.8)
    bars.set(xlim=(0, 1), ylim=(-0.5, num_layers - 0.5), xlabel="share of tokens present", ylabel="layer")
    bars.set_yticks(range(0, num_layers, -(-num_layers // 16)))
    bars.spines[["top", "right"]].set_visible(False)
    bars.grid(axis="x", alpha=0.3)
    bars.set_axisbelow(True)
    if title:
        figure.suptitle(visible(title), parse_math=False)
    figure.savefig(path, format="png")


def _check_shares(shares: Sequence[float], num_layers: int, name: str) -> None:
    if not len(shares) or len(shares) != num_layers:
        raise ValueError(f"{name} has {len(shares)} layers; expected {num_layers or 'at least 1'}")
    if not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"{name} is {[float(share) for share in shares]}; expected shares from 0 to 1")


def _edges(steps: Sequence[int]) -> list[float]:
    """The borders of the columns of `steps`, midway between them; a lone step gets a column one step wide."""
    if len(steps) == 1:
        return [steps[0] - 0.5, steps[0] + 0.5]
    return [steps[0], *((a + b) / 2 for a, b in pairwise(steps)), steps[-1]]


def write_idea(path: str | os.PathLike[str]) -> None:
    """Writes an SVG of the idea: tokens leave in the first half and come back in the mirrored layer."""
    left, top, column, row, half = 96, 74, 62, 40, IDEA_LAYERS // 2
    right, bottom = left + column * len(IDEA_TOKENS), top + row * IDEA_LAYERS
    middle, shades = top + row * half, palette(IDEA_LAYERS)
    skipped = 'fill="#fff" stroke="#9a9aa6" stroke-dasharray="3 3"'
    parts = [f'<path d="M{left} {middle}H{right}" stroke="#c3c3cc" stroke-width="1.5"/>']

    def text(x: float, y: float, words: str, style: str = "") -> None:
        parts.append(f'<text x="{x}" y="{y}" {style}>{words}</text>')

    def block(x: float, y: float, style: str, width: int = 44) -> None:
        parts.append(f'<rect x="{x - width / 2}" y="{y - 13}" width="{width}" height="26" rx="5" {style}/>')

    def line(x: float, y: float, end: str, style: str = 'stroke="#55555f" stroke-width="2"') -> None:
        parts.append(f'<path d="M{x} {y}{end}" {style}/>')

    for y, words in (
        (top - 26, "blocks run"),
        (top + 25, "layer L−1"),
        (middle + 5, "⋮"),
        (bottom - 1.5 * row + 5, "layer 1"),
        (bottom - 0.5 * row + 5, "layer 0"),
        (bottom + 28, "tokens"),
    ):
        text(left - 10, y, words, 'text-anchor="end"')
    for place, (token, stay) in enumerate(IDEA_TOKENS.items()):
        x = left + (place + 0.5) * column
        line(x, bottom + 10, f"V{top - 8}", 'stroke="#55555f" stroke-width="2" marker-end="url(#tip)"')
        for layer in range(IDEA_LAYERS):
            y = bottom - (layer + 0.5) * row
            if min(layer, IDEA_LAYERS - 1 - layer) < stay:
                block(x, y, f'fill="{shades[2 * stay].background}"')
            else:
                block(x, y, skipped)
                line(x, y - row / 2, f"v{row}")
        text(x, bottom + 28, token, 'text-anchor="middle" font-family="ui-monospace,monospace"')
        text(x, top - 26, str(2 * stay), 'text-anchor="middle" font-weight="600"')
    # Just below the middle two tokens are left: the later one attends to the earlier, past all between.
    stays = enumerate(IDEA_TOKENS.values())
    first, last = (left + (place + 0.5) * column for place, stay in stays if stay == half)
    attends = 'stroke="#b3261e" stroke-width="2.5" marker-end="url(#red)"'
    line(last - 24, middle + row / 2, f"H{first + 28}", attends)
    for y, words, style in (
        (top + 1.5 * row, ("… and comes back", "in the mirrored layer"), ""),
        (middle + row / 2, ("attention meets only", "the tokens present"), 'fill="#b3261e"'),
        (bottom - 1.5 * row, ("a token leaves when", "its gate reaches 0 …"), ""),
    ):
        text(right + 14, y - 5, words[0], style)
        text(right + 14, y + 14, words[1], style)
    for place, stay in enumerate(sorted(set(IDEA_TOKENS.values()))):
        block(left + 10 + 22 * place, bottom + 64, f'fill="{shades[2 * stay].background}"', 20)
    text(left + 96, bottom + 69, "block runs")
    block(left + 214, bottom + 64, skipped)
    line(left + 214, bottom + 48, "v32")
    text(left + 246, bottom + 69, "skipped: no compute, no attention, no KV")
    width, height = right + 172, bottom + 98
    marker = 'viewBox="0 0 8 8" refX="4" refY="4" markerWidth="5" markerHeight="5" orient="auto"'
    Path(path).write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"'
        f' height="{height}" role="img" font-family="system-ui,Helvetica,Arial,sans-serif" font-size="14"'
        ' fill="#1b1b20">\n'
        "<title>Tokens leave in the first half of the layers and come back in the mirrored layer</title>\n"
        f'<defs><marker id="tip" {marker}><path d="M0 0L8 4L0 8z" fill="#55555f"/></marker>'
        f'<marker id="red" {marker}><path d="M0 0L8 4L0 8z" fill="#b3261e"/></marker></defs>\n'
        f'<rect width="{width}" height="{height}" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n",
        encoding="utf-8",
        newline="\n",
    )
