"""A self-contained HTML page: every token of a text, coloured by the number of blocks it ran.

The page needs no script and no network: its one style sheet is allowed by its hash, all else is forbidden.
What all reports share is here too: the palette, the check of the tokens, the visible form of odd characters.
"""

import math
import os
from base64 import b64encode
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from html import escape
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

# Nine points of viridis (CC0): readable with every common colour blindness, and in grey.
ANCHORS = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21908c", "#27ad81", "#5dc863", "#aadc32", "#fde725")
GATE_LEVELS = 9  # heights of a bar in the card of a token

# What would steer a terminal or a browser rather than be read: C0 and DEL get their control pictures;
# C1, bidirectional overrides, line separators and lone surrogates have none and get U+FFFD.
_SILENT = (*range(0x80, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))
_VISIBLE = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_VISIBLE |= dict.fromkeys((*_SILENT, *range(0xD800, 0xE000)), 0xFFFD)
_SPACES = {ord(" "): "␣", ord("\n"): "↵", ord("\t"): "⇥", 0xA0: "⍽"}


@dataclass(frozen=True)
class TokenDepth:
    """One token of a text and the depth it was given.

    text: what it stands for; where characters span several tokens, what these stand for together, in each of them.
    blocks: how many of the L blocks it ran, 0..L.
    loss_nats: the loss of predicting this token, in nats, or None where it is not known.
    gates: its gate in each layer, [L] values in 0..1, or empty where they are not known.
    part, num_parts: which one it is, from 0, of how many tokens that share `text`.
    """

    text: str
    blocks: int
    loss_nats: float | None = None
    gates: tuple[float, ...] = ()
    part: int = 0
    num_parts: int = 1


class Shade(NamedTuple):
    """A background and the ink, black or white, that reads best on it; both "#rrggbb"."""

    background: str
    ink: str


def palette(num_layers: int) -> tuple[Shade, ...]:
    """The L + 1 shades for 0..L blocks, dark to bright; ink on background has a WCAG contrast above 4.5."""
    if num_layers < 1:
        raise ValueError(f"num_layers is {num_layers}; a model has at least 1 layer")
    points = [[int(anchor[i : i + 2], 16) for i in (1, 3, 5)] for anchor in ANCHORS]
    shades: list[Shade] = []
    for blocks in range(num_layers + 1):
        low, part = divmod(blocks * (len(points) - 1) / num_layers, 1)
        ends = zip(points[int(low)], points[min(int(low) + 1, len(points) - 1)], strict=True)
        rgb = [round(a + (b - a) * part) for a, b in ends]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb)]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        # The contrast is (lighter + 0.05) / (darker + 0.05), so white and black tie where its square is 21.
        ink = "#000000" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "#ffffff"
        shades.append(Shade("#" + "".join(f"{v:02x}" for v in rgb), ink))
    return tuple(shades)


def visible(text: str) -> str:
    """`text` with every control character made visible and harmless, newline and tab kept; same length."""
    return text.translate(_VISIBLE)


def check_tokens(tokens: Sequence[TokenDepth], num_layers: int, where: str) -> None:
    """Raises ValueError, naming `where` and the token, for no tokens or one that does not fit L layers."""
    if not len(tokens):
        raise ValueError(f"{where} has no tokens; expected at least one")
    for number, token in enumerate(tokens):
        problem = ""
        if token.blocks not in range(num_layers + 1):
            problem = f"blocks={token.blocks}; expected a whole number from 0 to {num_layers}"
        elif len(token.gates) not in (0, num_layers):
            problem = f"{len(token.gates)} gates; expected none, or one for each of {num_layers} layers"
        elif not all(0 <= gate <= 1 for gate in token.gates):
            problem = f"gates {[float(gate) for gate in token.gates]}; expected values from 0 to 1"
        elif token.loss_nats is not None and not math.isfinite(token.loss_nats):
            problem = f"loss_nats={token.loss_nats}; expected a finite number, or None where it is not known"
        elif token.part not in range(token.num_parts):
            problem = f"part={token.part} of num_parts={token.num_parts}; expected one from 0 to below that"
        if problem:
            raise ValueError(f"token {number} of {where} has {problem}")


def write_page(
    path: str | os.PathLike[str],
    title: str,
    passages: Sequence[tuple[str, Sequence[TokenDepth]]],
    num_layers: int,
    summary: Mapping[str, str] = {},
) -> None:
    """Writes the page: summary, legend with the share of tokens at each depth, every (heading, tokens).

    Pointing at a token, or focusing it, shows its text, blocks, loss and gates. Any text is escaped. Of tokens that
    share a text the first one has it and the others a dot, which is not copied with the text.
    Raises ValueError for no passage, a passage without tokens, or a token that does not fit `num_layers`.
    """
    if not len(passages):
        raise ValueError("there are no passages to show; expected at least one (heading, tokens) pair")
    style = _style(num_layers)
    for number, (heading, tokens) in enumerate(passages):
        check_tokens(tokens, num_layers, f"passage {number} ({heading!r})")
    digest = b64encode(sha256(style.encode()).digest()).decode()
    facts = "".join(f"<div><dt>{_safe(k)}</dt><dd>{_safe(v)}</dd></div>" for k, v in summary.items())
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'sha256-{digest}';
 base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_safe(title)}</title>
<style>{style}</style></head>
<body><header><h1>{_safe(title)}</h1>
{f"<dl>{facts}</dl>" if facts else ""}
<p>The colour of a token says how many of the {num_layers} blocks it ran.
Point at it, tap it, or reach it with Tab to see more.</p>
{_legend([token for _, tokens in passages for token in tokens], num_layers)}</header>
<main>{"".join(_passage(heading, tokens, num_layers) for heading, tokens in passages)}</main></body></html>
"""
    Path(path).write_text(page, encoding="utf-8", newline="\n")


def _safe(text: str) -> str:
    return escape(visible(text), quote=True)


def _legend(tokens: Sequence[TokenDepth], num_layers: int) -> str:
    count = Counter(int(token.blocks) for token in tokens)
    top = max(count.values())
    items = (
        f'<li><svg viewBox="0 0 1 1" preserveAspectRatio="none"><rect class="d{blocks}" width="1" height="1"'
        f' y="{1 - count[blocks] / top:.4g}"/></svg><span class="d{blocks}">{blocks}</span>'
        f"{count[blocks] / len(tokens):.1%}</li>"
        for blocks in range(num_layers + 1)
    )
    return f'<ol aria-label="share of tokens by blocks run">{"".join(items)}</ol>'


def _passage(heading: str, tokens: Sequence[TokenDepth], num_layers: int) -> str:
    losses = [token.loss_nats for token in tokens if token.loss_nats is not None]
    mean_blocks = math.fsum(token.blocks for token in tokens) / len(tokens)
    notes = f"{len(tokens):,} token{'s' * (len(tokens) != 1)} · {mean_blocks:.2f} blocks a token"
    if losses:
        notes += f" · {math.fsum(losses) / len(losses):.3f} nats a token"
    body = "".join(_token(token, num_layers) for token in tokens)
    return f'<section><h2>{_safe(heading)}</h2><p>{notes}</p>\n<div translate="no">{body}</div></section>\n'


def _token(token: TokenDepth, num_layers: int) -> str:
    """A token, <b>, around the card that it shows, <i>; the tags are short because there are thousands."""
    text = _safe(token.text)
    share = f"token {token.part + 1} of {token.num_parts}, " if token.num_parts > 1 else ""
    card = f"<q>{text.translate(_SPACES) or '∅'}</q>{share}{int(token.blocks)} of {num_layers} blocks"
    if token.loss_nats is not None:
        card += f"\n{token.loss_nats:.2f} nats, {token.loss_nats / math.log(2):.2f} bits"
    if len(token.gates):
        levels = (_level(gate) for gate in token.gates)
        runs = "".join(f"V{GATE_LEVELS - level}h{len(list(run))}" for level, run in groupby(levels))
        card += f'<svg><path d="M0 {GATE_LEVELS}{runs}V{GATE_LEVELS}z"/></svg>'
    text = "<s></s>" if token.part else text.replace("\n", "<u></u><br>") or "∅"
    return f"<b class=d{int(token.blocks)} tabindex=0>{text}<i>{card}</i></b>"


def _level(gate: float) -> int:
    """The height of a gate's bar; only exactly 0, skipped, is empty, and only exactly 1 is full."""
    return min(max(round(GATE_LEVELS * gate), math.ceil(gate)), GATE_LEVELS - math.ceil(1 - gate))


def _style(num_layers: int) -> str:
    """The style sheet; it depends on L alone, so no text of a user can reach it."""
    shades = "".join(
        f".d{blocks}{{background:{shade.background};color:{shade.ink};fill:{shade.background}}}\n"
        for blocks, shade in enumerate(palette(num_layers))
    )
    wide, high = min(max(216 // num_layers, 3), 12), 4  # pixels of one layer and of one level of its gate
    return f"""{_SHEET}{shades}i svg{{width:{wide * num_layers}px;height:{high * GATE_LEVELS}px;
mask:repeating-linear-gradient(90deg,#000 0 {wide - 1}px,#0000 0 {wide}px)}}
path{{transform:scale({wide},{high})}}
i:has(svg)::after{{content:"gate by layer, 0 to {num_layers - 1}"}}
"""


# A token's card stands beside it where browsers support anchors, and at the foot of the window elsewhere.
_SHEET = """
:root{--page:#fff;--ink:#1b1b20;--soft:#5d5d68;--line:#e2e2e8;--card:#fff;--bar:#27808e;
color-scheme:light dark}
@media(prefers-color-scheme:dark){
:root{--page:#141418;--ink:#ececf1;--soft:#a3a3af;--line:#34343d;--card:#222229;--bar:#5dc863}}
body{margin:0 auto;padding:2rem 1rem 10rem;max-width:60rem;background:var(--page);color:var(--ink);
font:1rem/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 1rem}
h2{font-size:1.15rem;margin:2.5rem 0 0}
p{margin:.2rem 0 .8rem;color:var(--soft);font-size:.9rem}
dl{display:flex;flex-wrap:wrap;gap:.6rem 2rem;margin:0 0 1rem}
dt{color:var(--soft);font-size:.8rem}
dd{margin:0;font-weight:600}
ol{display:grid;grid-template-columns:repeat(auto-fit,minmax(2.9rem,1fr));gap:.8rem 3px;
margin:1rem 0;padding:0;list-style:none}
li{text-align:center;font-size:.75rem;color:var(--soft)}
li svg{display:block;width:100%;height:3.5rem;shape-rendering:crispEdges}
li span{display:block;font-size:.85rem;font-weight:600;margin-bottom:.15rem}
section div{white-space:pre-wrap;tab-size:4;font-size:1.05rem;line-height:1.75}
b{font-weight:400;padding:.12em 0;border-radius:3px;box-shadow:inset 0 0 0 .5px var(--page);
-webkit-box-decoration-break:clone;box-decoration-break:clone;cursor:default}
b:is(:hover,:focus){outline:2px solid var(--ink);outline-offset:1px}
u,s{text-decoration:none;opacity:.6}
u::before{content:"↵"}
s::before{content:"·"}
i{display:none;position:fixed;inset:auto 1rem 1rem;z-index:1;pointer-events:none;white-space:pre-line;
width:fit-content;max-width:min(22rem,100vw - 4rem);margin:.4rem auto;padding:.5rem .8rem;
font:.85rem/1.45 system-ui,sans-serif;background:var(--card);color:var(--ink);
border:1px solid var(--line);border-radius:8px;box-shadow:0 4px 18px #0004}
b:is(:hover,:focus)>i{display:block}
b:hover>i{z-index:2}
q{display:block;quotes:none;font:600 1rem/1.4 ui-monospace,monospace}
i svg{display:block;margin:.4rem 0 .1rem;max-width:100%;background:var(--line);fill:var(--bar)}
i::after{color:var(--soft);font-size:.75rem}
@supports(position-area:end){
b:focus{anchor-name:--focus}b:focus>i{position-anchor:--focus}
b:hover{anchor-name:--hover}b:hover>i{position-anchor:--hover}
b>i{inset:auto;margin:.4rem 0;width:max-content;position-area:end span-all;position-try-fallbacks:flip-block}}
"""
