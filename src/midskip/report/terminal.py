"""The same reports for a terminal, as rich renderables.

No text reaches the terminal as a command: control characters are made visible, rich's markup is not read.
"""

from collections.abc import Sequence
from statistics import fmean

from rich.style import Style
from rich.table import Table
from rich.text import Text

from midskip.report.tokens import TokenDepth, check_tokens, palette, visible


def depth_text(tokens: Sequence[TokenDepth], num_layers: int) -> Text:
    """The text of the tokens, each on the shade of the blocks it ran; newlines and tabs stay. A text that several
    tokens share is shown once, on the shade of their mean.

    Raises ValueError for no tokens, or for one that does not fit a model of `num_layers` layers.
    """
    check_tokens(tokens, num_layers, "the text")
    styles = _styles(num_layers)
    shared: list[list[TokenDepth]] = []
    for token in tokens:
        if token.part and shared:
            shared[-1].append(token)
        else:
            shared.append([token])
    return _joined([(row[0].text, styles[round(fmean(token.blocks for token in row))]) for row in shared])


def legend(num_layers: int) -> Text:
    """One swatch for each number of blocks from 0 to L, in the shades of `depth_text`."""
    swatches = [(f" {blocks} ", style) for blocks, style in enumerate(_styles(num_layers))]
    return _joined([("blocks run ", Style()), *swatches])


def comparison_table(rows: Sequence[Sequence[str]], columns: Sequence[str], title: str) -> Table:
    """A table, its first column for names, the others for values, aligned right.

    Raises ValueError for no rows, or for a row that has not as many cells as there are columns.
    """
    if not len(rows):
        raise ValueError(f"the table {title!r} has no rows; expected at least one")
    table = Table(title=_plain(title))
    for number, column in enumerate(columns):
        table.add_column(_plain(column), justify="right" if number else "left", overflow="fold")
    for number, row in enumerate(rows):
        if len(row) != len(columns):
            got = f"row {number} of the table {title!r} has {len(row)} cells"
            raise ValueError(f"{got}; expected {len(columns)}")
        table.add_row(*map(_plain, row))
    return table


def _styles(num_layers: int) -> list[Style]:
    return [Style(color=shade.ink, bgcolor=shade.background) for shade in palette(num_layers)]


def _plain(text: str) -> Text:
    return Text(visible(text))


def _joined(parts: Sequence[tuple[str, Style]]) -> Text:
    return Text.assemble(*((visible(text), style) for text, style in parts))
