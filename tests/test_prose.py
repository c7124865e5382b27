"""A distance with its interval, where a page writes one in a sentence, is one of the committed results."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from itertools import permutations
from pathlib import Path
from statistics import fmean

import pytest

from midskip.frontier import frontier
from midskip.frontier.against import difference
from midskip.frontier.intervals import mean_interval
from midskip.frontier.read import COSTS, read_points

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ["frontier.md", "frontier-training.md", "results.md"]
INTERVAL = re.compile(r"([+-]?\d\.\d{3})(?: \w+)?,? \(?([+-]?\d\.\d{3}) to ([+-]?\d\.\d{3})")


@pytest.fixture(scope="module")
def computed() -> set[tuple[float, ...]]:
    """Distance and interval: of each point of a sweep from dense models at each cost, and from each other point, in
    nats; of each model of `learning.json` from each other, in bits a byte."""
    found = []
    for file in RESULTS.glob("*.json"):
        if not {"sweep", "results"} <= set(json.loads(file.read_text(encoding="utf-8"))):
            continue
        rows = [row["against_dense"] or {} for row in frontier(file)["points"]]
        found += [row[cost] for row in rows for cost in COSTS if cost in row]
        found += [difference(*pair) for pair in permutations(read_points(file), 2)]
    bits: dict[tuple[str, int], dict[int, float]] = defaultdict(dict)
    for row in json.loads((RESULTS / "learning.json").read_text(encoding="utf-8"))["rows"]:
        bits[row["run"], row["steps"]][row["seed"]] = row["bits_per_byte"]
    for mine, theirs in permutations(bits.values(), 2):
        distances = [mine[seed] - theirs[seed] for seed in mine if seed in theirs] or [math.nan]
        found.append({"distance": fmean(distances), "interval": mean_interval(distances)})
    return {(one["distance"], *one["interval"]) for one in found if one["distance"] is not None and one["interval"]}


@pytest.mark.parametrize("page", PAGES)
def test_a_distance_in_a_sentence_is_of_the_results(page: str, computed: set[tuple[float, ...]]) -> None:
    lines = (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()
    text = re.sub(r"\s+", " ", " ".join(line for line in lines if not line.startswith("|")))
    written = INTERVAL.findall(text)
    assert written or page != "frontier.md"
    wrong = [numbers for numbers in written if not any(_same(numbers, exact) for exact in computed)]
    assert not wrong, "no committed result differs by so much"


def _same(written: tuple[str, str, str], exact: tuple[float, ...]) -> bool:
    """Rounded. Without a sign ("0.05 nats (0.04 to 0.06) better") the words tell it."""
    distance, low, high = (float(number) for number in written)
    both = [(distance, low, high)] + [(-distance, -high, -low)] * (written[0][0] not in "+-")
    return any(all(abs(a - b) < 0.000501 for a, b in zip(one, exact, strict=True)) for one in both)
