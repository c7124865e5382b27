"""A self-contained HTML page: every token of a text, coloured by the number of blocks it ran.

The page needs no script and no network: its one style sheet is allowed by its hash, all else is forbidden.
"""

import math
import os
from base64 import b64encode
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import sha256
from itertools import accumulate, groupby
from pathlib import Path

from midskip.report.heat import heat_map, heat_style
from midskip.report.kinds import kinds_html, kinds_style
from midskip.report.tokens import TokenDepth, check_tokens, palette, safe, token_html

GATE_LEVELS = 9  # heights of a bar in the card of a token
_SPACES = {ord(" "): "␣", ord("\n"): "↵", ord("\t"): "⇥", 0xA0: "⍽"}


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
    everything = [token for _, tokens in passages for token in tokens]
    starts = set(accumulate(len(tokens) for _, tokens in passages))
    for number, (heading, tokens) in enumerate(passages):
        check_tokens(tokens, num_layers, f"passage {number} ({heading!r})")
    digest = b64encode(sha256(style.encode()).digest()).decode()
    facts = "".join(f"<div><dt>{safe(k)}</dt><dd>{safe(v)}</dd></div>" for k, v in summary.items())
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'sha256-{digest}';
 base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{safe(title)}</title>
<style>{style}</style></head>
<body><header><h1>{safe(title)}</h1>
{f"<dl>{facts}</dl>" if facts else ""}
<p>The colour of a token says how many of the {num_layers} blocks it ran.
Point at it, tap it, or reach it with Tab to see more.</p>
{_legend(everything, num_layers)}
<details open><summary>Depth by kind of token</summary>{kinds_html(everything, num_layers, starts)}
<p>Frequent and rare are meant within these texts; nats are of the predictions that these tokens made.</p>
</details></header>
<main>{"".join(_passage(heading, tokens, num_layers) for heading, tokens in passages)}</main></body></html>
"""
    Path(path).write_text(page, encoding="utf-8", newline="\n")


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
    return (
        f'<section><h2>{safe(heading)}</h2><p>{notes}</p>\n<div translate="no">{body}</div>'
        f"<figure>{heat_map(tokens, num_layers)}<figcaption>layers × tokens: layer 0 is at the bottom, and a layer "
        "that a token skipped is darkest</figcaption></figure></section>\n"
    )


def _token(token: TokenDepth, num_layers: int) -> str:
    """A token, <b>, around the card that it shows, <i>; the tags are short because there are thousands."""
    text = safe(token.text)
    share = f"token {token.part + 1} of {token.num_parts}, " if token.num_parts > 1 else ""
    card = f"<q>{text.translate(_SPACES) or '∅'}</q>{share}{int(token.blocks)} of {num_layers} blocks"
    if token.loss_nats is not None:
        card += f"\n{token.loss_nats:.2f} nats, {token.loss_nats / math.log(2):.2f} bits"
    if token.next_loss_nats is not None:
        card += f"\npredicts the next with {token.next_loss_nats:.2f} nats, rank {token.next_rank}"
    if token.flops is not None:
        card += f"\n{token.flops:,.0f} FLOPs"
    if len(token.gates):
        card += _bars([_level(gate) for gate in token.gates])
    if len(token.scores):
        card += _bars([_score_level(score) for score in token.scores])
    return f"<b class=d{int(token.blocks)} tabindex=0>{token_html(token)}<i>{card}</i></b>"


def _level(gate: float) -> int:
    """The height of a gate's bar; only exactly 0, skipped, is empty, and only exactly 1 is full."""
    return min(max(round(GATE_LEVELS * gate), math.ceil(gate)), GATE_LEVELS - math.ceil(1 - gate))


def _score_level(score: float) -> int:
    """The height of a score's bar: above the middle where the layer is skipped, and else below it."""
    low = GATE_LEVELS // 2
    return min(low, round(low * score)) if score < 1 else min(GATE_LEVELS, low + 1 + round(low * (score - 1)))


def _bars(levels: Sequence[int]) -> str:
    runs = "".join(f"V{GATE_LEVELS - level}h{len(list(run))}" for level, run in groupby(levels))
    return f'<em><svg><path d="M0 {GATE_LEVELS}{runs}V{GATE_LEVELS}z"/></svg></em>'


def _style(num_layers: int) -> str:
    """The style sheet; it depends on L alone, so no text of a user can reach it."""
    shades = "".join(
        f".d{blocks}{{background:{shade.background};color:{shade.ink};fill:{shade.background}}}\n"
        for blocks, shade in enumerate(palette(num_layers))
    )
    wide, high = min(max(216 // num_layers, 3), 12), 4  # pixels of one layer and of one level of its gate
    return f"""{_SHEET}{shades}i svg{{width:{wide * num_layers}px;height:{high * GATE_LEVELS}px;
mask:repeating-linear-gradient(90deg,#000 0 {wide - 1}px,#0000 0 {wide}px)}}
{heat_style()}{kinds_style()}i path{{transform:scale({wide},{high})}}
em::after{{content:"gate by layer, 0 to {num_layers - 1}"}}
em+em::after{{content:"score by layer; where it is above the middle, the layer is skipped"}}
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
figure{margin:.8rem 0 0}
figcaption{font-size:.75rem;color:var(--soft)}
.heat{display:block;width:100%;height:6rem}
.heat path{fill:none;stroke-width:1;shape-rendering:crispEdges}
summary{cursor:pointer;margin-top:1rem;font-weight:600}
.kinds{border-collapse:collapse;width:100%;font-size:.85rem}
.kinds :is(th,td){text-align:right;font-weight:400;padding:.15rem .5rem;border-bottom:1px solid var(--line)}
.kinds th:first-child{text-align:left}
.kinds .bar{width:45%}
.kinds svg{display:block;width:100%;height:.9rem;background:var(--line)}
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
em{font-style:normal}
em::after{color:var(--soft);font-size:.75rem}
@supports(position-area:end){
b:focus{anchor-name:--focus}b:focus>i{position-anchor:--focus}
b:hover{anchor-name:--hover}b:hover>i{position-anchor:--hover}
b>i{inset:auto;margin:.4rem 0;width:max-content;position-area:end span-all;position-try-fallbacks:flip-block}}
"""
