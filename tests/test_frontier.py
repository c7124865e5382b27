"""Models against the envelope of dense ones: the numbers, and what is not said."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tiny_frontier import point, write_sweep

from midskip.frontier import Envelope, frontier, mean_interval, t_quantile, write_frontier

SEEDS = (0.0, 0.03, -0.02)  # what a seed adds to the loss of every model
DENSE = [(1e6, 3.0), (4e6, 2.6)]  # FLOPs a token, loss; at 2e6 the envelope is at 2.8


def shifted(loss: float, by: tuple[float, ...] = (0, 0, 0)) -> list[float]:
    return [loss + seed + more for seed, more in zip(SEEDS, by, strict=True)]


def dense(**more: Any) -> list[dict[str, Any]]:
    return [point(shifted(loss), flops, dense=True, **more) for flops, loss in DENSE]


def compared(folder: Path, *points: dict[str, Any], beside: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """At FLOPs, what is said of those points beside dense models."""
    result = frontier(write_sweep(folder, {"dense": beside or dense(), "gated": points}))
    return [row["against_dense"]["flops"] for row in result["points"] if not row["dense"]]


# ---- the envelope


def test_the_envelope_is_a_running_minimum_interpolated_in_the_logarithm_of_the_cost() -> None:
    envelope = Envelope([(4e6, 2.6), (1e6, 3.0), (2e6, 3.1), (8e6, 2.7), (4e6, 2.65)])
    assert envelope.knots == [(1e6, 3.0), (4e6, 2.6)], "a model that is worse than a cheaper one changes nothing"
    assert [envelope.at(cost) for cost in (1e6, 4e6, 6e6, 8e6)] == [3.0, 2.6, 2.6, 2.6]
    assert envelope.at(2e6) == pytest.approx(2.8) and envelope.at(4e6 / math.sqrt(2)) == pytest.approx(2.7)
    assert envelope.at(0.999e6) is None and envelope.at(8.001e6) is None
    assert envelope.cost_at(2.8) == pytest.approx(2e6) and envelope.cost_at(2.6) == pytest.approx(4e6)
    assert envelope.cost_at(3.01) is None and envelope.cost_at(2.59) is None


def test_models_that_diverged_or_cost_nothing_are_no_part_of_it() -> None:
    envelope = Envelope([(1e6, 3.0), (4e6, 2.6), (9e6, math.inf), (5e5, math.nan), (0.0, 1.0)])
    assert (envelope.knots, envelope.cheapest, envelope.dearest) == ([(1e6, 3.0), (4e6, 2.6)], 1e6, 4e6)
    assert Envelope([]).at(1.0) is None and Envelope([]).cost_at(1.0) is None


def test_depth_and_width_make_one_envelope(tmp_path: Path) -> None:
    deep = [point(shifted(loss), flops, dense=True) for flops, loss in ((1e6, 3.0), (2e6, 2.9), (4e6, 2.6))]
    wide = [point(shifted(loss), flops, dense=True) for flops, loss in ((2e6, 2.7), (4e6, 2.65))]
    result = frontier(write_sweep(tmp_path / "a", {"depth": deep, "width": wide, "gated": [point(shifted(2.8), 2e6)]}))
    on = [(row["arm"], row["on_envelope"]["flops"]) for row in result["points"] if row["dense"]]
    assert on == [("depth", True), ("depth", False), ("depth", True), ("width", True), ("width", False)]
    assert result["points"][-1]["against_dense"]["flops"]["distance"] == pytest.approx(0.1), "better than depth alone"
    assert all(row["against_dense"] is None for row in result["points"] if row["dense"])
    assert result["envelopes"]["flops"]["mean"]["knots"] == [
        (flops, pytest.approx(loss + sum(SEEDS) / 3)) for flops, loss in ((1e6, 3.0), (2e6, 2.7), (4e6, 2.6))
    ]


# ---- intervals and verdicts


def test_quantiles_of_t_are_those_of_printed_tables() -> None:
    printed = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 9: 1.833, 10: 1.812, 29: 1.699, 30: 1.697, 1000: 1.646}
    assert {degrees: round(t_quantile(0.95, degrees), 3) for degrees in printed} == printed
    assert [round(t_quantile(0.975, degrees), 3) for degrees in (1, 2, 3, 30)] == [12.706, 4.303, 3.182, 2.042]
    assert t_quantile(0.5, 3) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="at least 1 degree of freedom"):
        t_quantile(0.95, 0)


def test_an_interval_of_a_mean() -> None:
    assert mean_interval([1.0, 2.0, 3.0, 4.0]) == pytest.approx((2.5 - 1.519090, 2.5 + 1.519090))
    assert mean_interval([1.0]) is None


def test_distance_interval_and_verdict_are_those_worked_out_by_hand(tmp_path: Path) -> None:
    noise = (-0.01, 0.0, 0.01)  # standard deviation 0.01, so half an interval is 2.920 * 0.01 / sqrt(3) = 0.01686
    losses = [2.8 - 0.02, 2.8 - 0.015, 2.8 + 0.02]
    better, same, worse = compared(tmp_path / "a", *(point(shifted(loss, noise), 2e6) for loss in losses))
    assert [row["verdict"] for row in (better, same, worse)] == ["better", "no difference", "worse"]
    assert better["distance"] == pytest.approx(-0.02)
    assert better["interval"] == pytest.approx([-0.02 - 0.01686, -0.02 + 0.01686], abs=1e-5)
    assert list(better["distances"].values()) == pytest.approx([-0.03, -0.02, -0.01])
    # seed by seed, the envelope has these losses at other costs: 0.2 nats are a factor of 2
    percents = [100 * (2 ** (distance / 0.2) - 1) for distance in (-0.03, -0.02, -0.01)]
    assert better["cost_percent"] == pytest.approx(sum(percents) / 3)


def test_what_a_seed_adds_to_all_models_changes_nothing(tmp_path: Path) -> None:
    noise = (-0.01, 0.0, 0.01)
    (paired,) = compared(tmp_path / "paired", point(shifted(2.75, noise), 2e6))
    plain = [point([loss] * 3, flops, dense=True) for flops, loss in DENSE]
    (without,) = compared(tmp_path / "plain", point([2.75 + more for more in noise], 2e6), beside=plain)
    for name in ("distance", "interval", "cost_percent"):
        assert paired[name] == pytest.approx(without[name])
    assert paired["verdict"] == without["verdict"] == "better"
    swapped = point([shifted(2.75, noise)[seed] for seed in (1, 2, 0)], 2e6)  # the same losses, of other seeds
    assert compared(tmp_path / "swapped", swapped)[0]["verdict"] == "no difference"


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_fewer_than_three_seeds_are_never_a_win(tmp_path: Path, num_seeds: int) -> None:
    own = point([*shifted(2.0)[:num_seeds], None, None], 2e6)
    few = [point(shifted(loss)[:num_seeds], flops, dense=True) for flops, loss in DENSE]
    for name, beside in (("own", dense()), ("dense", few)):
        (row,) = compared(tmp_path / name, own if name == "own" else point(shifted(2.0), 2e6), beside=beside)
        assert row["verdict"] == f"not enough seeds ({num_seeds} of 3)" and row["distance"] == pytest.approx(-0.8)


def test_nothing_is_extrapolated(tmp_path: Path) -> None:
    rows = compared(
        tmp_path / "a",
        point(shifted(2.0), 0.99e6),
        point(shifted(2.0), 4.01e6),
        point(shifted(2.0), [2e6, 2e6, 4.01e6]),
        point(shifted(2.0), 2e6),
    )
    outside = "outside the dense range"
    assert [row["verdict"] for row in rows] == [outside, outside, f"{outside} (seed 2)", "better"]
    assert [row["distance"] is None for row in rows] == [True, True, True, False]
    assert [row["cost_percent"] for row in rows] == [None] * 4, "no dense model has a loss of 2.0"


def test_losses_that_cannot_be_compared_are_not(tmp_path: Path) -> None:
    gated = [
        point([2.0, math.nan, 2.0], 2e6),
        point(shifted(2.0), 2e6, num_targets=5),
        point(shifted(2.0), 2e6, first_seed=7),
        point(shifted(2.0), 2e6, machine={"cpu": "other"}),
        point(shifted(2.0), 2e6, machine={"cpu": "one", "commit": "other"}),
    ]
    result = frontier(write_sweep(tmp_path / "a", {"dense": dense(), "gated": gated}))
    rows = [row["against_dense"] for row in result["points"][2:]]
    text, seed = "not evaluated on the text of the dense models", "no seed in common with the dense models"
    assert [row["flops"]["verdict"] for row in rows] == ["no finite loss (seed 1)", text, seed, "better", "better"]
    assert rows[3]["seconds"]["verdict"] == "timed on another machine, or with other versions, than dense models"
    assert not rows[4]["seconds"]["verdict"].startswith("timed")
    assert "results without a finite loss: 1" in result["notes"]
    json.dumps(result, allow_nan=False)


def test_seconds_of_another_machine_are_not_drawn(tmp_path: Path) -> None:
    marks = []
    for cpu in ("one", "other"):
        gated = [point(shifted(2.7), 2e6, machine={"cpu": cpu})]
        write_frontier(tmp_path / "a.svg", frontier(write_sweep(tmp_path / cpu, {"dense": dense(), "gated": gated})))
        marks.append((tmp_path / "a.svg").read_text(encoding="utf-8").count("<use "))
    assert marks[0] - marks[1] == 1 + 3, "its mean and its seeds"


@pytest.mark.parametrize("seconds", [1.0, None])
def test_seconds_of_dense_models_on_several_machines_are_left_out(tmp_path: Path, seconds: float | None) -> None:
    beside = [
        point(shifted(loss), flops, dense=True, machine={"cpu": str(flops)}, seconds=seconds) for flops, loss in DENSE
    ]
    result = frontier(write_sweep(tmp_path / "a", {"dense": beside, "gated": [point(shifted(2.7), 2e6)]}))
    assert "seconds" not in result["costs"] and "flops" in result["costs"]
    said = "seconds: left out, since the dense models did not run on one machine" in result["notes"]
    assert said == (seconds is not None), "where nothing was timed there is nothing to leave out"


def test_each_cost_has_its_own_envelope(tmp_path: Path) -> None:
    beside = [
        point(shifted(3.0), 1e6, dense=True, seconds=100.0, training_flops=1e15),
        point(shifted(2.6), 4e6, dense=True, seconds=400.0, training_flops=4e15, kv_bytes=64),
    ]
    own = point(shifted(2.7), 2e6, seconds=400.0, training_flops=8e15, kv_bytes=64)
    result = frontier(write_sweep(tmp_path / "a", {"dense": beside, "gated": [own]}))
    assert result["costs"] == ["flops", "training_flops", "seconds", "kv_bytes"]
    against = result["points"][-1]["against_dense"]
    assert {cost: row["verdict"] for cost, row in against.items()} == {
        "flops": "better", "training_flops": "outside the dense range", "seconds": "worse", "kv_bytes": "worse",
    }  # fmt: skip
    assert "KV bytes a token: measured for 1 of 2 dense models" in result["notes"]
    assert [row["on_envelope"]["kv_bytes"] for row in result["points"][:2]] == [None, True]


def test_means_are_over_the_seeds_that_dense_models_have(tmp_path: Path) -> None:
    result = frontier(write_sweep(tmp_path / "a", {"dense": dense(), "gated": [point([*shifted(2.7), 9.0], 2e6)]}))
    results = tmp_path / "a" / "results"
    extra = json.loads((results / "run-1-0-3.json").read_text())
    extra["report"]["validation"]["executed_share"] = 1.0
    (results / "run-1-0-3.json").write_text(json.dumps(extra))
    own, again = result["points"][-1], frontier(tmp_path / "a")["points"][-1]
    assert own["seeds"] == ["0", "1", "2"] and again["measures"]["executed_share"] == 0.5


def test_models_held_to_one_of_them_are_compared_seed_by_seed_whatever_they_cost(tmp_path: Path) -> None:
    gated = [point(shifted(2.7, (0, 0.01, -0.01)), 2e6), point([*shifted(2.9)[:2], None], 1e6)]
    folder = write_sweep(tmp_path, {"dense": dense(), "gated": gated})
    cheap, dear, first, second = (row["against_other"] for row in frontier(folder, "gated")["points"])
    assert first["verdict"] == "itself" and first["distance"] is None, "the name of an arm stands for its first point"
    assert cheap["distances"] == pytest.approx({"0": 0.3, "1": 0.29, "2": 0.31})
    assert cheap["interval"] == pytest.approx(mean_interval([0.3, 0.29, 0.31])) and cheap["verdict"] == "higher loss"
    assert cheap["cost_percents"]["flops"] == pytest.approx(-50) and dear["verdict"] == "lower loss"
    assert list(second["distances"]) == ["0", "1"] and second["verdict"] == "not enough seeds (2 of 3)"
    named = frontier(folder, "dense size=1")
    assert named["points"][1]["against_other"]["verdict"] == "itself"
    assert named["notes"][-1].startswith("3 points compared with dense size=1; 10% of intervals")
    assert [row["loss"] for row in named["points"]] == [row["loss"] for row in frontier(folder)["points"]]
    with pytest.raises(ValueError, match="no arm is called 'gaated'; did you mean 'gated'"):
        frontier(folder, "gaated")


def test_a_model_without_a_result_is_not_replaced_by_another(tmp_path: Path) -> None:
    gated = [point([None] * 3, 2e6), point(shifted(2.7), 1e6)]
    folder = write_sweep(tmp_path, {"dense": dense(), "gated": gated})
    with pytest.raises(ValueError, match="'gated size=0', for which 'gated' stands, has no result: name a point that"):
        frontier(folder, "gated")
    assert frontier(folder, "gated size=1")["points"][-1]["against_other"]["verdict"] == "itself"


def test_losses_that_are_not_finite_are_left_out_of_the_picture(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "a", {"dense": [point([math.nan] * 3, 1e6, dense=True)]})
    write_frontier(tmp_path / "picture.png", frontier(folder))
    assert (tmp_path / "picture.png").stat().st_size > 10_000


# ---- what is said


def test_seconds_of_another_machine_are_not_held_to_one_another(tmp_path: Path) -> None:
    gated = [point(shifted(2.7), 2e6), point(shifted(2.8), 2e6, machine={"cpu": "other"})]
    folder = write_sweep(tmp_path, {"dense": dense(), "gated": gated})
    near, _, far = (row["against_other"]["cost_percents"] for row in frontier(folder, "dense size=0")["points"][1:4])
    assert list(near) == ["flops", "training_flops", "seconds"] and list(far) == ["flops", "training_flops"]


def test_unequal_tuning_and_unequal_training_are_said(tmp_path: Path) -> None:
    gated = [
        point(shifted(2.8), 2e6, trials=3),
        point(shifted(2.8), 2e6, trials=1, num_tokens=2_000_000),
        point(shifted(2.8), 2e6),
        point(shifted(2.8), 2e6, trials=1, tuned_at="wide a=0.5"),
    ]
    result = frontier(write_sweep(tmp_path / "a", {"dense": dense(trials=1), "gated": gated}))
    assert [row["remarks"] for row in result["points"]] == [
        [],
        [],
        ["tuned with 3 trials, dense with 1"],
        ["trained on 2,000,000 tokens, dense on 1,000,000"],
        ["tuned with an unknown number of trials, dense with 1"],
        ["learning rate of wide a=0.5"],
    ]
    result = frontier(write_sweep(tmp_path / "b", {"dense": dense(tuned_at="dense size=2"), "gated": gated[2:3]}))
    assert result["points"][2]["remarks"] == ["learning rate tried at another for 2 of 2 dense models"]


def test_missing_results_are_said(tmp_path: Path) -> None:
    beside = [*dense(), point([2.0, None, 2.0], 9e6, dense=True), point([None] * 3, 3e6, dense=True)]
    gated = [point(shifted(2.0), 2e6), point([*shifted(2.0), None], 2e6), point([], 2e6)]
    folder = write_sweep(tmp_path / "a", {"dense": beside, "gated": gated})
    (folder / "failed").mkdir()
    (folder / "failed" / "run-1-1-3.txt").write_text("FloatingPointError: the loss is nan\n", encoding="utf-8")
    result = frontier(folder)
    failed = result["missing"].pop()
    assert (failed["key"], failed["failed"]) == ("run-1-1-3", "FloatingPointError: the loss is nan")
    assert all(row["failed"] is None for row in result["missing"])
    assert [(row["seed"], row["key"]) for row in result["missing"]] == [
        ("1", "run-0-2-1"), *((str(seed), f"run-0-3-{seed}") for seed in range(3))
    ]  # fmt: skip
    assert result["notes"][0].startswith("5 of 19 results are missing: dense (model.size=2), seed 1; dense (")
    assert result["notes"][0].endswith("gated (model.size=1), seed 3 (failed)")
    assert result["notes"][1] == "learning rate not chosen yet: gated (model.size=2)"
    assert result["notes"][2] == "seed 1 not used: not every dense model has it"
    row, with_failure = result["points"][-2:]
    assert with_failure["remarks"] == ["seed 3 failed"]
    assert (row["seeds"], row["against_dense"]["flops"]["verdict"]) == (["0", "2"], "not enough seeds (2 of 3)")
    assert len(result["points"]) == 5 and row["loss"] == pytest.approx(2.0 + (SEEDS[0] + SEEDS[2]) / 2)


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    gated, half = [point(shifted(2.8), 2e6)], [point([3.0], 1e6, True), point([2.6], 4e6, True, first_seed=1)]
    (tmp_path / "bare").mkdir()
    cases = {
        "none": "there is nothing at",
        "bare": "has no sweep.json",
        write_sweep(tmp_path / "empty", {"dense": [point([None], 1e6, True)]}).name: "none of the results",
        write_sweep(tmp_path / "gated", {"gated": gated}).name: "no result of a dense model",
        write_sweep(tmp_path / "apart", {"dense": half, "gated": gated}).name: "no seed in common.*: 0; .*: 1",
        write_sweep(tmp_path / "broken", {"dense": dense()}).name: "cannot be read",
        write_sweep(tmp_path / "lacking", {"dense": dense()}).name: "is no result of a run: KeyError",
    }
    Path(tmp_path, "broken", "results", "run-0-0-0.json").write_text("{", encoding="utf-8")
    Path(tmp_path, "lacking", "results", "run-0-0-0.json").write_text('{"report": {}}', encoding="utf-8")
    for name, seeds in (("away", {"0": "../sweep"}), ("seed", {"\x1b": "run"})):
        Path(tmp_path, name).mkdir()
        sweep = {"arms": [{"name": "a", "points": [{"settings": {}, "seeds": seeds}]}]}
        Path(tmp_path, name, "sweep.json").write_text(json.dumps(sweep), encoding="utf-8")
    cases |= {"away": "is no name of a file", "seed": "expected a whole number"}
    for folder, words in cases.items():
        with pytest.raises(ValueError, match=words):
            frontier(tmp_path / folder)
