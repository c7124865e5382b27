"""Depth by kind of token: a part of a word, a word's start, digits, punctuation, rare or frequent."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass
from statistics import fmean

from midskip.report.tokens import TokenDepth, palette, safe

SHAPES = ("word start", "part of a word", "digits", "punctuation", "space", "other")
FREQUENCIES = ("frequent", "in between", "rare")
ABOUT = {
    "word start": "begins with a space or after something that is no letter or digit",
    "part of a word": "goes on with a word that an earlier token began, or is a part of a character",
    "frequent": "of the most frequent tokens, which together make up half of this text",
    "rare": "once in this text",
}


@dataclass(frozen=True)
class Kind:
    """Of the tokens of one kind: how many, the blocks that they ran on average, and the mean loss of the predictions
    that they made, in nats, or None."""

    name: str
    count: int
    mean_blocks: float
    next_loss_nats: float | None


JOINS = "'’_"  # within a word, they do not end it


def _is_of_word(character: str) -> bool:
    """Letters, digits, and the marks on them."""
    return character.isalnum() or unicodedata.category(character)[0] == "M"


def shapes(tokens: Sequence[TokenDepth], starts: Container[int] = ()) -> list[str]:
    """Of each token, one of `SHAPES`: what its characters are, and what stands before them. `starts`: tokens with which
    a text begins, beside the first."""
    found, before = [], " "
    for number, token in enumerate(tokens):
        text, bare = token.text, token.text.strip()
        before = " " if number in starts else before
        if token.part:
            found.append("part of a word")
            continue
        if not bare:
            shape = "space"
        elif all(unicodedata.category(one)[0] == "N" for one in bare):
            shape = "digits"
        elif any(one.isalpha() for one in bare):
            goes_on = (_is_of_word(text[0]) or text[0] in JOINS) and _is_of_word(before)
            shape = "part of a word" if goes_on else "word start"
        else:
            shape = "punctuation" if all(unicodedata.category(one)[0] in "PS" for one in bare) else "other"
        found.append(shape)
        at_end = text[-2:-1] or before if text[-1:] in tuple(JOINS) else text[-1:]
        before = at_end if _is_of_word(at_end or " ") else text[-1:] or before
    return found


def frequencies(tokens: Sequence[TokenDepth]) -> list[str]:
    """Of each token, one of `FREQUENCIES`, within these tokens."""
    keys = [(token.text, token.part) for token in tokens]
    counts, frequent, so_far = Counter(keys), set(), 0
    for key, count in counts.most_common():
        if so_far * 2 < len(keys):
            frequent.add(key)
        so_far += count
    return ["rare" if counts[key] == 1 else "frequent" if key in frequent else "in between" for key in keys]


def depth_by_kind(tokens: Sequence[TokenDepth], starts: Container[int] = ()) -> list[Kind]:
    """Of each kind that there is, in the order of `SHAPES` and `FREQUENCIES`. A token is of one kind of each.
    `starts`: as of `shapes`."""
    found = []
    for names, known in ((shapes(tokens, starts), SHAPES), (frequencies(tokens), FREQUENCIES)):
        for name in known:
            some = [token for token, its in zip(tokens, names, strict=True) if its == name]
            losses = [token.next_loss_nats for token in some if token.next_loss_nats is not None]
            if some:
                blocks = fmean(token.blocks for token in some)
                found.append(Kind(name, len(some), blocks, fmean(losses) if losses else None))
    return found


def kinds_html(tokens: Sequence[TokenDepth], num_layers: int, starts: Container[int] = ()) -> str:
    """A table with a bar for the mean blocks of each kind; `kinds_style` colours it."""
    rows = []
    for kind in depth_by_kind(tokens, starts):
        share = kind.mean_blocks / num_layers
        bar = f'<svg viewBox="0 0 100 1" preserveAspectRatio="none"><rect class="k{round(8 * share)}"'
        bar += f' width="{100 * share:.1f}" height="1"/></svg>'
        loss = "" if kind.next_loss_nats is None else f"{kind.next_loss_nats:.2f}"
        about = f' title="{safe(ABOUT[kind.name])}"' if kind.name in ABOUT else ""
        rows.append(
            f"<tr><th scope=row{about}>{kind.name}</th><td>{kind.count:,}</td><td class=bar>{bar}</td>"
            f"<td>{kind.mean_blocks:.2f}</td><td>{loss}</td></tr>"
        )
    head = "<tr><th scope=col>kind</th><th scope=col>tokens</th><th scope=col colspan=2>mean blocks</th>"
    return f"<table class=kinds><thead>{head}<th scope=col>nats</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"


def kinds_style() -> str:
    """What `kinds_html` needs in a style sheet."""
    return "".join(f".k{step}{{fill:{shade.background}}}\n" for step, shade in enumerate(palette(8)))
