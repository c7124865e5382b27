"""Reports on where a model spends its depth: an HTML page, pictures, and text for a terminal."""

from midskip.report.curve import budget_note, budget_table, calibration_table, write_curves
from midskip.report.heat import heat_map, heat_style
from midskip.report.kinds import Kind, depth_by_kind, kinds_html, kinds_style
from midskip.report.page import write_page
from midskip.report.picture import write_idea, write_picture
from midskip.report.summary import duration, print_line, print_paths, results_table
from midskip.report.terminal import comparison_table, depth_text, legend
from midskip.report.tokens import Shade, TokenDepth, palette, safe, token_html, visible

__all__ = [
    "Kind",
    "Shade",
    "TokenDepth",
    "budget_note",
    "budget_table",
    "calibration_table",
    "comparison_table",
    "depth_by_kind",
    "depth_text",
    "duration",
    "heat_map",
    "heat_style",
    "kinds_html",
    "kinds_style",
    "legend",
    "palette",
    "print_line",
    "print_paths",
    "results_table",
    "safe",
    "token_html",
    "visible",
    "write_curves",
    "write_idea",
    "write_page",
    "write_picture",
]
