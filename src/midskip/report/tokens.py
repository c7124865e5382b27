"""What all reports share: a token and its depth, the palette, and the visible form of odd characters."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

# Nine points of viridis (CC0): readable with every common colour blindness, and in grey.
ANCHORS = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21908c", "#27ad81", "#5dc863", "#aadc32", "#fde725")

# What would steer a terminal or a browser rather than be read: C0 and DEL get their control pictures;
# C1, bidirectional overrides, line separators and lone surrogates have none and get U+FFFD.
_SILENT = (*range(0x80, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))
_VISIBLE = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_VISIBLE |= dict.fromkeys((*_SILENT, *range(0xD800, 0xE000)), 0xFFFD)


@dataclass(frozen=True)
class TokenDepth:
    """One token of a text and the depth it was given.

    text: what it stands for; where characters span several tokens, what these stand for together, in each of them.
    blocks: how many of the L blocks it ran, 0..L.
    loss_nats: the loss of predicting this token, in nats, or None where it is not known.
    gates: its gate in each layer, [L] values in 0..1, or empty where they are not known.
    part, num_parts: which one it is, from 0, of how many tokens that share `text`.
    scores: its depth score in each layer, [L], or empty where the policy has none; from 1 on it does not run.
    next_loss_nats: the loss of the prediction that it made, of the token after it, in nats, or None.
    next_rank: the rank of the token after it among the logits, 1 for the largest, or None.
    flops: FLOPs of its forward pass, or None where they are not known.
    """

    text: str
    blocks: int
    loss_nats: float | None = None
    gates: tuple[float, ...] = ()
    part: int = 0
    num_parts: int = 1
    scores: tuple[float, ...] = ()
    next_loss_nats: float | None = None
    next_rank: int | None = None
    flops: float | None = None


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


def safe(text: str) -> str:
    return escape(visible(text), quote=True)


def token_html(token: TokenDepth) -> str:
    """Its text, escaped, with line ends as <u> and <br>; a dot, <s>, for the later ones of tokens that share a text."""
    return "<s></s>" if token.part else safe(token.text).replace("\n", "<u></u><br>") or "∅"
