"""The reports: no text becomes markup or steers a terminal, pages stay small, colours stay legible."""

import math
import re
import xml.etree.ElementTree as ElementTree
from base64 import b64encode
from collections.abc import Callable
from hashlib import sha256
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console, RenderableType

from midskip.report import (
    TokenDepth,
    comparison_table,
    depth_text,
    legend,
    palette,
    write_idea,
    write_page,
    write_picture,
)

HOSTILE = (
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "a & b &amp; &#60;",
    "]]> --> </style></title></i></b>",
    "javascript:alert(1)",
    "\x1b[31mred\x1b]0;title\x07\x9b2J\x00\x7f\r",
    "\u202eevil\u2066",
)
TWO_CELLS: Any = ("a", "b")
SILENT = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"


def made_visible(text: str) -> str:
    text = re.sub(r"[\x00-\x1f]", lambda match: chr(0x2400 + ord(match[0])), text)
    return re.sub(SILENT, "\ufffd", text.replace("\x7f", "\u2421"))


class Page(HTMLParser):
    """Reads a page back as a browser would: the text around the cards, the cards, tags, attributes, style."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[tuple[str, str | None]] = set()
        self.text, self.cards, self.style = "", [], ""
        self.open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.update(attrs)
        if tag == "i":
            self.cards.append("")
        elif tag == "br":
            self.text += "\n"
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.update(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            self.style += data
        elif "i" in self.open:
            self.cards[-1] += data
        else:
            self.text += data


def page_of(tmp_path: Path, tokens: list[TokenDepth], num_layers: int = 4, **more: object) -> Page:
    path = tmp_path / "page.html"
    write_page(path, str(more.get("title", "t")), [(str(more.get("heading", "h")), tokens)], num_layers)
    return Page(path)


def rendered(renderable: RenderableType) -> str:
    console = Console(file=StringIO(), force_terminal=True, color_system="truecolor", width=100)
    console.print(renderable)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def without_colour(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_becomes_markup(tmp_path: Path, text: str) -> None:
    plain = page_of(tmp_path, [TokenDepth("x", 1)])
    path = tmp_path / "hostile.html"
    write_page(path, text, [(text, [TokenDepth(text, 1)])], 4, {text: text})
    page = Page(path)
    assert set(page.tags) - set(plain.tags) <= {"dl", "div", "dt", "dd"}
    assert "script" not in page.tags and "img" not in page.tags
    assert {name for name, _ in page.attributes} == {name for name, _ in plain.attributes}
    assert not re.search(SILENT, page.source)
    shown = made_visible(text)
    assert page.text.count(shown) == 6, "twice the title, the heading, the token, and both sides of the summary"
    assert shown.replace(" ", "␣") in page.cards[0]


def test_page_allows_its_own_style_and_nothing_else(tmp_path: Path) -> None:
    page = page_of(tmp_path, [TokenDepth("x", 1, 1.0, (1.0, 0.5, 0.0, 0.0))])
    policy = next(value for name, value in page.attributes if name == "content" and value and "src" in value)
    digest = b64encode(sha256(page.style.encode()).digest()).decode()
    assert [part.strip() for part in policy.split(";")] == [
        "default-src 'none'", f"style-src 'sha256-{digest}'", "base-uri 'none'", "form-action 'none'"
    ]  # fmt: skip
    assert not re.search(r"https?:|url\(|@import|\bsrc=|\bhref=|\bstyle=|<script", page.source)


def test_page_shows_every_token_once_with_its_card(tmp_path: Path) -> None:
    tokens = [
        TokenDepth("Two", 0),
        TokenDepth(" words\n\n", 4, math.log(2)),
        TokenDepth("\t\ufffd", 2, 0.0, (1.0, 0.001, 0.999, 0.0)),
        TokenDepth("", 2),
        TokenDepth("\ud800", 2),
    ]
    page = page_of(tmp_path, tokens, title="Title & all")
    assert page.tags.count("b") == page.tags.count("i") == len(tokens)
    assert "Two words\n\n\t\ufffd∅\ufffd" in page.text
    assert page.cards == [
        "Two0 of 4 blocks",
        "␣words↵↵4 of 4 blocks\n0.69 nats, 1.00 bits",
        "⇥\ufffd2 of 4 blocks\n0.00 nats, 0.00 bits",
        "∅2 of 4 blocks",
        "\ufffd2 of 4 blocks",
    ]
    # Bars from the left; only a gate of exactly 1 is full and only one of exactly 0 is empty.
    assert ("d", "M0 9V0h1V8h1V1h1V9h1V9z") in page.attributes
    assert "5 tokens · 2.00 blocks a token · 0.347 nats a token" in page.text
    assert re.search(r"020\.0%10\.0%260\.0%30\.0%420\.0%", page.text), "the share of tokens at each depth"


def test_a_character_of_several_tokens_is_shown_once(tmp_path: Path) -> None:
    tokens = [
        TokenDepth("a", 0),
        *(TokenDepth("中", blocks, part=part, num_parts=3) for part, blocks in enumerate((1, 2, 4))),
    ]
    page = page_of(tmp_path, tokens)
    assert "a中" in page.text and page.text.count("中") == 1 and page.tags.count("s") == 2
    assert page.cards[1:] == [f"中token {part + 1} of 3, {blocks} of 4 blocks" for part, blocks in enumerate((1, 2, 4))]
    assert {f"d{blocks}" for blocks in (0, 1, 2, 4)} <= {value for name, value in page.attributes if name == "class"}
    text = depth_text(tokens, 4)
    assert text.plain == "a中"
    assert [span.style for span in text.spans] == [
        span.style for span in depth_text([TokenDepth("a", 0), TokenDepth("中", 2)], 4).spans
    ], "on the shade of the mean"
    with pytest.raises(ValueError, match=r"token 0 of .* has part=3 of num_parts=3; expected one from 0"):
        depth_text([TokenDepth("中", 1, part=3, num_parts=3)], 4)


def test_a_card_has_what_the_token_gave_and_what_it_cost(tmp_path: Path) -> None:
    known = {"scores": (0.5, 1.5, 0.999, 1.0), "next_loss_nats": 2.5, "next_rank": 17, "flops": 12345.0}
    page = page_of(tmp_path, [TokenDepth("x", 2, 1.0, (1.0, 0.0, 0.0, 1.0), **known)])  # pyright: ignore[reportArgumentType]
    assert "predicts the next with 2.50 nats, rank 17\n12,345 FLOPs" in page.cards[0]
    # below the middle, of 9 levels, where the layer runs, and above it where it is skipped
    assert '<path d="M0 9V7h1V2h1V5h1V4h1V9z"/>' in page.source
    assert page.source.count("<em><svg>") == 2 and 'em+em::after{content:"score by layer' in page.style


def test_page_stays_small(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    gates = generator.random((5000, 12)).round(2)
    tokens = [TokenDepth(" token", int(n % 13), float(n) / 1000, tuple(gates[n])) for n in range(5000)]
    page = page_of(tmp_path, tokens, 12)
    assert page.tags.count("b") == 5000
    assert len(page.source.encode()) < 1_000_000


def test_numpy_values_are_as_good_as_python_values(tmp_path: Path) -> None:
    plain = TokenDepth("x", 1, 0.5, (1.0, 0.0))
    arrays = TokenDepth("x", np.int64(1), np.float64(0.5), np.array([1.0, 0.0]))  # pyright: ignore[reportArgumentType]
    assert page_of(tmp_path, [plain], 2).source == page_of(tmp_path, [arrays], 2).source


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (TokenDepth("x", 5), r"token 1 of .* has blocks=5; expected a whole number from 0 to 4"),
        (TokenDepth("x", -1), "blocks=-1"),
        (TokenDepth("x", 1.5), r"blocks=1\.5"),  # pyright: ignore[reportArgumentType]
        (TokenDepth("x", 1, gates=(1.0,)), "has 1 gates; expected none, or one for each of 4 layers"),
        (
            TokenDepth("x", 1, gates=(1.0, 0.0, 0.0, 1.5)),
            r"gates \[1\.0, 0\.0, 0\.0, 1\.5\]; expected .* 0 to 1",
        ),
        (TokenDepth("x", 1, gates=(1.0, 0.0, 0.0, math.nan)), "expected values from 0 to 1"),
        (TokenDepth("x", 1, math.nan), "loss_nats=nan; expected a finite number, or None"),
    ],
)
def test_a_token_that_does_not_fit_is_named(tmp_path: Path, token: TokenDepth, message: str) -> None:
    for report in (lambda tokens: page_of(tmp_path, tokens), lambda tokens: depth_text(tokens, 4)):
        with pytest.raises(ValueError, match=message):
            report([TokenDepth("fine", 1), token])
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: write_page(path, "t", [], 4), "no passages"),
        (
            lambda path: write_page(path, "t", [("good", [TokenDepth("x", 1)]), ("bad", [])], 4),
            "passage 1 .'bad'. has no",
        ),
        (lambda path: write_page(path, "t", [("h", [TokenDepth("x", 0)])], 0), "num_layers is 0"),
        (lambda path: depth_text([], 4), "the text has no tokens"),
        (lambda path: legend(0), "num_layers is 0"),
        (lambda path: comparison_table([], ("a", "b", "c"), "speed"), "table 'speed' has no rows"),
        (
            lambda path: comparison_table([TWO_CELLS], ("a", "b", "c"), "speed"),
            "row 0 .* has 2 cells; expected 3",
        ),
        (lambda path: write_picture(path, [], []), "share_by_layer has 0 layers; expected at least 1"),
        (lambda path: write_picture(path, [0.5, 1.1], []), r"share_by_layer is \[0\.5, 1\.1\]; .* 0 to 1"),
        (lambda path: write_picture(path, [0.5], [(7, [0.5, 0.5])]), "step 7 has 2 layers; expected 1"),
        (lambda path: write_picture(path, [0.5], [(7, [math.nan])]), r"step 7 is \[nan\]"),
        (
            lambda path: write_picture(path, [0.5], [(7, [0.5]), (7, [0.5])]),
            r"\[7, 7\]; expected each to be above",
        ),
    ],
)
def test_what_cannot_be_shown_is_refused(tmp_path: Path, call: Callable[[Path], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("num_layers", [1, 2, 7, 12, 63])
def test_palette_is_legible_and_rises(num_layers: int) -> None:
    def luminance(colour: str) -> float:
        values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(values <= 0.03928, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    shades = palette(num_layers)
    assert len(shades) == num_layers + 1
    backgrounds = [luminance(shade.background) for shade in shades]
    assert backgrounds == sorted(set(backgrounds)), "more blocks, brighter: it also reads in grey"
    for shade in shades:
        dark, light = sorted((luminance(shade.background), luminance(shade.ink)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5


@pytest.mark.parametrize("text", [*HOSTILE, "[bold]not markup[/bold]", "[/]"])
def test_no_text_steers_the_terminal(text: str) -> None:
    tokens = depth_text([TokenDepth(text, 2)], 4)
    assert without_colour(rendered(tokens)) == made_visible(text) + "\n"
    cells = without_colour(rendered(comparison_table([(text, "b", "c")], ("a", text, "c"), text)))
    assert cells.count(made_visible(text)) == 3
    assert not re.search(SILENT, cells)


def test_terminal_text_keeps_the_text_and_its_colours() -> None:
    tokens = [TokenDepth("One\n", 0), TokenDepth("\ttwo", 3)]
    text = depth_text(tokens, 3)
    assert text.plain == "One\n\ttwo"
    low, high = palette(3)[0].background, palette(3)[3].background
    assert [str(span.style).split(" on ")[1] for span in text.spans] == [low, high]
    assert without_colour(rendered(legend(3))) == "blocks run  0  1  2  3 \n"


def test_comparison_table_shows_its_cells() -> None:
    shown = rendered(comparison_table([("loss", "3.2", "3.3")], ("", "midskip", "dense"), "Quality"))
    assert all(word in shown for word in ("Quality", "midskip", "dense", "loss", "3.2", "3.3"))


@pytest.mark.parametrize(("num_layers", "num_points"), [(1, 0), (12, 5)])
@pytest.mark.integration
def test_picture_is_drawn(tmp_path: Path, num_layers: int, num_points: int) -> None:
    shares = np.linspace(1.0, 0.1, num_layers)
    history = [(50 * point, shares ** (point / num_points)) for point in range(num_points)]
    write_picture(
        tmp_path / "shares.png", list(shares), [(step, list(row)) for step, row in history], "costs $5 or $b$"
    )
    pixels = imread(tmp_path / "shares.png")
    assert pixels.shape[1] == (1500 if num_points else 750)
    assert np.asarray(pixels)[..., :3].std() > 0.1
    assert len(np.unique((np.asarray(pixels)[..., :3] * 255).astype(int).reshape(-1, 3), axis=0)) > 20


def test_idea_is_a_self_contained_svg(tmp_path: Path) -> None:
    write_idea(tmp_path / "idea.svg")
    source = (tmp_path / "idea.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(source)
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"layer 0", "layer L−1", "skipped: no compute, no attention, no KV"} <= set(words)
    assert not re.search(r"href|<image|<style|url\((?!#)|@import", source)
    background = root.find("{http://www.w3.org/2000/svg}rect")
    assert background is not None
    assert background.attrib == {"width": root.get("width"), "height": root.get("height"), "fill": "#fff"}
