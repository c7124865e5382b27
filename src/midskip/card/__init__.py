"""The model card of a folder, and what it is made of."""

from midskip.card.folder import (
    BENCH_FILE,
    CARD_FILE,
    EVALUATED_FILE,
    MARK,
    MEASURED_FILES,
    RECIPE_FILE,
    REPORT_FILE,
    RETROFIT_FILE,
    Measured,
    header_of,
    read_measured,
    read_run,
)
from midskip.card.markdown import plain, source_name
from midskip.card.page import model_card, try_card, write_card

__all__ = [
    "BENCH_FILE",
    "CARD_FILE",
    "EVALUATED_FILE",
    "MARK",
    "MEASURED_FILES",
    "RECIPE_FILE",
    "REPORT_FILE",
    "RETROFIT_FILE",
    "Measured",
    "header_of",
    "model_card",
    "plain",
    "read_measured",
    "read_run",
    "source_name",
    "try_card",
    "write_card",
]
