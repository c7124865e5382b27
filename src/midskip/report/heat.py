"""A heat map of layers x tokens: the gate of every token in every layer, as one small SVG."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from statistics import fmean

from midskip.report.tokens import TokenDepth, palette

STEPS = 8  # of shades above 0
MOST_COLUMNS = 2000  # more than a screen shows


def heat_map(tokens: Sequence[TokenDepth], num_layers: int, breaks: Sequence[int] = ()) -> str:
    """Layer 0 is at the bottom, tokens run from left to right. A gate of exactly 0, a layer that was skipped, has the
    darkest shade, and nothing else has. It is drawn in runs of equal shades, not cell by cell. In a text of more than
    `MOST_COLUMNS` tokens a column is the mean of a few.

    Args:
        breaks: tokens at which a new window begins, where a line is drawn.
    """
    size = -(-len(tokens) // MOST_COLUMNS)
    columns = [_steps(tokens[start : start + size], num_layers) for start in range(0, len(tokens), size)]
    paths: dict[int, list[str]] = {}
    for layer in range(num_layers):
        start, ends = 0, dict[int, int]()  # where each shade's path has come to in this layer
        for step, run in groupby(column[layer] for column in columns):
            path, length = paths.setdefault(step, []), len(list(run))
            path.append(f"m{start - ends[step]} 0" if step in ends else f"M{start} {num_layers - layer - 0.5}")
            path.append(f"h{length}")
            start += length
            ends[step] = start
    body = "".join(f'<path class="h{step}" d="{"".join(paths[step])}"/>' for step in sorted(paths))
    lines = "".join(f"M{at / size:g} 0v{num_layers}" for at in breaks if at)
    lines = f'<path class="line" d="{lines}"/>' if lines else ""
    label = f"gate of each of {len(tokens)} tokens in each of {num_layers} layers"
    return (
        f'<svg class="heat" role="img" aria-label="{label}" viewBox="0 0 {len(tokens) / size:g} {num_layers}"'
        f' preserveAspectRatio="none">{body}{lines}</svg>'
    )


def _steps(tokens: Sequence[TokenDepth], num_layers: int) -> list[int]:
    """Of each layer, for tokens that share a column."""
    found = []
    for layer in range(num_layers):
        gate = fmean(one.gates[layer] if len(one.gates) else float(layer < one.blocks) for one in tokens)
        found.append(max(1, round(STEPS * gate)) if gate > 0 else 0)
    return found


def heat_style() -> str:
    """What `heat_map` needs in a style sheet."""
    shades = enumerate(palette(STEPS))
    return "".join(f".heat .h{step}{{stroke:{shade.background}}}\n" for step, shade in shades)
