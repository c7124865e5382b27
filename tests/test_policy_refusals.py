"""Settings that policies refuse, each by name."""

from typing import Any

import pytest

from midskip.policies import build_policy

GIVEN = {"static": {"share": 0.5}, "mixture_of_depths": {"capacity": 0.5}, "reinforce": {"cost": 0.1}}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("static", {"share": None}, "expected one of the two"),
        ("static", {"share": 0}, "share is 0; expected a number above 0"),
        ("static", {"share": None, "layers": [0, 6]}, r"layers is \[0, 6\]; expected some of 0 to 5"),
        ("static", {"share": None, "layers": 0.5}, r"layers is 0.5; expected some of 0 to 5"),
        ("static", {"share": None, "layers": [[1]]}, r"layers is \[\[1\]\]; expected some of 0 to 5"),
        ("random", {"redraw": "no"}, "redraw is 'no'; expected true or false"),
        ("random", {"by": "word"}, "by is 'word'; expected one of 'position', 'pair', 'token'"),
        ("random", {"shares": [1, 0.5, 0.5, 1], "share": 0.5}, "shares are given, and share 0.5, kind 'independent'"),
        ("random", {"kind": "middle"}, "kind is 'middle'; expected one of 'independent'"),
        ("random", {"share": 0.1, "outer": 2}, "share is 0.1 and outer 2, whose layers alone are more"),
        ("random", {"shares": [0.5] * 5}, r"shares is \[0.5, .*\]; expected 6 numbers from 0 to 1, one for each layer"),
        ("random", {"shares": [0.5] * 5 + [1.5]}, r"shares is \[0.5, .*1.5\]; expected 6 numbers from 0 to 1"),
        ("random", {"shares": [0.5] * 6, "outer": 1}, "outer 1; expected no share"),
        ("independent", {"outer": 3}, "outer is 3 of 6 layers, which leaves none to skip"),
        ("independent", {"first_tokens": -1}, "first_tokens is -1; expected a whole number of at least 0"),
        ("independent", {"first_tokens": 10**30}, "first_tokens is 10+; expected a whole number .* below 2"),
        ("independent", {"router": "deep"}, "router is 'deep'; expected one of 'linear', 'bottleneck'"),
        ("early_exit", {"scores": "hash"}, "scores is 'hash'; expected one of 'predicted_loss'"),
        (
            "early_exit",
            {"scores": "straight_through", "exit_loss": 0.1},
            "exit_loss is 0.1, of scores 'predicted_loss'",
        ),
        ("early_exit", {"exit_share": 0}, "exit_share is 0; expected a number above 0"),
        ("early_exit", {"exit_share": None}, "exit_share is None; expected a number above 0 and up to 1"),
        ("early_exit", {"scores": "predicted_loss", "exit_loss": [1]}, r"exit_loss is \[1\]; expected a number"),
        ("early_exit", {"layer_dropout": "much"}, "layer_dropout is 'much'; expected a number from 0 to 1"),
        ("early_exit", {"layer_dropout": 2}, "layer_dropout is 2; expected a number from 0 to 1"),
        ("mixture_of_depths", {"capacity": 0}, "capacity is 0; expected a number above 0"),
        ("reinforce", {"cost": -1}, "cost is -1; expected a number of at least 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_policy(name, 6, 8, 0.02, GIVEN.get(name, {}) | settings)
