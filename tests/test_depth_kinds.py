"""Kinds of tokens, and the heat map."""

from __future__ import annotations

import re

from midskip.report import TokenDepth, depth_by_kind, heat_map, kinds_html, palette
from midskip.report.heat import MOST_COLUMNS, heat_style
from midskip.report.kinds import frequencies, shapes


def of(*texts: str) -> list[TokenDepth]:
    return [TokenDepth(text, 1) for text in texts]


def test_shapes_go_by_characters_and_by_what_stands_before() -> None:
    texts = ["The", " cat", "s", " sat", "-", "on", " 12", "3", ".", "\n", "re", "ally", "", " (a", "a1", "\ufffd"]
    assert shapes(of(*texts)) == [
        "word start", "word start", "part of a word", "word start", "punctuation", "word start", "digits", "digits",
        "punctuation", "space", "word start", "part of a word", "space", "word start", "part of a word", "punctuation",
    ]  # fmt: skip
    texts = ["don", "'", "t", " ‘", "ab", "cafe\u0301", "teria", "नि", "र्देश", " snake", "_case"]
    assert [number for number, shape in enumerate(shapes(of(*texts))) if shape == "word start"] == [0, 4, 9]
    assert shapes(of("ab", "Cd"), starts={1}) == ["word start"] * 2, "another text"
    assert shapes([TokenDepth("é", 1, part=part, num_parts=2) for part in (0, 1)]) == ["word start", "part of a word"]


def test_frequent_tokens_make_up_half_of_the_text() -> None:
    assert frequencies(of(*"aaaaabbbccde")) == [*["frequent"] * 8, "in between", "in between", "rare", "rare"]
    assert frequencies(of(*"abc")) == ["rare"] * 3


def test_depth_by_kind_is_a_mean() -> None:
    tokens = [
        TokenDepth(" one", 4, next_loss_nats=1.0),
        TokenDepth(" two", 1, next_loss_nats=3.0),
        TokenDepth(" one", 4),
        TokenDepth("7", 0, next_loss_nats=0.5),
    ]
    found = {kind.name: (kind.count, kind.mean_blocks, kind.next_loss_nats) for kind in depth_by_kind(tokens)}
    assert found == {
        "word start": (3, 3.0, 2.0), "digits": (1, 0.0, 0.5), "frequent": (2, 4.0, 1.0), "rare": (2, 0.5, 1.75)
    }  # fmt: skip
    table = kinds_html(tokens, 4)
    assert '<rect class="k6" width="75.0"' in table and "<td>3.00</td><td>2.00</td>" in table
    assert "two" not in table, "it shows kinds and no text"


def cells(svg: str, num_layers: int) -> dict[tuple[int, int], int]:
    """The shade at (layer, column), as a browser would draw the paths."""
    found: dict[tuple[int, int], int] = {}
    for step, path in re.findall(r'class="h(\d)" d="([^"]*)"', svg):
        x, y = 0, 0.0
        for kind, first, second in re.findall(r"([Mmh])(-?\d+) ?(-?[\d.]+)?", path):
            if kind == "h":
                for column in range(x, x + int(first)):
                    place = (round(num_layers - 0.5 - y), column)
                    assert place not in found, "drawn once"
                    found[place] = int(step)
                x += int(first)
            elif kind == "m":
                x, y = x + int(first), y + float(second)
            else:
                x, y = int(first), float(second)
    return found


def test_the_heat_map_shows_each_gate() -> None:
    gates = [(1.0, 0.5, 1.0), (1.0, 0.0, 0.001), (0.0, 0.0, 0.999), (1.0, 0.0, 1.0)]
    found = cells(heat_map([TokenDepth("x", 1, gates=row) for row in gates], 3), 3)
    assert found == {
        (0, 0): 8, (0, 1): 8, (0, 2): 0, (0, 3): 8,
        (1, 0): 4, (1, 1): 0, (1, 2): 0, (1, 3): 0,
        (2, 0): 8, (2, 1): 1, (2, 2): 8, (2, 3): 8,
    }  # fmt: skip
    assert f".heat .h8{{stroke:{palette(8)[8].background}}}" in heat_style()


def test_a_long_text_has_as_many_columns_as_a_screen_shows() -> None:
    tokens = [TokenDepth("x", 1, gates=(float(at % 2), 0.0)) for at in range(2 * MOST_COLUMNS)]
    svg = heat_map(tokens, 2, range(0, len(tokens), 1000))
    found = cells(svg, 2)
    assert len(found) == 2 * MOST_COLUMNS and {found[0, at] for at in range(MOST_COLUMNS)} == {4}
    assert 'd="M500 0v2M1000 0v2M1500 0v2"' in svg, "windows begin there"
