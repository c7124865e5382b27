"""Reports on where a model spends its depth: an HTML page, pictures, and text for a terminal."""

from midskip.report.curve import budget_note, budget_table, calibration_table, write_curves
from midskip.report.page import Shade, TokenDepth, palette, visible, write_page
from midskip.report.picture import write_idea, write_picture
from midskip.report.summary import duration, print_line, print_paths, results_table
from midskip.report.terminal import comparison_table, depth_text, legend

__all__ = [
    "Shade",
    "TokenDepth",
    "budget_note",
    "budget_table",
    "calibration_table",
    "comparison_table",
    "depth_text",
    "duration",
    "legend",
    "palette",
    "print_line",
    "print_paths",
    "results_table",
    "visible",
    "write_curves",
    "write_idea",
    "write_page",
    "write_picture",
]
