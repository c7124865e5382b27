"""Markdown in which no text of a user formats anything."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path


def plain(text: object) -> str:
    """Text in which Markdown and HTML find nothing to format, in one line."""
    shown = "".join(c if c.isprintable() else " " for c in str(text))
    return re.sub(r"([\\`*_\[\]{}|~$])", r"\\\1", html.escape(shown, quote=False))


def source_name(source: str) -> str:
    """What a text or a tokenizer is called: of each path that begins at the root or at home, its last part alone."""
    prefix = "hub:" if source.startswith("hub:") else ""
    paths = [path.strip() for path in source.removeprefix(prefix).split(",")]
    return prefix + ",".join(Path(path).name if path.startswith(("/", "~", "..")) else path for path in paths)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are Markdown: what a user has named goes through `plain` first."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def code(text: str, language: str) -> str:
    """A block that no backticks in the text can end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def decimal(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
