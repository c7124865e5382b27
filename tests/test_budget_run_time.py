"""A budget at run time: set, refused, and generated under."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_curve import CURVE
from torch import Tensor

from midskip import MidskipForCausalLM
from midskip.cost import Meter

Make = Callable[..., MidskipForCausalLM]


def test_no_budget_is_the_model_as_trained(calibrated: MidskipForCausalLM, ragged: tuple[Tensor, Tensor]) -> None:
    before = calibrated(*ragged)
    calibrated.set_budget(0.3, 3)
    under = calibrated(*ragged)
    assert not torch.equal(under.gates, before.gates) and ((under.gates > 0).sum(0) <= 3).all()
    calibrated.set_budget()
    after = calibrated(*ragged)
    assert torch.equal(after.logits, before.logits) and torch.equal(after.gates, before.gates)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0.0}, r"budget is 0\.0; expected a share of the blocks, above 0 and up to 1, or None"),
        ({"budget": 1.5}, r"budget is 1\.5"),
        ({"budget": 30}, "budget is 30"),
        ({"max_layers": 0}, "max_layers is 0; expected a whole number of blocks from 1 to 4"),
        ({"max_layers": 5}, "max_layers is 5"),
        ({"budget": 0.5, "max_layers": 5}, "max_layers is 5"),
    ],
)
def test_budgets_that_cannot_be_are_refused(calibrated: MidskipForCausalLM, arguments: Any, message: str) -> None:
    calibrated.set_budget(0.9, 2)
    policy = calibrated.model.policy
    with pytest.raises(ValueError, match=message):
        calibrated.set_budget(**arguments)
    assert (policy.score_scale, policy.max_layers) == (pytest.approx(0.5), 2), "what was set stays"


def test_a_budget_needs_a_calibration_and_a_ceiling_does_not(make_model: Make) -> None:
    model = make_model("kept").eval()
    for budget in (0.5, 1.0):
        with pytest.raises(ValueError, match=r"has no calibration, .*: run `midskip calibrate` on its run folder"):
            model.set_budget(budget)
    model.set_budget(max_layers=2)
    assert ((model(torch.tensor([[1, 2, 3]])).gates > 0).sum(0) == 2).all()
    dense = make_model(policy="dense")
    dense.set_budget()
    for arguments in ({"budget": 0.5}, {"max_layers": 2}):
        with pytest.raises(ValueError, match="has no run-time budget"):
            dense.set_budget(**arguments)
    model.config.calibration = CURVE | {"share": [1.0, 0.5, 0.6, 0.2]}
    with pytest.raises(ValueError, match=r"calibration\['share'\] is .*; expected 1 and then falling"):
        model.set_budget(0.5)


def test_a_budget_below_the_range_warns_once(calibrated: MidskipForCausalLM) -> None:
    calibrated.set_budget(0.25)
    message = r"budget of 0\.1 is below the range that was calibrated, 0\.250 to 1: about 0\.250 of the blocks"
    with pytest.warns(UserWarning, match=message) as found:
        calibrated.set_budget(0.1)
    assert len(found) == 1 and found[0].filename == __file__
    assert calibrated.model.policy.score_scale == 4.0
    calibrated.set_budget(0.05)  # a second warning would be an error


def test_generation_runs_under_the_budget(calibrated: MidskipForCausalLM) -> None:
    ids_1T = torch.randint(31, (1, 12))
    for arguments in ({"max_layers": 2}, {"budget": 0.3}, {"budget": 1.0, "max_layers": 2}, {}):
        calibrated.set_budget(**arguments)
        with Meter(calibrated) as meter:
            whole: Any = calibrated.generate(ids_1T, max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=True)  # pyright: ignore[reportAttributeAccessIssue]
        with Meter(calibrated) as at_once:
            calibrated(whole[:, :-1])
        if arguments.get("max_layers"):
            assert meter.executed_share <= 0.5
        assert meter.query_rows_L == at_once.query_rows_L, "token by token as all at once"
