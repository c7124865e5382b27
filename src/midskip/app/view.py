"""HTML of a text as a run saw it. All that comes from texts and tokenizers is escaped here."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence

from midskip.app.session import Seen
from midskip.look import Outcome
from midskip.report import TokenDepth, heat_map, kinds_html, safe, token_html, visible

HINT = "Type or paste text above: each token gets the colour of the number of blocks that it ran."
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def amount(value: float, unit: str = "") -> str:
    """Three digits and a prefix: 2.13 M."""
    for size, prefix in PREFIXES:
        if value >= 0.9995 * size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".strip()


def duration(seconds: float) -> str:
    return (
        f"{seconds * 1e6:.3g} µs"
        if seconds < 0.9995e-3
        else f"{seconds * 1e3:.3g} ms"
        if seconds < 0.9995
        else f"{seconds:.3g} s"
    )


def text_html(tokens: Sequence[TokenDepth], window: int | None = None) -> str:
    """The tokens, one light element each, in a block for each window."""
    window = window or len(tokens)
    pieces = []
    for start in range(0, len(tokens), window):
        body = "".join(
            f"<b class=d{token.blocks} data-i={number}>{token_html(token)}</b>"
            for number, token in enumerate(tokens[start : start + window], start)
        )
        name = f' data-from="token {start:,}: the model begins anew"' if start else ""
        pieces.append(f"<div class=ms-window{name}>{body}</div>")
    about = "Tokens coloured by blocks run. Arrow keys move, Enter runs the token at other depths."
    return f'<div class=ms-text role=group tabindex=0 translate=no aria-label="{about}">{"".join(pieces)}</div>'


def view_html(seen: Seen | None) -> str:
    """Numbers, text, legend and heat map."""
    if seen is None:
        return f"<p class=ms-hint>{HINT}</p>"
    look = seen.look
    left_out = f"<p class=ms-hint>{seen.left_out:,} more tokens are left out.</p>" if seen.left_out else ""
    windows = range(0, len(look.tokens), look.window)
    return f"""<div class="ms l{look.num_layers}" data-look="{safe(_data(seen))}">{_facts(seen)}
{text_html(look.tokens, look.window)}{left_out}{legend_html(look.tokens, look.num_layers)}
<h4>Layers × tokens</h4><div class=ms-heat>{heat_map(look.tokens, look.num_layers, windows)}</div>
<p class=ms-note>Layer 0 is at the bottom; a layer that a token skipped is darkest.</p></div>"""


def charts_html(seen: Seen | None) -> str:
    """Depth by kind of token."""
    if seen is None:
        return ""
    note = "Frequent and rare are meant within this text; nats are of the predictions that these tokens made."
    table = kinds_html(seen.look.tokens, seen.look.num_layers)
    return f"<div class=ms><h4>Depth by kind of token</h4>{table}<p class=ms-note>{note}</p></div>"


def stream_html(tokens: Sequence[TokenDepth], num_layers: int, left_out: int = 0) -> str:
    """The text and the legend alone, while tokens come. `left_out`: tokens before them that the model does not read."""
    told = f"{left_out:,} tokens before these are not read: the context has no room for them and for what is new."
    hint = f"<p class=ms-hint>{told}</p>" if left_out else ""
    return f'<div class="ms l{num_layers}">{hint}{text_html(tokens)}{legend_html(tokens, num_layers)}</div>'


def legend_html(tokens: Sequence[TokenDepth], num_layers: int) -> str:
    count = Counter(token.blocks for token in tokens)
    items = "".join(
        f"<li><span class=d{blocks}>{blocks}</span>{count[blocks] / len(tokens):.0%}</li>"
        for blocks in range(num_layers + 1)
    )
    return f'<ol class=ms-legend aria-label="share of tokens by blocks run">{items}</ol>'


def _facts(seen: Seen) -> str:
    look = seen.look
    count = len(look.tokens)
    rows = [
        ("loss", "not known" if look.loss_nats is None else f"{look.loss_nats:.3f} nats a token", ""),
        ("blocks that ran", f"{look.executed_share:.1%}", "of the block-tokens"),
        ("FLOPs", f"{amount(look.flops / count)} a token", f"of {amount(look.dense_flops / count)} with all run"),
        ("KV cache", amount(look.kv_bytes, "B"), f"of {amount(look.dense_kv_bytes, 'B')} with all run"),
        ("speed", f"{amount(count / look.seconds)} tokens/s", f"{count:,} tokens in {duration(look.seconds)}"),
    ]
    body = "".join(f"<div><dt>{name}</dt><dd>{value}</dd><dd>{more}</dd></div>" for name, value, more in rows)
    return f"<dl class=ms-facts>{body}</dl>"


def _data(seen: Seen) -> str:
    """What the card of a token shows, as JSON; the script on the page puts it there as text."""
    look = seen.look
    return json.dumps(
        {
            "layers": look.num_layers,
            "vocabulary": seen.vocab_size,
            "text": [visible(token.text) for token in look.tokens],
            "part": [f"{token.part + 1} of {token.num_parts}" if token.num_parts > 1 else 0 for token in look.tokens],
            "blocks": [token.blocks for token in look.tokens],
            "loss": [_short(token.loss_nats) for token in look.tokens],
            "next": [_short(token.next_loss_nats) for token in look.tokens],
            "rank": [token.next_rank for token in look.tokens],
            "flops": [amount(token.flops or 0) for token in look.tokens],
            "time": [duration(look.seconds * (token.flops or 0) / look.flops) for token in look.tokens],
            "gates": [[_short(gate) for gate in token.gates] for token in look.tokens],
            "scores": [[_short(score) for score in token.scores] for token in look.tokens],
        },
        separators=(",", ":"),
    )


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.3g}")


NAMES = {
    "as_it_is": "as it is",
    "one_earlier": "one layer earlier",
    "everything": "every layer",
}


def picked_html(seen: Seen, number: int, outcomes: dict[str, Outcome]) -> str:
    """A token that was picked: its numbers by layer, and what it gave at other depths."""
    token, look = seen.look.tokens[number], seen.look
    gates = "".join(f"<td>{gate:.3g}</td>" for gate in token.gates)
    scores = "".join(f"<td>{amount(score) if score >= 1e3 else f'{score:.3g}'}</td>" for score in token.scores)
    layers = "".join(f"<th scope=col>{layer}</th>" for layer in range(look.num_layers))
    table = f"<tr><th scope=row>layer</th>{layers}</tr><tr><th scope=row>gate</th>{gates}</tr>"
    table += f"<tr><th scope=row>score</th>{scores}</tr>" if scores else ""
    plain = outcomes["as_it_is"]
    rows = "".join(_outcome(NAMES[name], outcomes[name], plain) for name in NAMES if name in outcomes)
    head = "".join(
        f"<th scope=col>{name}</th>"
        for name in ("this token", "blocks", "its prediction, nats", "rank", "later ones, sum", "FLOPs")
    )
    following = look.tokens[number + 1].text if number + 1 < len(look.tokens) else None
    told = "It is the last one." if following is None else f"It predicts <q>{safe(following)}</q>."
    note = "Each row is a pass over the window that was really run; the differences are to the first row."
    if "one_earlier" not in outcomes:
        note += " The token ran no layer, and cannot leave earlier."
    return (
        f"<div class=ms-picked><h4>Token {number:,}: <q>{safe(token.text)}</q></h4><p>{told}</p>"
        f"<div class=ms-wide><table>{table}</table></div>"
        f"<div class=ms-wide><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        f"<p class=ms-note>{note}</p></div>"
    )


def _outcome(name: str, outcome: Outcome, plain: Outcome) -> str:
    def number(value: float | None, base: float | None) -> str:
        if value is None or base is None:
            return "–"
        return f"{value:.3f}" + ("" if outcome is plain else f" ({value - base:+.3f})".replace("-", "−"))

    rank = "–" if outcome.next_rank is None else f"{outcome.next_rank:,}"
    more = outcome.flops - plain.flops
    flops = amount(outcome.flops) if outcome is plain else f"{'−' if more < 0 else '+'}{amount(abs(more))}"
    cells = (
        sum(outcome.layers), number(outcome.next_loss_nats, plain.next_loss_nats), rank,
        number(outcome.later_nats, plain.later_nats), flops,
    )  # fmt: skip
    return f"<tr><th scope=row>{name}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
