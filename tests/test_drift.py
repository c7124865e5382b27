"""The watch over live prompts under a budget at run time."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny_curve import CURVE
from torch import Tensor

from midskip import MidskipForCausalLM
from midskip.budget.calibrate import calibrate
from midskip.budget.calibration import Calibration
from midskip.budget.monitor import SCORED_ROWS, BudgetDriftError, DriftMonitor, _scored_rows
from midskip.cost import Meter
from midskip.evaluate import evaluate

Make = Callable[..., MidskipForCausalLM]


@pytest.mark.parametrize("seed", range(20))
def test_scored_rows_have_a_next_token_and_are_spread_evenly(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    lengths = [*torch.randint(0, 3 + 10 * seed, (8,), generator=draw).tolist(), 2]
    allowed, start = [], 0
    for length in lengths:
        allowed += range(start, start + max(0, length - 1))
        start += length
    rows = _scored_rows(lengths)
    assert rows == sorted(set(rows)) and set(rows) <= set(allowed)
    assert len(rows) == min(SCORED_ROWS, len(allowed))
    places = [allowed.index(row) for row in rows]
    steps = {after - before for before, after in pairwise(places)}
    assert max(steps, default=1) - min(steps, default=1) <= 1
    assert places[0] <= len(allowed) // len(rows) and places[-1] >= len(allowed) - 1 - len(allowed) // len(rows)


class Seen:
    """A watch over prompts of 8 tokens with the share and the loss that a test wants."""

    def __init__(self, on_drift: str = "keep", factor: float = 2.0, ceiling: int | None = None) -> None:
        self.fallen_back = 0
        self.monitor = DriftMonitor(Calibration.from_dict(CURVE), factor, ceiling, on_drift, self.fall_back)
        self.num_heads = 0

    def fall_back(self) -> None:
        self.fallen_back += 1

    def update(self, share: float, loss: float = 2.0, lengths: tuple[int, ...] = (9,)) -> None:
        """Logits of two tokens, the right one of which is less likely by so much."""

        def head(h_RD: Tensor) -> Tensor:
            self.num_heads += len(h_RD)
            return torch.stack((torch.zeros(len(h_RD)), h_RD[:, 0]), 1)

        h_ND = torch.full((sum(lengths), 1), math.log(math.expm1(loss)))
        self.monitor.update(list(lengths), share, h_ND, torch.zeros(sum(lengths), dtype=torch.int64), head)


@pytest.mark.parametrize(
    ("share", "loss", "message"),
    [
        (0.5, 2.0, ""),
        (0.39, 2.0, ""),
        (0.61, 2.89, ""),
        (0.5, 0.001, ""),  # a low loss is welcome
        (0.37, 2.0, r"0\.370 of the blocks ran on the last 9 tokens, expected 0\.380 to 0\.620"),
        (0.63, 2.0, r"0\.630 of the blocks ran"),
        (0.5, 2.91, r"the loss of 8 of the last tokens was 2\.910 nats, expected at most 2\.900"),
        (0.1, 4.0, r"0\.100 of the blocks .* and the loss of 8 .* was 4\.000 nats"),
    ],
)
def test_drift_is_what_leaves_the_band(share: float, loss: float, message: str) -> None:
    seen = Seen("error")
    if not message:
        return seen.update(share, loss)
    message = rf"live prompts have left the band of the calibration on 'news': .*{message}.*; calibrate on text like"
    for _ in range(2):
        with pytest.raises(BudgetDriftError, match=message):
            seen.update(share, loss)
        seen.update(0.5)  # the next block is a new one


def test_keep_warns_once_and_goes_on() -> None:
    seen = Seen("keep")
    with pytest.warns(UserWarning, match=r"expected 0\.380 to 0\.620; the budget stays"):
        seen.update(0.2)
    before = seen.num_heads
    seen.update(0.2, 9.0)  # a second warning would be an error
    assert seen.fallen_back == 0 and seen.num_heads == before, "and costs nothing any more"


def test_as_trained_warns_once_and_drops_the_budget() -> None:
    seen = Seen("as_trained")
    with pytest.warns(UserWarning, match=r"from now on the gates are those of training, without a budget"):
        seen.update(0.5, 9.0)
    seen.update(0.2)
    assert seen.fallen_back == 1


def test_prompts_are_judged_a_block_at_a_time() -> None:
    seen = Seen("error")
    seen.update(0.2, lengths=(5,))
    seen.update(0.2, lengths=(2,))  # 7 tokens, 5 of them scored
    with pytest.raises(BudgetDriftError, match=r"0\.200 of the blocks ran on the last 10 tokens"):
        seen.update(0.2, lengths=(2, 0, 1))
    with pytest.raises(BudgetDriftError, match=r"the loss of 8 of the last tokens was 5\.000 nats") as error:
        seen.update(0.5, 14.0, lengths=(2, 2))  # 6 of 2 nats and 2 of 14
    assert "blocks ran" not in str(error.value)


def test_steps_of_generation_are_no_prompts() -> None:
    seen = Seen("error")
    for _ in range(99):
        seen.update(0.0, 99.0, lengths=(1, 1))
    seen.update(0.5, lengths=(6, 4))
    for step in range(1, 9):
        seen.update(0.0, 99.0, lengths=(6 + step, 4 + step))
    with pytest.raises(BudgetDriftError):
        seen.update(0.0, lengths=(14, 12))
    # under a ceiling a low share is no drift
    seen = Seen("error", ceiling=2)
    seen.update(0.0)
    with pytest.raises(BudgetDriftError):
        seen.update(0.9)


def test_ids_that_are_not_known_leave_the_share(calibrated: MidskipForCausalLM) -> None:
    calibrated.config.calibration = CURVE | {"share": [1.0, 0.02, 0.01, 0.001]}
    calibrated.set_budget(0.015, on_drift="error")
    with pytest.raises(BudgetDriftError, match=r"of the blocks ran on the last 40 tokens, expected .* to 0\.130; cal"):
        calibrated(inputs_embeds=torch.randn(1, 40, 16, dtype=torch.float64))


@torch.no_grad()
def test_the_model_shows_its_prompts_to_the_monitor(
    calibrated: MidskipForCausalLM, ragged: tuple[Tensor, Tensor]
) -> None:
    ids_BT, valid_BT = ragged
    calibrated.set_budget(0.65)
    seen: list[tuple[Any, ...]] = []
    assert calibrated.monitor
    calibrated.monitor.update = lambda *arguments: seen.append(arguments)  # pyright: ignore[reportAttributeAccessIssue]
    output = calibrated(ids_BT, attention_mask=valid_BT, logits_to_keep=1)
    (lengths, share, h_ND, ids_N, head), *more = seen
    assert not more and lengths == valid_BT.sum(1).tolist()
    assert share == pytest.approx((output.gates > 0).sum().item() / (4 * valid_BT.sum().item()))
    assert torch.equal(ids_N, ids_BT[valid_BT.bool()]) and len(h_ND) == len(ids_N)
    full = calibrated(ids_BT, attention_mask=valid_BT).logits[valid_BT.bool()]
    torch.testing.assert_close(head(h_ND), full, rtol=0, atol=1e-12)
    seen.clear()
    evaluate(calibrated, [{"input_ids": ids_BT[0], "labels": ids_BT[0]}])
    assert seen == [] and calibrated.monitor is not None, "measuring is not live"


@torch.no_grad()
def test_drift_on_live_prompts(calibrated: MidskipForCausalLM, windows: list[dict[str, Tensor]]) -> None:
    calibration = calibrate(calibrated, windows, "noise", batch_size=48)
    batch = {"input_ids": torch.stack([window["input_ids"] for window in windows[:12]])}
    calibrated.set_budget(0.6, on_drift="error")
    for _ in range(8):
        calibrated(**batch, logits_to_keep=1)  # like the text it was calibrated on
    odd = {"input_ids": torch.full((12, 48), int(calibrated(**batch).logits[0, -1].argmin()))}
    with pytest.raises(BudgetDriftError, match="calibration on 'noise': "):
        for _ in range(9):  # 64 of each pass are scored
            calibrated(**odd, logits_to_keep=1)
    for on_drift, factor in (("keep", calibration.factor_for(0.6)), ("as_trained", 1.0)):
        calibrated.set_budget(0.6, 4, on_drift=on_drift)
        with pytest.warns(UserWarning, match=f"on_drift: {on_drift}") as found:
            for _ in range(9):
                calibrated(**odd)
        assert len(found) == 1
        policy = calibrated.model.policy
        assert (policy.factor, policy.ceiling) == (factor, 4 if on_drift == "keep" else None)
    calibrated.set_budget(0.6, on_drift="error")
    with Meter(calibrated) as meter:
        calibrated(**batch, logits_to_keep=1)
    assert meter.head_rows == 12 + SCORED_ROWS, "what the watch costs"
