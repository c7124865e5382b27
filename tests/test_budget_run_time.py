"""A budget at run time: the curve it goes by, the watch over live prompts, and both from the command line."""

import json
import math
import statistics
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

import midskip.calibrate
from midskip import MidskipConfig, MidskipForCausalLM
from midskip.budget import SCORED_ROWS, BudgetDriftError, Calibration, DriftWatch, _scored_rows
from midskip.calibrate import GAP, calibrate, loss_by_budget, thinned
from midskip.cli import main
from midskip.cost import Meter
from midskip.data import TokenWindows
from midskip.evaluate import depth_of_tokens, evaluate
from midskip.report import budget_table, write_curves

Make = Callable[..., MidskipForCausalLM]
CURVE: dict[str, Any] = {
    "text": "news",
    "num_tokens": 4000,
    "block_tokens": 8,
    "num_dropped": 0,
    "factor": [0.0, 1.0, 2.0, 4.0],
    "share": [1.0, 0.8, 0.5, 0.25],
    "loss": [2.0, 2.1, 2.5, 3.0],
    "share_std": [0.0, 0.01, 0.03, 0.02],
    "loss_std": [0.05, 0.05, 0.1, 0.1],
}


@pytest.fixture
def windows() -> list[dict[str, Tensor]]:
    """48 windows of 48 tokens that are easy to predict in part: 9 blocks of 256."""
    ids_BT = torch.randint(31, (48, 48), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": ids_T, "labels": ids_T.clone()} for ids_T in ids_BT]


@pytest.fixture
def model(make_model: Make) -> MidskipForCausalLM:
    """In evaluation mode, with gates that are 0, 1 and between, and `CURVE`, with blocks too long to judge."""
    model = make_model("mixed").eval()
    model.config.calibration = CURVE | {"block_tokens": 10**6}
    return model


# ---- the curve


def test_a_budget_becomes_the_factor_between_the_points_measured() -> None:
    curve = Calibration.from_dict(CURVE)
    expected = {1: 0.0, 0.9: 0.5, 0.8: 1.0, 0.65: 1.5, 0.5: 2.0, 0.3: 3.6, 0.25: 4.0, 0.1: 4.0}
    for budget, factor in expected.items():
        assert curve.factor_for(budget) == pytest.approx(factor)
        if budget >= 0.25:
            assert curve.at(factor)[0] == pytest.approx(budget)
    budgets = [number / 100 for number in range(1, 101)]
    factors = [curve.factor_for(budget) for budget in budgets]
    assert factors == sorted(factors, reverse=True), "less budget, no smaller factor"
    assert curve.at(3.0) == pytest.approx((0.375, 2.75)) and curve.at(9.0) == (0.25, 3.0)
    for budget in (0, -0.5, 1.01, math.nan, math.inf, True, "0.5"):
        with pytest.raises(ValueError, match=r"budget is .*; expected a share of the blocks, above 0 and up to 1"):
            curve.factor_for(budget)  # pyright: ignore[reportArgumentType]


def test_the_band_is_four_deviations_around_the_points_on_either_side() -> None:
    curve = Calibration.from_dict(CURVE)
    for factor, points in ((0.0, [0]), (1.0, [1]), (1.5, [1, 2]), (3.9, [2, 3]), (4.0, [3])):
        band = curve.band(factor)
        share, share_std, loss, loss_std = (
            [CURVE[name][point] for point in points] for name in ("share", "share_std", "loss", "loss_std")
        )
        assert band.share_low == pytest.approx(min(a - 4 * b for a, b in zip(share, share_std, strict=True)))
        assert band.share_high == pytest.approx(max(a + 4 * b for a, b in zip(share, share_std, strict=True)))
        assert band.loss_high == pytest.approx(max(a + 4 * b for a, b in zip(loss, loss_std, strict=True)))
    assert curve.band(0.0).has_share(1.0) and not curve.band(0.0).has_share(0.999)
    assert curve.band(1.0).has_loss(-1.0) and not curve.band(1.0).has_loss(math.nan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": 3}, r"calibration\['text'\] is 3; expected a string"),
        ({"num_tokens": 0}, r"calibration\['num_tokens'\] is 0; expected a whole number of at least 1"),
        ({"block_tokens": 2.5}, r"\['block_tokens'\] is 2.5"),
        ({"num_dropped": True}, r"\['num_dropped'\] is True"),
        ({"factor": [0.1, 1.0, 2.0, 4.0]}, r"\['factor'\] is .*; expected 0 and then rising numbers"),
        ({"factor": [0.0, 2.0, 2.0, 4.0]}, r"\['factor'\] is .*; expected 0 and then rising numbers"),
        ({"share": [1.0, 0.8, 0.8, 0.25]}, r"\['share'\] is .*; expected 1 and then falling numbers"),
        ({"share": [0.9, 0.8, 0.5, 0.25]}, r"\['share'\] is .*; expected 1 and then falling numbers"),
        ({"share": [1.0, 0.8, 0.5]}, r"\['share'\] is 3 numbers; expected 4, as factor"),
        ({"loss": [2.0, 2.1, math.nan, 3.0]}, r"\['loss'\] is .*; expected two or more finite numbers of at least 0"),
        ({"loss_std": [0.1, 0.1, -0.1, 0.1]}, r"\['loss_std'\] is .*; expected two or more finite numbers"),
        ({"share_std": "wide"}, r"\['share_std'\] is 'wide'"),
        ({"factor": [0.0], "share": [1.0]}, r"\['factor'\] is \[0.0\]; expected two or more"),
        ({"colour": "red"}, r"calibration is \['block_tokens', 'colour', .*; expected a dictionary of text, num_"),
    ],
)
def test_a_broken_calibration_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    message += ".*run `midskip calibrate` again, or remove the calibration"
    with pytest.raises(ValueError, match=message):
        MidskipConfig(calibration=CURVE | changes)
    MidskipConfig().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"calibration": CURVE | changes}))
    with pytest.raises(ValueError, match=message):
        MidskipConfig.from_pretrained(tmp_path)


def test_what_is_no_dictionary_is_refused() -> None:
    for values in ([1], "news", 0.5):
        with pytest.raises(ValueError, match=r"calibration is .*; expected a dictionary of text"):
            MidskipConfig(calibration=values)


# ---- measuring it


def blocks_of(model: MidskipForCausalLM, windows: list[dict[str, Tensor]]) -> tuple[list[float], list[float]]:
    """Share and loss of each block of 256 tokens, by hand."""
    shares, losses = [], []
    for window in windows:
        output = model(window["input_ids"][None])
        shares += (output.gates[:, 0] > 0).double().mean(0).tolist()
        losses += [*F.cross_entropy(output.logits[0, :-1], window["labels"][1:], reduction="none").tolist(), None]
    starts = range(0, len(shares) - 255, 256)
    scored = [[loss for loss in losses[start : start + 256] if loss is not None] for start in starts]
    return [statistics.mean(shares[start : start + 256]) for start in starts], [statistics.mean(x) for x in scored]


@torch.no_grad()
def test_the_curve_is_what_the_model_does(make_model: Make, windows: list[dict[str, Tensor]], tmp_path: Path) -> None:
    model = make_model("mixed")
    model.model.policy.set_effort(0.7, 2)
    calibration = calibrate(model, windows, "noise", lowest=0.2, batch_size=48)
    assert model.training and (model.model.policy.factor, model.model.policy.ceiling) == (0.7, 2), "as before"
    assert calibration.text == "noise" and calibration.num_tokens == 48 * 48 and calibration.block_tokens == 256
    assert calibration.factor[0] == 0 and calibration.share[0] == 1
    gaps = [before - after for before, after in pairwise(calibration.share)]
    assert min(gaps) > 0 and max(gaps) <= GAP and len(gaps) > 10
    model.eval()
    for point in (0, 5, len(gaps)):
        model.model.policy.set_effort(calibration.factor[point])
        result = evaluate(model, windows, batch_size=48)
        assert calibration.share[point] == result["executed_share"] and calibration.loss[point] == result["loss"]
        shares, losses = blocks_of(model, windows)
        assert calibration.share_std[point] == pytest.approx(statistics.stdev(shares), rel=1e-6, abs=1e-9)
        assert calibration.loss_std[point] == pytest.approx(statistics.stdev(losses), rel=1e-6)
    model.set_budget()
    model.save_pretrained(tmp_path)
    loaded = MidskipForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config.calibration == calibration.to_dict() == model.config.calibration
    for budget in (0.9, 0.75, 0.6):
        loaded.set_budget(budget)
        assert evaluate(loaded, windows, batch_size=48)["executed_share"] == pytest.approx(budget, abs=0.6 * GAP)
    loaded.set_budget(1)
    assert evaluate(loaded, windows, batch_size=48)["executed_share"] == 1


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The factors at which `calibrate` reads the text."""
    factors: list[float] = []

    def spy(model: MidskipForCausalLM, *args: Any, **kwargs: Any) -> dict[str, Any]:
        factors.append(model.model.policy.factor)
        return evaluate(model, *args, **kwargs)

    monkeypatch.setattr(midskip.calibrate, "evaluate", spy)
    return factors


def test_the_curve_ends_where_the_share_no_longer_changes(
    make_model: Make, windows: list[dict[str, Tensor]], passes: list[float]
) -> None:
    """Half of the tokens have scores of 0 and never leave."""
    model = make_model("kept", torch.float32).eval()
    with torch.no_grad():
        model.model.policy.weight.normal_()
        model.model.policy.weight[1:].zero_()
        model.model.policy.bias[0] = 0
    calibration = calibrate(model, windows, batch_size=48)
    assert 0.3 < calibration.share[-1] < 0.7 and calibration.factor[-1] <= 1000 and len(passes) < 32
    model.model.policy.set_effort(1e6)
    assert calibration.share[-1] <= evaluate(model, windows, batch_size=48)["executed_share"] + 0.02


def test_the_curve_ends_at_the_lowest_share_asked_for(
    make_model: Make, windows: list[dict[str, Tensor]], passes: list[float]
) -> None:
    counts = []
    for lowest in (0.7, 0.9):
        passes.clear()
        share = calibrate(make_model("open", torch.float32), windows, lowest=lowest, batch_size=48).share
        assert share[-1] <= lowest < share[-2] and share[-2] - share[-1] < 2 * GAP
        counts.append(len(passes))
    assert counts[1] < counts[0], "what lies below is not measured"


def test_points_that_break_the_fall_are_left_out_and_counted(
    make_model: Make, windows: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("mixed", torch.float32).eval()
    measured: list[tuple[float, float]] = []

    def bumpy(model: MidskipForCausalLM, *args: Any, **kwargs: Any) -> dict[str, Any]:
        result = evaluate(model, *args, **kwargs)
        factor = model.model.policy.factor
        share = max(0.0, 1 - 0.2 * factor) + (0.06 if 1.5 < factor < 2 else -0.15 if 0.3 < factor < 0.9 else 0)
        measured.append((factor, share))
        return result | {"executed_share": share}

    monkeypatch.setattr(midskip.calibrate, "evaluate", bumpy)
    calibration = calibrate(model, windows, batch_size=48)
    kept = dict(zip(calibration.factor, calibration.share, strict=True))
    assert kept[1.0] == 0.8 and {0.0, 2.0} <= kept.keys(), "as trained"
    dropped = {factor for factor, _ in measured if factor < calibration.factor[-1]} - kept.keys()
    assert calibration.num_dropped == len(dropped) > 3
    assert all(0.3 < factor < 0.9 or 1 < factor <= 2 for factor in dropped)
    assert calibration.share == sorted(calibration.share, reverse=True)


def test_what_cannot_be_calibrated_is_refused(make_model: Make, windows: list[dict[str, Tensor]]) -> None:
    model = make_model("mixed", torch.float32)
    model.model.policy.set_effort(0.7)
    for more, message in (
        ({"lowest": 0.0}, "lowest is 0.0; expected a share of the blocks between 0 and 1"),
        ({"lowest": 1.0}, "lowest is 1.0"),
        ({"block_tokens": 0}, "block_tokens is 0; expected at least 1"),
        ({"block_tokens": 512}, "has 2304 tokens; expected at least 4096, 8 blocks of 512: give more text"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(model, windows, batch_size=48, **more)  # pyright: ignore[reportArgumentType]
        assert model.config.calibration is None and model.model.policy.factor == 0.7, "as before"
    with pytest.raises(ValueError, match=r"the policy Dense has no run-time budget: there is nothing to calibrate"):
        calibrate(make_model(policy="dense"), windows)
    with pytest.raises(ValueError, match="no token leaves on this text, whatever the factor: all scores are 0"):
        calibrate(make_model("kept", torch.float32), windows, batch_size=48)


def test_windows_are_thinned_evenly() -> None:
    windows = TokenWindows(torch.arange(1, 1001).numpy(), 100)
    assert thinned(windows, 1000) is windows and thinned(windows, 10**9) is windows
    for max_tokens, numbers in ((999, [0, 2, 4, 6, 8]), (300, [0, 4, 8]), (1, [0])):
        chosen = thinned(windows, max_tokens)
        assert [int(chosen[i]["input_ids"][0]) // 100 for i in range(len(chosen))] == numbers


@torch.no_grad()
def test_loss_by_budget_stands_beside_the_calibrations(
    model: MidskipForCausalLM, windows: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    model.set_budget(0.9, 4)
    rows = loss_by_budget(model, windows, [0.3, 0.65, 1.0], batch_size=48)
    assert model.model.policy.factor == pytest.approx(0.5) and model.model.policy.ceiling == 4 and model.watch
    assert [row["factor"] for row in rows] == pytest.approx([3.6, 1.5, 0.0])
    for row, expected in zip(rows, ((0.3, 2.9), (0.65, 2.3), (1.0, 2.0)), strict=True):
        there = row["calibration"]
        assert (there["executed_share"], there["loss"]) == pytest.approx(expected) and there["text"] == "news"
        model.model.policy.set_effort(row["factor"])
        result = evaluate(model, windows, batch_size=48)
        assert (row["executed_share"], row["loss"]) == (result["executed_share"], result["loss"])
        assert row["in_band"] is False, "the loss of noise is above that of the calibration"
    curve = Calibration.from_dict(CURVE | {"loss_std": [9.0] * 4, "share_std": [1.0] * 4})
    model.config.calibration = curve.to_dict()
    assert all(row["in_band"] for row in loss_by_budget(model, windows, [0.3, 1.0], batch_size=48))
    table = budget_table(rows, "\x1b[31mnoise")
    assert table.row_count == 3 and "␛[31mnoise" in str(table.title)
    write_curves(tmp_path / "curve.png", [("news", [(1.0, 2.0), (0.5, 2.5)]), ("_$x$", [(0.7, 3.0)])], "title")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    for points in ([], [(1.5, 2.0)]):
        with pytest.raises(ValueError, match="the curve of 'news' is"):
            write_curves(tmp_path / "none.png", [("news", points)])


# ---- setting it


def test_no_budget_is_the_model_as_trained(model: MidskipForCausalLM, ragged: tuple[Tensor, Tensor]) -> None:
    before = model(*ragged)
    model.set_budget(0.3, 3)
    under = model(*ragged)
    assert not torch.equal(under.gates, before.gates) and ((under.gates > 0).sum(0) <= 3).all()
    model.set_budget()
    after = model(*ragged)
    assert torch.equal(after.logits, before.logits) and torch.equal(after.gates, before.gates) and model.watch is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0.0}, r"budget is 0\.0; expected a share of the blocks, above 0 and up to 1, or None"),
        ({"budget": 1.5}, r"budget is 1\.5"),
        ({"budget": 30}, "budget is 30"),
        ({"ceiling": 0}, "ceiling is 0; expected a whole number of blocks from 1 to 4"),
        ({"ceiling": 5}, "ceiling is 5"),
        ({"budget": 0.5, "ceiling": 5}, "ceiling is 5"),
        ({"budget": 0.5, "on_drift": "panic"}, "on_drift is 'panic'; expected one of 'keep', 'run_all', 'error'"),
        ({"on_drift": "error"}, "on_drift is 'error' and there is no budget whose drift to watch"),
        ({"ceiling": 2, "on_drift": "run_all"}, "there is no budget whose drift to watch"),
    ],
)
def test_budgets_that_cannot_be_are_refused(model: MidskipForCausalLM, arguments: Any, message: str) -> None:
    model.set_budget(0.9, 2)
    policy, watch = model.model.policy, model.watch
    with pytest.raises(ValueError, match=message):
        model.set_budget(**arguments)
    assert (policy.factor, policy.ceiling) == (pytest.approx(0.5), 2) and model.watch is watch, "what was set stays"


def test_a_budget_needs_a_calibration_and_a_ceiling_does_not(make_model: Make) -> None:
    model = make_model("kept").eval()
    for budget in (0.5, 1.0):
        with pytest.raises(ValueError, match=r"has no calibration, .*: run `midskip calibrate` on its run folder"):
            model.set_budget(budget)
    model.set_budget(ceiling=2)
    assert ((model(torch.tensor([[1, 2, 3]])).gates > 0).sum(0) == 2).all()
    dense = make_model(policy="dense")
    dense.set_budget()
    for arguments in ({"budget": 0.5}, {"ceiling": 2}):
        with pytest.raises(ValueError, match="has no run-time budget"):
            dense.set_budget(**arguments)
    model.config.calibration = CURVE | {"share": [1.0, 0.5, 0.6, 0.2]}
    with pytest.raises(ValueError, match=r"calibration\['share'\] is .*; expected 1 and then falling"):
        model.set_budget(0.5)


def test_a_budget_below_the_range_warns_once(model: MidskipForCausalLM) -> None:
    model.set_budget(0.25)
    message = r"budget of 0\.1 is below the range that was calibrated, 0\.250 to 1: about 0\.250 of the blocks"
    with pytest.warns(UserWarning, match=message) as found:
        model.set_budget(0.1)
    assert len(found) == 1 and found[0].filename == __file__
    assert model.model.policy.factor == 4.0
    model.set_budget(0.05)  # a second warning would be an error


def test_generation_runs_under_the_budget(model: MidskipForCausalLM) -> None:
    ids_1T = torch.randint(31, (1, 12))
    for arguments in ({"ceiling": 2}, {"budget": 0.3}, {"budget": 1.0, "ceiling": 2}, {}):
        model.set_budget(**arguments)
        with Meter(model) as meter:
            whole: Any = model.generate(ids_1T, max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=True)  # pyright: ignore[reportAttributeAccessIssue]
        with Meter(model) as at_once:
            model(whole[:, :-1])
        if arguments.get("ceiling"):
            assert meter.executed_share <= 0.5
        assert meter.query_rows_L == at_once.query_rows_L, "token by token as all at once"


# ---- the watch


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
        self.all_run = 0
        self.watch = DriftWatch(Calibration.from_dict(CURVE), factor, ceiling, on_drift, self.run_all)
        self.num_heads = 0

    def run_all(self) -> None:
        self.all_run += 1

    def see(self, share: float, loss: float = 2.0, lengths: tuple[int, ...] = (9,)) -> None:
        """Logits of two tokens, the right one of which is less likely by so much."""

        def head(h_RD: Tensor) -> Tensor:
            self.num_heads += len(h_RD)
            return torch.stack((torch.zeros(len(h_RD)), h_RD[:, 0]), 1)

        h_ND = torch.full((sum(lengths), 1), math.log(math.expm1(loss)))
        self.watch.see(list(lengths), share, h_ND, torch.zeros(sum(lengths), dtype=torch.int64), head)


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
        return seen.see(share, loss)
    message = rf"live prompts have left the band of the calibration on 'news': .*{message}.*; calibrate on text like"
    for _ in range(2):
        with pytest.raises(BudgetDriftError, match=message):
            seen.see(share, loss)
        seen.see(0.5)  # the next block is a new one


def test_keep_warns_once_and_goes_on() -> None:
    seen = Seen("keep")
    with pytest.warns(UserWarning, match=r"expected 0\.380 to 0\.620; the budget stays"):
        seen.see(0.2)
    before = seen.num_heads
    seen.see(0.2, 9.0)  # a second warning would be an error
    assert seen.all_run == 0 and seen.num_heads == before, "and costs nothing any more"


def test_run_all_warns_once_and_runs_all() -> None:
    seen = Seen("run_all")
    with pytest.warns(UserWarning, match=r"from now on every block runs"):
        seen.see(0.5, 9.0)
    seen.see(0.2)
    assert seen.all_run == 1


def test_prompts_are_judged_a_block_at_a_time() -> None:
    seen = Seen("error")
    seen.see(0.2, lengths=(5,))
    seen.see(0.2, lengths=(2,))  # 7 tokens, 5 of them scored
    with pytest.raises(BudgetDriftError, match=r"0\.200 of the blocks ran on the last 10 tokens"):
        seen.see(0.2, lengths=(2, 0, 1))
    with pytest.raises(BudgetDriftError, match=r"the loss of 8 of the last tokens was 5\.000 nats") as error:
        seen.see(0.5, 14.0, lengths=(2, 2))  # 6 of 2 nats and 2 of 14
    assert "blocks ran" not in str(error.value)


def test_steps_of_generation_are_no_prompts() -> None:
    seen = Seen("error")
    for _ in range(99):
        seen.see(0.0, 99.0, lengths=(1, 1))
    seen.see(0.5, lengths=(6, 4))
    for step in range(1, 9):
        seen.see(0.0, 99.0, lengths=(6 + step, 4 + step))
    with pytest.raises(BudgetDriftError):
        seen.see(0.0, lengths=(14, 12))
    # under a ceiling a low share is no drift
    seen = Seen("error", ceiling=2)
    seen.see(0.0)
    with pytest.raises(BudgetDriftError):
        seen.see(0.9)


def test_ids_that_are_not_known_leave_the_share(model: MidskipForCausalLM) -> None:
    model.config.calibration = CURVE | {"share": [1.0, 0.02, 0.01, 0.001]}
    model.set_budget(0.015, on_drift="error")
    with pytest.raises(BudgetDriftError, match=r"of the blocks ran on the last 40 tokens, expected .* to 0\.130; cal"):
        model(inputs_embeds=torch.randn(1, 40, 16, dtype=torch.float64))


@torch.no_grad()
def test_the_model_shows_its_prompts_to_the_watch(model: MidskipForCausalLM, ragged: tuple[Tensor, Tensor]) -> None:
    ids_BT, valid_BT = ragged
    model.set_budget(0.65)
    seen: list[tuple[Any, ...]] = []
    assert model.watch
    model.watch.see = lambda *arguments: seen.append(arguments)  # pyright: ignore[reportAttributeAccessIssue]
    output = model(ids_BT, attention_mask=valid_BT, logits_to_keep=1)
    (lengths, share, h_ND, ids_N, head), *more = seen
    assert not more and lengths == valid_BT.sum(1).tolist()
    assert share == pytest.approx((output.gates > 0).sum().item() / (4 * valid_BT.sum().item()))
    assert torch.equal(ids_N, ids_BT[valid_BT.bool()]) and len(h_ND) == len(ids_N)
    full = model(ids_BT, attention_mask=valid_BT).logits[valid_BT.bool()]
    torch.testing.assert_close(head(h_ND), full, rtol=0, atol=1e-12)
    seen.clear()
    evaluate(model, [{"input_ids": ids_BT[0], "labels": ids_BT[0]}])
    assert seen == [] and model.watch is not None, "measuring is not live"


@torch.no_grad()
def test_drift_on_live_prompts(model: MidskipForCausalLM, windows: list[dict[str, Tensor]]) -> None:
    calibration = calibrate(model, windows, "noise", batch_size=48)
    batch = {"input_ids": torch.stack([window["input_ids"] for window in windows[:12]])}
    model.set_budget(0.6, on_drift="error")
    for _ in range(8):
        model(**batch, logits_to_keep=1)  # like the text it was calibrated on
    odd = {"input_ids": torch.full((12, 48), int(model(**batch).logits[0, -1].argmin()))}
    with pytest.raises(BudgetDriftError, match="calibration on 'noise': "):
        for _ in range(9):  # 64 of each pass are scored
            model(**odd, logits_to_keep=1)
    for on_drift, factor in (("keep", calibration.factor_for(0.6)), ("run_all", 0.0)):
        model.set_budget(0.6, 4, on_drift=on_drift)
        with pytest.warns(UserWarning, match=f"on_drift: {on_drift}") as found:
            for _ in range(9):
                output = model(**odd)
        assert len(found) == 1
        policy = model.model.policy
        assert (policy.factor, policy.ceiling) == (factor, 4 if factor else None)
        assert bool((output.gates == 1).all()) is (factor == 0)
    model.set_budget(0.6, on_drift="error")
    with Meter(model) as meter:
        model(**batch, logits_to_keep=1)
    assert meter.head_rows == 12 + SCORED_ROWS, "what the watch costs"


# ---- the command line


@pytest.fixture(autouse=True)
def _same_logging_after() -> Iterator[None]:
    level = logging.get_verbosity()
    yield
    logging.set_verbosity(level)


@pytest.fixture
def run(make_model: Make, learnt: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A run folder without recipe, with two texts beside it."""
    folder = tmp_path / "run"
    make_model("mixed", torch.float32, vocab_size=len(learnt)).save_pretrained(folder)
    learnt.save_pretrained(folder)
    for name, word in (("here", "the cat sat on mat"), ("there", "Function returns 名前 names")):
        documents = [f"{word} {i % 7}, and {word[::-1]} {i}.\n" * 4 for i in range(40)]
        (tmp_path / f"{name}.txt").write_text("<|endoftext|>\n".join(documents), encoding="utf-8")
    return folder


def test_calibrate_evaluate_and_generate(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "config.json").read_text()
    files = {file.name: file.read_bytes() for file in run.iterdir()}
    arguments = [str(run), "--data", str(tmp_path / "here.txt"), "--batch_size", "64"]
    assert main(["calibrate", *arguments, "--lowest", "0.4", "--max_tokens", "2600", "--name", "cats"]) == 0
    captured = capsys.readouterr()
    curve = json.loads(captured.out)
    assert Calibration.from_dict(curve).text == "cats" and 2048 <= curve["num_tokens"] <= 2700
    assert curve["share"][-1] < 0.55 and "Calibrated on cats" in captured.err
    after = json.loads((run / "config.json").read_text())
    assert after["calibration"] == curve
    after["calibration"] = None
    assert json.dumps(after, indent=2) + "\n" == before, "nothing else changed, nor its order"
    assert {file.name for file in run.iterdir()} == set(files)
    assert all((run / name).read_bytes() == file for name, file in files.items() if name != "config.json")

    picture = tmp_path / "curve.png"
    there = [str(run), "--data", str(tmp_path / "there.txt"), "--batch_size", "64"]
    assert main(["evaluate", *there, "--budgets", "0.6,1", "--picture", str(picture)]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert [row["budget"] for row in result["budgets"]] == [0.6, 1.0] and result["budgets"][1]["executed_share"] == 1
    assert result["budgets"][0]["executed_share"] != pytest.approx(result["executed_share"])
    assert "there: cats" in captured.err and picture.read_bytes().startswith(b"\x89PNG")

    shares = []
    for more in ([], ["--budget", "1"], ["--ceiling", "2"], ["--budget", "1", "--ceiling", "2"]):
        assert main(["generate", str(run), "--prompt", "the cat", "--max_new_tokens", "5", *more]) == 0
        text, share, legend = capsys.readouterr().out.rstrip("\n").rsplit("\n", 2)
        assert text.startswith("the cat") and share.endswith("% of the blocks ran") and legend.startswith("blocks run")
        shares.append(float(share.split("%")[0]))
    assert shares[1] == 100 and shares[2] <= 50 and shares[3] == 50 and 0 < shares[0] < 100


def test_budgets_that_cannot_be_used_are_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("midskip.data.encode_source", lambda *_, **__: pytest.fail("the text was read first"))
    here = [str(run), "--data", str(tmp_path / "here.txt")]
    for arguments, message in (
        (["calibrate", *here, "--lowest", "2"], "lowest is 2.0"),
        (["evaluate", *here, "--budgets", "0.5"], "has no calibration"),
        (["evaluate", *here, "--budgets", "a"], "--budgets"),
        (["evaluate", *here, "--picture", "a.png"], "give --budgets too"),
        (["evaluate", *here, "--budgets", "0.5", "--picture", str(tmp_path / "no" / "a.png")], "there is no folder"),
        (["generate", str(run), "--prompt", "a", "--budget", "0.5"], "has no calibration"),
        (["generate", str(run), "--prompt", "a", "--ceiling", "9"], "ceiling is 9"),
        (["generate", str(run), "--prompt", "a", "--on_drift", "error"], "no budget whose drift to watch"),
        (["generate", str(run), "--prompt", "a", "--on_drift", "panic"], "invalid choice: 'panic'"),
    ):
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and message in err, err


def test_drift_ends_generation_with_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "config.json"
    odd = CURVE | {"share": [1.0, 0.003, 0.002, 0.001], "share_std": [0.0] * 4, "block_tokens": 2}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"calibration": odd}))
    arguments = ["generate", str(run), "--prompt", "the cat sat on the mat", "--max_new_tokens", "2"]
    assert main([*arguments, "--budget", "0.002", "--on_drift", "error"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "live prompts have left the band of the calibration on 'news'" in err


def test_depth_of_tokens_is_not_live(run: Path, learnt: PreTrainedTokenizerFast) -> None:
    model = MidskipForCausalLM.from_pretrained(run)
    model.config.calibration = CURVE | {"loss_std": [0.0] * 4, "block_tokens": 1}
    model.set_budget(0.5, on_drift="error")
    depth_of_tokens(model.eval(), learnt, list(range(20)))
    with pytest.raises(BudgetDriftError):
        model(torch.arange(20)[None])
