"""What lies in a folder beside a model and was measured of it: data, of which no name or text is trusted."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

CARD_FILE, REPORT_FILE, RECIPE_FILE = "README.md", "report.json", "recipe.yaml"
RETROFIT_FILE, EVALUATED_FILE, BENCH_FILE = "retrofit.json", "evaluated.json", "bench.json"
MARK = "<!-- Written by midskip, which replaces this page as long as this line is in it. -->"
MEASURED_FILES = (REPORT_FILE, RETROFIT_FILE)  # a model beside one of them has a card
KEPT = ("license", "license_name", "license_link", "language", "base_model")  # of a card's header: a user sets them


@dataclass(frozen=True)
class Measured:
    """What was measured of a model; None for what was not.

    Attributes:
        report: what `midskip train` writes into report.json.
        recipe: of the run, as a dictionary.
        retrofit: what `midskip retrofit` writes into retrofit.json.
        evaluated: what `midskip evaluate --budgets` writes into evaluated.json.
        bench: what `midskip bench --run` writes into bench.json, in the folder itself or in its folder `bench`.
        header: what a user wrote into the header of the card that is there: keys of `KEPT`.
    """

    report: Mapping[str, Any] | None = None
    recipe: Mapping[str, Any] | None = None
    retrofit: Mapping[str, Any] | None = None
    evaluated: Mapping[str, Any] | None = None
    bench: Mapping[str, Any] | None = None
    header: Mapping[str, Any] = field(default_factory=dict)


def read_measured(folder: str | Path, weights: Mapping[str, str] | None) -> Measured:
    """What a folder has.

    Args:
        weights: of the model, as `hashes_of` gives them: times of other weights are left out.

    Raises:
        ValueError: a file that cannot be read.
    """
    folder = Path(folder)
    card = folder / CARD_FILE
    file = next((file for file in (folder / BENCH_FILE, folder / "bench" / BENCH_FILE) if file.is_file()), None)
    bench = _read(file, json.loads, {"machine": dict, "weights": dict, "limits": dict, "rows": list}) if file else None
    report, recipe = read_run(folder)
    return Measured(
        report,
        recipe,
        retrofit=_read(folder / RETROFIT_FILE, json.loads, {"settings": dict, "stages": dict}),
        evaluated=_read(folder / EVALUATED_FILE, json.loads, {"as_trained": dict, "budgets": list}),
        bench=bench if bench and bench["weights"].items() & (weights or {}).items() else None,
        header=header_of(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else {},
    )


def read_run(folder: str | Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Report and recipe of a run folder; None for what it has not.

    Raises:
        ValueError: a report or a recipe that cannot be read.
    """
    return (
        _read(Path(folder, REPORT_FILE), json.loads, {"validation": dict, "training": dict}),
        _read(Path(folder, RECIPE_FILE), yaml.safe_load, {"data": dict, "regularizer": dict}),
    )


def header_of(card: str) -> dict[str, Any]:
    """Keys of `KEPT` in the header of a card of ours; of another, nothing."""
    if MARK not in card:
        return {}
    try:
        found = ModelCard(card, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, TypeError, yaml.YAMLError):
        return {}
    if "language" in found:
        found["language"] = _language(found["language"])
    return {key: value for key in KEPT if _is_words(value := found.get(key))}


def _language(value: Any) -> Any:
    """Codes of languages as they were written: YAML takes that of Norwegian, no, for False."""
    if isinstance(value, list):
        return [_language(one) for one in value]
    return "no" if value is False else value


def _is_words(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(one, str) and one.isprintable() and 0 < len(one) <= 200 for one in values)


def _read(file: Path, read: Callable[[str], Any], keys: Mapping[str, type]) -> dict[str, Any] | None:
    """Those files alone that have what ours have: others, as the demo's report, are not shown."""
    try:
        values = read(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{str(file)!r} cannot be read: {error}; it is shown in the model card: remove it") from error
    if isinstance(values, dict) and all(isinstance(values.get(key), kind) for key, kind in keys.items()):
        return values
    return None
