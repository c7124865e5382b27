"""Held-out loss against what it costs: gated models held to the envelope of dense ones."""

from midskip.frontier.compare import frontier
from midskip.frontier.envelope import Envelope
from midskip.frontier.intervals import mean_interval, t_quantile
from midskip.frontier.picture import write_frontier
from midskip.frontier.read import COSTS, save_results
from midskip.frontier.table import frontier_markdown, frontier_table

__all__ = [
    "COSTS",
    "Envelope",
    "frontier",
    "frontier_markdown",
    "frontier_table",
    "mean_interval",
    "save_results",
    "t_quantile",
    "write_frontier",
]
