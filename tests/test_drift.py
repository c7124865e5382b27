"""A monitor of live prompts under a budget at run time."""

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
from midskip.budget.monitor import SCORED_ROWS, BudgetDriftError, DriftMonitor, _scored
from midskip.cost import Meter
from midskip.evaluate import evaluate

Make = Callable[..., MidskipForCausalLM]


@pytest.mark.parametrize("seed", [0, 1, 7, 19])  # none at all, few, about as many as are scored, more
def test_scored_rows_have_a_next_token_and_are_spread_evenly(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    lengths = [*torch.randint(0, 3 + 10 * seed, (8,), generator=draw).tolist(), 2]
    allowed, start = [], 0
    for length in lengths:
        allowed += range(start, start + max(0, length - 1))
        start += length
    rows, positions = _scored(lengths)
    assert rows == sorted(set(rows)) and set(rows) <= set(allowed)
    assert len(rows) == min(SCORED_ROWS, len(allowed))
    places = [allowed.index(row) for row in rows]
    firsts = [sum(lengths[:number]) for number in range(len(lengths))]
    assert positions == [row - max(first for first in firsts if first <= row) for row in rows]
    steps = {after - before for before, after in pairwise(places)}
    assert max(steps, default=1) - min(steps, default=1) <= 1
    assert places[0] <= len(allowed) // len(rows) and places[-1] >= len(allowed) - 1 - len(allowed) // len(rows)


class Seen:
    """A monitor of prompts of 8 tokens with the share and the loss that a test wants."""

    def __init__(self, model: MidskipForCausalLM, on_drift: str = "keep", max_layers: int | None = None) -> None:
        self.policy = model.model.policy
        self.policy.set_limits(2.0, max_layers)
        model.lm_head = self  # pyright: ignore[reportAttributeAccessIssue]
        self.monitor, self.num_scored = DriftMonitor(model, on_drift), 0

    def forward(self, h_RD: Tensor) -> Tensor:
        """Logits of two tokens, the right one of which is less likely by so much."""
        self.num_scored += len(h_RD)
        return torch.stack((torch.zeros(len(h_RD)), h_RD[:, 0]), 1)

    def look(self, share: float, loss: float = 2.0, lengths: tuple[int, ...] = (9,)) -> None:
        h_ND = torch.full((sum(lengths), 1), math.log(math.expm1(loss)))
        self.monitor.look(lengths, share, h_ND, torch.zeros(sum(lengths), dtype=torch.int64))


@pytest.fixture
def see(calibrated: MidskipForCausalLM) -> Callable[..., Seen]:
    """see(on_drift="keep", max_layers=None)"""
    del calibrated._modules["lm_head"]
    calibrated.config.calibration = CURVE
    return lambda *args, **kwargs: Seen(calibrated, *args, **kwargs)


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
def test_drift_is_what_leaves_the_band(see: Callable[..., Seen], share: float, loss: float, message: str) -> None:
    seen = see("error")
    if not message:
        return seen.look(share, loss)
    message = rf"live prompts have left the band of the calibration on 'news': .*{message}.*; calibrate on text like"
    for _ in range(2):
        with pytest.raises(BudgetDriftError, match=message):
            seen.look(share, loss)
        seen.look(0.5)  # the next block is a new one


def test_keep_warns_once_and_goes_on(see: Callable[..., Seen]) -> None:
    seen = see("keep")
    with pytest.warns(UserWarning, match=r"expected 0\.380 to 0\.620; the budget stays"):
        seen.look(0.2)
    before = seen.num_scored
    seen.look(0.2, 9.0)  # a second warning would be an error
    assert seen.policy.score_scale == 2.0 and seen.num_scored == before, "and costs nothing any more"


def test_as_trained_warns_once_and_drops_the_budget(see: Callable[..., Seen]) -> None:
    seen = see("as_trained")
    with pytest.warns(UserWarning, match=r"from now on the gates are those of training, without a budget"):
        seen.look(0.5, 9.0)
    assert (seen.policy.score_scale, seen.policy.max_layers) == (1.0, None)
    seen.look(0.2)  # a second warning would be an error


def test_prompts_are_judged_a_block_at_a_time(see: Callable[..., Seen]) -> None:
    seen = see("error")
    seen.look(0.2, lengths=(5,))
    seen.look(0.2, lengths=(2,))  # 7 tokens, 5 of them scored
    with pytest.raises(BudgetDriftError, match=r"0\.200 of the blocks ran on the last 10 tokens"):
        seen.look(0.2, lengths=(2, 0, 1))
    with pytest.raises(BudgetDriftError, match=r"the loss of 8 of the last tokens was 5\.000 nats") as error:
        seen.look(0.5, 14.0, lengths=(2, 2))  # 6 of 2 nats and 2 of 14
    assert "blocks ran" not in str(error.value)


def test_steps_of_generation_are_no_prompts(see: Callable[..., Seen]) -> None:
    seen = see("error")
    for _ in range(99):
        seen.look(0.0, 99.0, lengths=(1, 1))
    seen.look(0.5, lengths=(6, 4))
    for step in range(1, 9):
        seen.look(0.0, 99.0, lengths=(6 + step, 4 + step))
    with pytest.raises(BudgetDriftError):
        seen.look(0.0, lengths=(14, 12))
    # under a max_layers a low share is no drift
    seen = see("error", max_layers=2)
    seen.look(0.0)
    with pytest.raises(BudgetDriftError):
        seen.look(0.9)


def test_another_budget_starts_another_pool(see: Callable[..., Seen]) -> None:
    seen = see("error")
    seen.look(0.0, lengths=(7,))
    seen.policy.set_limits(1.0)
    seen.look(0.8, lengths=(7,))
    with pytest.raises(BudgetDriftError, match=r"0\.400 of the blocks ran on the last 14 tokens, expected 0\.760"):
        seen.look(0.0, lengths=(7,))


def test_what_cannot_be_monitored_is_refused(calibrated: MidskipForCausalLM) -> None:
    with pytest.raises(ValueError, match="on_drift is 'panic'; expected one of 'keep', 'as_trained', 'error'"):
        DriftMonitor(calibrated, "panic")
    calibrated.config.calibration = None
    with pytest.raises(ValueError, match="has no calibration"):
        DriftMonitor(calibrated)


def test_ids_that_are_not_known_leave_the_share(calibrated: MidskipForCausalLM) -> None:
    share = [1.0, 0.02, 0.01, 0.001]
    calibrated.config.calibration = CURVE | {"share": share, "share_by_bucket": [[x] * 12 for x in share]}
    calibrated.set_budget(0.015)
    message = r"of the blocks ran on the last 40 tokens, expected .* to 0\.130; cal"
    with DriftMonitor(calibrated, "error"), pytest.raises(BudgetDriftError, match=message):
        calibrated(inputs_embeds=torch.randn(1, 40, 16, dtype=torch.float64))


@torch.no_grad()
def test_prompts_are_looked_at_and_measurements_are_not(
    calibrated: MidskipForCausalLM, ragged: tuple[Tensor, Tensor]
) -> None:
    ids_BT, valid_BT = ragged
    calibrated.set_budget(0.65)
    seen: list[tuple[Any, ...]] = []
    monitor = DriftMonitor(calibrated).attach().attach()
    monitor.look = lambda *arguments: seen.append(arguments)  # pyright: ignore[reportAttributeAccessIssue]
    output = calibrated(ids_BT, attention_mask=valid_BT, logits_to_keep=1)
    (lengths, share, h_ND, ids_N), *more = seen
    assert not more and lengths == valid_BT.sum(1).tolist() and share == output.executed_share
    assert torch.equal(ids_N, ids_BT[valid_BT.bool()])
    full = calibrated(ids_BT, attention_mask=valid_BT).logits[valid_BT.bool()]
    torch.testing.assert_close(calibrated.lm_head(h_ND), full, rtol=0, atol=1e-12)
    seen.clear()
    calibrated.train()(ids_BT)
    calibrated.eval()
    evaluate(calibrated, [{"input_ids": ids_BT[0], "labels": ids_BT[0]}])
    calibrated.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=3, pad_token_id=0)  # pyright: ignore[reportAttributeAccessIssue]
    assert [lengths for lengths, *_ in seen if max(lengths) > 1] == [[9] * 7], "the prompt alone"
    monitor.detach()
    seen.clear()
    calibrated(ids_BT)
    assert not seen


@torch.no_grad()
@pytest.mark.integration
def test_drift_on_live_prompts(calibrated: MidskipForCausalLM, windows: list[dict[str, Tensor]]) -> None:
    """Like the text of the calibration, and unlike it; whole windows, and prompts of four tokens."""
    calibration = calibrate(calibrated, windows, "noise", batch_size=48)
    whole = torch.stack([window["input_ids"] for window in windows[:12]])
    short = torch.stack([window["input_ids"][:4] for window in windows])
    calibrated.set_budget(0.6)
    odd = torch.full((12, 48), int(calibrated(whole).logits[0, -1].argmin()))
    for like, unlike in ((whole, odd), (short, odd[:, :4])):
        with DriftMonitor(calibrated, "error"):
            for _ in range(8):
                calibrated(like, logits_to_keep=1)
            with pytest.raises(BudgetDriftError, match="calibration on 'noise': "):
                for _ in range(9):  # 64 of each pass are scored
                    calibrated(unlike, logits_to_keep=1)
    for on_drift, score_scale in (("keep", calibration.scale_for(0.6)), ("as_trained", 1.0)):
        calibrated.set_budget(0.6, 4)
        with DriftMonitor(calibrated, on_drift), pytest.warns(UserWarning, match=f"on_drift: {on_drift}") as found:
            for _ in range(9):
                calibrated(odd)
        assert len(found) == 1
        policy = calibrated.model.policy
        assert (policy.score_scale, policy.max_layers) == (score_scale, 4 if on_drift == "keep" else None)
    calibrated.set_budget(0.6)
    with Meter(calibrated) as meter, DriftMonitor(calibrated, "error"):
        calibrated(whole, logits_to_keep=1)
    assert meter.head_rows == 12, "what the monitor costs is no work of the model"


@torch.no_grad()
def test_drafts_are_not_under_the_budget_that_is_looked_after(make_model: Callable[..., MidskipForCausalLM]) -> None:
    """Else `as_trained` would drop the budget while drafts run, which put it back when they end."""
    model = make_model(policy="independent", skipped_kv="keep").eval()
    model.config.calibration = CURVE
    model.set_budget(0.5)
    before = model.model.policy.score_scale
    prompt = torch.randint(model.config.vocab_size, (1, 12))
    with DriftMonitor(model, "as_trained") as monitor:
        model.generate(prompt, max_new_tokens=4, do_sample=False, draft_budget=0.5)
    assert not monitor.is_over and model.model.policy.score_scale == before
