"""The curve that a budget at run time goes by: what it says, and how it is measured."""

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_curve import CURVE
from torch import Tensor

import midskip.budget.calibrate
from midskip import MidskipConfig, MidskipForCausalLM
from midskip.budget.calibrate import GAP, beside_calibration, calibrate, loss_by_budget, thinned
from midskip.budget.calibration import Calibration, bucket_counts, bucket_of
from midskip.data import TokenWindows
from midskip.evaluate import evaluate
from midskip.report import budget_note, budget_table, write_curves

Make = Callable[..., MidskipForCausalLM]


def test_a_budget_becomes_the_factor_between_the_points_measured() -> None:
    curve = Calibration.from_dict(CURVE)
    expected = {1: 0.0, 0.9: 0.5, 0.8: 1.0, 0.65: 1.5, 0.5: 2.0, 0.3: 3.6, 0.25: 4.0, 0.1: 4.0}
    for budget, score_scale in expected.items():
        assert curve.scale_for(budget) == pytest.approx(score_scale)
        if budget >= 0.25:
            assert curve.at(score_scale)[0] == pytest.approx(budget)
    budgets = [number / 100 for number in range(1, 101)]
    score_scales = [curve.scale_for(budget) for budget in budgets]
    assert score_scales == sorted(score_scales, reverse=True), "less budget, no smaller score_scale"
    assert curve.at(3.0) == pytest.approx((0.375, 2.75)) and curve.at(9.0) == (0.25, 3.0)
    for budget in (0, -0.5, 1.01, math.nan, math.inf, True, "0.5"):
        with pytest.raises(ValueError, match=r"budget is .*; expected a share of the blocks, above 0 and up to 1"):
            curve.scale_for(budget)  # pyright: ignore[reportArgumentType]


def test_more_budget_never_gives_more_loss() -> None:
    curve = Calibration.from_dict(CURVE | {"loss": [2.6, 2.1, 2.5, 3.0]})
    expected = {1.0: 1.0, 0.9: 1.0, 0.8: 1.0, 0.795: 1.0, 0.78: 1.0 + 0.02 / 0.3, 0.5: 2.0, 0.491: 2.0}
    for budget, score_scale in expected.items():
        assert curve.scale_for(budget) == pytest.approx(score_scale), budget
    curve = Calibration.from_dict(CURVE | {"loss": [2.6, 2.7, 2.5, 2.5]})
    assert curve.scale_for(0.9) == 4.0, "of equal losses the least work"
    losses = [curve.at(curve.scale_for(number / 100))[1] for number in range(1, 101)]
    assert losses == sorted(losses, reverse=True)


def test_by_share_a_budget_is_what_runs_and_all_of_it_runs_everything() -> None:
    """Even where less has a lower loss by chance."""
    curve = Calibration.from_dict(CURVE | {"loss": [2.6, 2.1, 2.5, 3.0], "rule": "share"})
    assert curve.scale_for(1.0) == 0.0
    fine = {"share": [1.0, 0.97, 0.94, 0.91]}
    assert Calibration.from_dict(curve.to_dict() | fine).scale_for(0.985) == pytest.approx(0.5)
    assert Calibration.from_dict(curve.to_dict()) == curve


def test_where_the_share_falls_by_a_step_no_more_than_the_budget_runs() -> None:
    """As that of layers that are left out for all: between two points it may be that of either."""
    curve = Calibration.from_dict(CURVE | {"rule": "share"})  # 1.0, 0.8, 0.5 and 0.25 ran at 0, 1, 2 and 4
    assert [curve.scale_for(budget) for budget in (0.9, 0.8, 0.6, 0.25, 0.1)] == [1.0, 1.0, 2.0, 4.0, 4.0]


def test_the_band_is_four_deviations_around_the_points_on_either_side() -> None:
    curve = Calibration.from_dict(CURVE)
    counts = bucket_counts([9, 2])
    for score_scale, points in ((0.0, [0]), (1.0, [1]), (1.5, [1, 2]), (3.9, [2, 3]), (4.0, [3])):
        share, share_std, loss, loss_std = (
            [CURVE[name][point] for point in points] for name in ("share", "share_std", "loss", "loss_std")
        )
        low, high = curve.share_band(score_scale, counts)
        assert low == pytest.approx(min(a - 4 * b for a, b in zip(share, share_std, strict=True)), abs=2e-6)
        assert high == pytest.approx(max(a + 4 * b for a, b in zip(share, share_std, strict=True)), abs=2e-6)
        expected = max(a + 4 * b for a, b in zip(loss, loss_std, strict=True))
        assert curve.highest_loss(score_scale, counts) == pytest.approx(expected)


def test_the_band_is_that_of_the_positions() -> None:
    lengths = [0, 1, 3, 9, 3000]
    counts = [0] * 12
    for length in lengths:
        for position in range(length):
            counts[bucket_of(position)] += 1
    assert bucket_counts(lengths) == counts and counts[:3] == [4, 3, 5] and counts[11] == 3000 - 1024
    early = [[9.0, 5.0, *[loss] * 10] for loss in CURVE["loss"]]
    curve = Calibration.from_dict(CURVE | {"loss_by_bucket": early})
    assert curve.highest_loss(1.0, bucket_counts([1])) == pytest.approx(9 + 0.2)
    assert curve.highest_loss(1.0, bucket_counts([2, 2])) == pytest.approx(7 + 0.2)
    assert curve.highest_loss(1.0, bucket_counts([4])) == pytest.approx((9 + 5 + 2 * 2.1) / 4 + 0.2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": 3}, r"calibration\['text'\] is 3; expected a string"),
        ({"num_tokens": 0}, r"calibration\['num_tokens'\] is 0; expected a whole number of at least 1"),
        ({"block_tokens": 2.5}, r"\['block_tokens'\] is 2.5"),
        ({"num_dropped": True}, r"\['num_dropped'\] is True"),
        ({"score_scale": [0.1, 1.0, 2.0, 4.0]}, r"\['score_scale'\] is .*; expected 0 and then rising numbers"),
        ({"score_scale": [0.0, 2.0, 2.0, 4.0]}, r"\['score_scale'\] is .*; expected 0 and then rising numbers"),
        ({"share": [1.0, 0.8, 0.8, 0.25]}, r"\['share'\] is .*; expected 1 and then falling numbers"),
        ({"share": [0.9, 0.8, 0.5, 0.25]}, r"\['share'\] is .*; expected 1 and then falling numbers"),
        ({"share": [1.0, 0.8, 0.5]}, r"\['share'\] is 3 numbers; expected 4, as score_scale"),
        ({"loss": [2.0, 2.1, math.nan, 3.0]}, r"\['loss'\] is .*; expected two or more finite numbers of at least 0"),
        ({"loss_std": [0.1, 0.1, -0.1, 0.1]}, r"\['loss_std'\] is .*; expected two or more finite numbers"),
        ({"share_std": "wide"}, r"\['share_std'\] is 'wide'"),
        ({"loss_by_bucket": [[1.0] * 12] * 3}, r"\['loss_by_bucket'\] is .*; expected 4 lists of 12 numbers"),
        ({"share_by_bucket": [[1.0] * 11] * 4}, r"\['share_by_bucket'\] is .*; expected 4 lists of 12 numbers"),
        ({"score_scale": [0.0], "share": [1.0]}, r"\['score_scale'\] is \[0.0\]; expected two or more"),
        ({"rule": "luck"}, r"calibration\['rule'\] is 'luck'; expected 'loss' or 'share'"),
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


def by_hand(model: MidskipForCausalLM, windows: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Share and loss by group of positions, and the deviation of blocks of 256 tokens from those."""
    tokens = []  # position, share, loss
    for window in windows:
        output = model(window["input_ids"][None])
        shares = (output.gates[:, 0] > 0).double().mean(0).tolist()
        losses = [*F.cross_entropy(output.logits[0, :-1], window["labels"][1:], reduction="none").tolist(), None]
        tokens += zip(range(len(shares)), shares, losses)
    found: dict[str, Any] = {}
    for name, column in (("share", 1), ("loss", 2)):
        groups: dict[int, list[float]] = {}
        for token in tokens:
            if token[column] is not None:
                groups.setdefault(bucket_of(token[0]), []).append(token[column])
        means = {place: statistics.mean(group) for place, group in groups.items()}
        found[f"{name}_by_bucket"] = [means.get(place, means[6]) for place in range(12)]  # position 47 is in group 6
        blocks = [tokens[start : start + 256] for start in range(0, len(tokens) - 255, 256)]
        known = [[token for token in block if token[column] is not None] for block in blocks]
        excess = [statistics.mean(token[column] - means[bucket_of(token[0])] for token in block) for block in known]
        found[f"{name}_std"] = statistics.stdev(excess)
    return found


@pytest.mark.integration
@torch.no_grad()
def test_the_curve_is_what_the_model_does(make_model: Make, windows: list[dict[str, Tensor]], tmp_path: Path) -> None:
    model = make_model("mixed")
    model.model.policy.set_limits(0.7, 2)
    calibration = calibrate(model, windows, "noise", lowest=0.2, batch_size=48)
    assert model.training and (model.model.policy.score_scale, model.model.policy.max_layers) == (0.7, 2), "as before"
    assert calibration.text == "noise" and calibration.num_tokens == 48 * 48 and calibration.block_tokens == 256
    assert calibration.score_scale[0] == 0 and calibration.share[0] == 1
    gaps = [before - after for before, after in pairwise(calibration.share)]
    assert min(gaps) > 0 and max(gaps) <= GAP and len(gaps) > 10
    model.eval()
    for point in (0, 5, len(gaps)):
        model.model.policy.set_limits(calibration.score_scale[point])
        result = evaluate(model, windows, batch_size=48)
        assert calibration.share[point] == result["executed_share"] and calibration.loss[point] == result["loss"]
        for name, expected in by_hand(model, windows).items():
            assert getattr(calibration, name)[point] == pytest.approx(expected, rel=1e-6, abs=1e-9), name
    model.set_budget()
    model.save_pretrained(tmp_path)
    loaded = MidskipForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config.calibration == calibration.to_dict() == model.config.calibration
    for budget in (1.0, 0.9, 0.75, 0.6):
        loaded.set_budget(budget)
        result = evaluate(loaded, windows, batch_size=48)
        assert result["executed_share"] <= budget + 0.6 * GAP
        expected = [loss for share, loss in zip(calibration.share, calibration.loss, strict=True) if share <= budget]
        assert result["loss"] <= min(expected) + 1e-9


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The scales at which `calibrate` reads the text."""
    score_scales: list[float] = []

    def spy(model: MidskipForCausalLM, *args: Any, **kwargs: Any) -> dict[str, Any]:
        score_scales.append(model.model.policy.score_scale)
        return evaluate(model, *args, **kwargs)

    monkeypatch.setattr(midskip.budget.calibrate, "evaluate", spy)
    return score_scales


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
    assert 0.3 < calibration.share[-1] < 0.7 and calibration.score_scale[-1] <= 1000 and len(passes) < 32
    model.model.policy.set_limits(1e6)
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
        score_scale = model.model.policy.score_scale
        share = max(0.0, 1 - 0.2 * score_scale) + (
            0.06 if 1.5 < score_scale < 2 else -0.15 if 0.3 < score_scale < 0.9 else 0
        )
        measured.append((score_scale, share))
        return result | {"executed_share": share}

    monkeypatch.setattr(midskip.budget.calibrate, "evaluate", bumpy)
    calibration = calibrate(model, windows, batch_size=48)
    kept = dict(zip(calibration.score_scale, calibration.share, strict=True))
    assert kept[1.0] == 0.8 and {0.0, 2.0} <= kept.keys(), "as trained"
    dropped = {score_scale for score_scale, _ in measured if score_scale < calibration.score_scale[-1]} - kept.keys()
    assert calibration.num_dropped == len(dropped) > 3
    assert all(0.3 < score_scale < 0.9 or 1 < score_scale <= 2 for score_scale in dropped)
    assert calibration.share == sorted(calibration.share, reverse=True)


@pytest.mark.parametrize("lowest", [0.2, 0.5, 0.8])
def test_the_model_as_trained_is_on_the_curve_however_little_runs(
    make_model: Make, windows: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch, lowest: float
) -> None:
    def steep(model: MidskipForCausalLM, *args: Any, **kwargs: Any) -> dict[str, Any]:
        share = max(0.01, 1 - 0.9 * min(model.model.policy.score_scale, 1) - 0.01 * model.model.policy.score_scale)
        return evaluate(model, *args, **kwargs) | {"executed_share": share}

    monkeypatch.setattr(midskip.budget.calibrate, "evaluate", steep)
    calibration = calibrate(make_model("mixed", torch.float32), windows, lowest=lowest, batch_size=48)
    assert calibration.score_scale[-1] == 1 and calibration.share[-1] == pytest.approx(0.09)
    assert calibration.share == sorted(calibration.share, reverse=True) and calibration.num_dropped == 0


def test_what_cannot_be_calibrated_is_refused(make_model: Make, windows: list[dict[str, Tensor]]) -> None:
    model = make_model("mixed", torch.float32)
    model.model.policy.set_limits(0.7)
    for more, message in (
        ({"lowest": 0.0}, "lowest is 0.0; expected a share of the blocks between 0 and 1"),
        ({"lowest": 1.0}, "lowest is 1.0"),
        ({"block_tokens": 0}, "block_tokens is 0; expected at least 1"),
        ({"block_tokens": 512}, "has 2304 tokens; expected at least 4096, 8 blocks of 512: give more text"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(model, windows, batch_size=48, **more)  # pyright: ignore[reportArgumentType]
        assert model.config.calibration is None and model.model.policy.score_scale == 0.7, "as before"
    with pytest.raises(ValueError, match=r"the policy Dense has no run-time budget: there is nothing to calibrate"):
        calibrate(make_model(policy="dense"), windows)
    with pytest.raises(ValueError, match="no token leaves on this text, whatever the scale: all scores are 0"):
        calibrate(make_model("kept", torch.float32), windows, batch_size=48)


def test_windows_are_thinned_evenly() -> None:
    windows = TokenWindows(torch.arange(1, 1001).numpy(), 100)
    assert thinned(windows, 1000) is windows and thinned(windows, 10**9) is windows
    for max_tokens, numbers in ((999, [0, 2, 4, 6, 8]), (300, [0, 4, 8]), (1, [0])):
        chosen = thinned(windows, max_tokens)
        assert [int(chosen[i]["input_ids"][0]) // 100 for i in range(len(chosen))] == numbers


@torch.no_grad()
def test_loss_by_budget_stands_beside_the_calibrations(
    calibrated: MidskipForCausalLM, windows: list[dict[str, Tensor]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    calibrated.set_budget(0.9, 4)
    rows = loss_by_budget(calibrated, windows, [0.3, 0.65, 1.0], batch_size=48)
    assert calibrated.model.policy.score_scale == pytest.approx(0.5) and calibrated.model.policy.max_layers == 4
    assert [row["score_scale"] for row in rows] == pytest.approx([3.6, 1.5, 0.0])
    for row, expected in zip(rows, ((0.3, 2.9), (0.65, 2.3), (1.0, 2.0)), strict=True):
        there = row["calibration"]
        assert (there["executed_share"], there["loss"]) == pytest.approx(expected) and there["text"] == "news"
        calibrated.model.policy.set_limits(row["score_scale"])
        result = evaluate(calibrated, windows, batch_size=48)
        assert (row["executed_share"], row["loss"]) == (result["executed_share"], result["loss"])
        assert row["in_band"] is False, "the loss of noise is above that of the calibration"
    curve = Calibration.from_dict(CURVE | {"loss_std": [9.0] * 4, "share_std": [1.0] * 4})
    calibrated.config.calibration = curve.to_dict()
    assert all(row["in_band"] for row in loss_by_budget(calibrated, windows, [0.3, 1.0], batch_size=48))
    as_trained = beside_calibration(curve, 1.0, evaluate(calibrated, windows, batch_size=48))
    table = budget_table([as_trained, *rows], "\x1b[31mnoise")
    assert table.row_count == 4 and "␛[31mnoise" in str(table.title)
    assert [str(cell) for cell in table.columns[0].cells] == ["as trained", "0.3", "0.65", "1"]
    assert budget_note(curve).endswith("A larger one is never worse there; on other text it may be.")
    assert "A larger one may be worse" in budget_note(replace(curve, rule="share"))
    write_curves(tmp_path / "curve.png", [("news", [(1.0, 2.0), (0.5, 2.5)]), ("_$x$", [(0.7, 3.0)])], "title")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    curves = [("news", [(1.0, 2.0), (0.5, 2.5)]), ("mine", [(0.7, 3.0)])]
    figures = []
    with monkeypatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure))
        write_curves(tmp_path / "none.png", curves, as_trained=[(0.8, 2.1), (0.9, 2.8)])
    (axes,) = figures[0].axes
    marks = [line.get_xydata().tolist() for line in axes.get_lines() if line.get_marker() == "D"]
    assert marks == [[[0.8, 2.1]], [[0.9, 2.8]]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["on news", "as trained", "on mine"]
    for points in ([], [(1.5, 2.0)]):
        with pytest.raises(ValueError, match="the curve of 'news' is"):
            write_curves(tmp_path / "none.png", [("news", points)])
