"""A run that collapses says so, once, with the remedy; one that learns says nothing."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from tiny_runs import QUIET

from midskip.train import Recipe, train
from midskip.train import health as module
from midskip.train.health import Health

LAYERS = 4


def rows(steps: int, **changes: Callable[[int], float]) -> list[dict[str, Any]]:
    """A history in which all goes well, but for the changes: by name, the value at a step."""
    values = {
        "cross_entropy": lambda step: 2 + 3 / (1 + step / 50),
        "gradient_norm": lambda step: 0.5,
        "share": lambda step: 0.5,
        "gate": lambda step: 0.5,
        "expected_share": lambda step: 0.5,
    } | changes
    return [
        {
            "step": step,
            "cross_entropy": values["cross_entropy"](step),
            "gradient_norm": values["gradient_norm"](step),
            "executed_share": values["share"](step),
            "expected_share": values["expected_share"](step),
            "share_by_layer": [values["share"](step)] * LAYERS,
            "gate_mean_by_layer": [values["gate"](step)] * LAYERS,
        }
        for step in range(1, steps + 1)
    ]


def test_a_run_that_learns_shows_no_sign() -> None:
    assert Health(50, rows(1000)).signs == {}
    noisy = rows(1000, gradient_norm=lambda step: 40.0 if step % 50 == 0 else 0.5 + step % 7 / 10)
    assert Health(50, noisy).signs == {}


@pytest.mark.parametrize(
    ("name", "changes", "what"),
    [
        ("loss", {"cross_entropy": lambda step: 2.0 if step < 400 else 2.6}, r"rose from 2\.000 to 2\.\d+ nats"),
        ("gradient_norm", {"gradient_norm": lambda step: 1.2 if step < 400 else 24.0}, r"from 1\.2 to 24"),
        ("gates", {"gate": lambda step: 0.4 if step < 400 else 0.02}, r"tokens that run sank to 0\.0\d\d"),
        ("share", {"share": lambda step: 0.5 if step < 400 else 0.26, "gate": lambda step: 0.2}, r"off by -0\.1\d\d"),
    ],
)
def test_each_sign_is_seen(name: str, changes: dict[str, Any], what: str) -> None:
    health = Health(50, rows(399, **changes))
    assert health.signs == {}
    for row in rows(600, **changes)[399:]:
        health.add(row)
    assert list(health.signs) == [name] and 400 < health.signs[name]["step"] <= 500
    warning = health.warning(is_hard=False)
    assert "seems to collapse" in warning and "gates: hard" in warning
    assert "gates: hard" not in health.warning(is_hard=True)
    assert re.search(what, warning)


def test_the_warm_up_is_not_looked_at() -> None:
    assert Health(300, rows(300, cross_entropy=lambda step: step / 10)).signs == {}


def test_a_regularizer_without_a_target_has_no_share_to_miss() -> None:
    history = [{name: x for name, x in row.items() if name != "expected_share"} for row in rows(300)]
    assert Health(10, history).signs == {}
    assert Health(10, history[:150] + rows(300)[150:]).signs == {}, "nor one that has a target later"


@pytest.mark.usefixtures("no_pictures")
def test_a_run_warns_once_and_its_report_says_it(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WINDOW", 10)
    monkeypatch.setattr(module, "SMALLEST_GATE", 2.0)  # more than any gate
    recipe = make_recipe("target_share", {"target_share": 0.5}, max_steps=16, warmup_ratio=0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = train(recipe, console=QUIET)
    messages = [str(warning.message) for warning in caught if "collapse" in str(warning.message)]
    assert len(messages) == 1 and "the mean gate of the tokens that run sank to" in messages[0]
    assert list(report["training"]["collapse"]) == ["gates"]
