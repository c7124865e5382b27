"""A sweep: which runs it has, and that each is done once. Nothing is trained here."""

import datetime
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from tiny_runs import QUIET
from tiny_sweep import DENSE, RECIPE, TUNED, stand_in, write_sweep

from midskip import cli
from midskip.sweep import FailedRunsError, listed, plan, read_sweep, run_sweep, work
from midskip.sweep.plan import Run, Sweep
from midskip.sweep.store import Store


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs that were done, in order, by a stand-in for training."""
    done: list[Run] = []

    def train_run(sweep: Sweep, run: Run) -> dict[str, Any]:
        done.append(run)
        return stand_in(sweep, run)

    monkeypatch.setattr(work, "train_run", train_run)
    monkeypatch.setattr(work, "PAUSE_S", 0.01)
    return done


@pytest.fixture
def sweep_of(tmp_path: Path) -> Callable[..., Sweep]:
    """sweep_of(arm, ..., seeds=[0]): the sweep of such a file."""
    return lambda *arms, **more: read_sweep(write_sweep(tmp_path, *arms, **more))


SweepOf = Callable[..., Sweep]


def keys_of(sweep: Sweep) -> list[str]:
    return [run.key for run in sweep.runs({})]


def result_of(sweep: Sweep, key: str) -> dict[str, Any]:
    return json.loads((sweep.output / "results" / f"{key}.json").read_text())


def index_of(sweep: Sweep) -> dict[str, list[dict[str, Any]]]:
    return {arm["name"]: arm["points"] for arm in json.loads((sweep.output / "sweep.json").read_text())["arms"]}


def test_a_key_is_of_what_decides_the_run(sweep_of: SweepOf, monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys_of(sweep_of())
    assert len(set(before)) == 4 and all(re.fullmatch("[0-9a-f]{16}", key) for key in before)
    assert keys_of(sweep_of()) == before
    assert keys_of(sweep_of(DENSE | {"name": "other"}, output="elsewhere")) == before, "names and folders do not count"
    again = {"name": "again", "recipe": "recipe.yaml", "settings": {"model.num_hidden_layers": 2}}
    assert keys_of(sweep_of(DENSE, again)) == before, "the same run in two arms is one run"
    assert not set(keys_of(sweep_of(settings={"training.weight_decay": 0.1}))) & set(before)
    assert keys_of(sweep_of(settings={"model.skip_unit": "block"})) == before, "a default that is written out"
    assert not set(keys_of(sweep_of(settings={"model.skip_unit": "sublayer"}))) & set(before)
    assert not set(keys_of(sweep_of(seeds=[2, 3]))) & set(before)
    recipe = sweep_of().points[0].recipe
    assert Run.of(replace(recipe, dense_layers=[3]), "").key == Run.of(replace(recipe, output="x"), "").key
    monkeypatch.setattr(plan, "CODE", plan.CODE + 1)
    assert not set(keys_of(sweep_of())) & set(before)


def test_other_code_of_ones_own_is_told(
    sweep_of: SweepOf, ran: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results of a class whose file has changed count as done, and both commands say so."""
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "policy_of_a_sweep.py"
    file.write_text("from midskip.policies.dense import Dense\n\nclass Mine(Dense): ...\n")
    sweep = sweep_of(DENSE | {"settings": {"model.policy": "policy_of_a_sweep:Mine"}}, seeds=[0])
    run_sweep(sweep, console=QUIET)
    assert not any("has changed" in line for line in listed(sweep))
    file.write_text(file.read_text() + "# another\n")
    plan._hash_of.cache_clear()  # as in another process
    with pytest.warns(UserWarning, match=f"has changed since 2 runs ended.* {ran[0].key}.json, {ran[1].key}.json"):
        run_sweep(sweep, console=QUIET)
    assert len(ran) == 2 and all(line.endswith(", and your own code has changed since") for line in listed(sweep))


def test_an_arms_settings_win(sweep_of: SweepOf) -> None:
    more = {"settings": {"training.max_steps": 5, "model.norms": "pre"}}
    first, second = sweep_of(DENSE | {"settings": {"training.max_steps": 6}}, **more).points
    assert first.recipe.training.max_steps == 6 and first.recipe.model.norms == "pre"
    assert (first.recipe.model.num_hidden_layers, second.recipe.model.num_hidden_layers) == (1, 2)


def test_what_is_given_last_wins_whole_or_in_part(sweep_of: SweepOf) -> None:
    arm = {"name": "gated", "recipe": "recipe.yaml", "settings": {"regularizer.settings.target_share": 0.6}}
    gate = {"model.policy": "middle_out", "model.policy_settings": {"gates": "hard"}}
    of_all = gate | {"regularizer.name": "target_share", "regularizer.settings": {"target_share": 0.9, "outer": 1}}
    (point,) = sweep_of(arm, settings=of_all).points
    assert point.recipe.regularizer.settings == {"target_share": 0.6, "outer": 1}
    whole = arm | {"settings": {"regularizer.settings": {"target_share": 0.8}}}
    (point,) = sweep_of(whole, settings=of_all | {"regularizer.settings.outer": 1}).points
    assert point.recipe.regularizer.settings == {"target_share": 0.8}
    grid = {"regularizer.settings": [{"target_share": 0.5}, {"target_share": 0.7}]}
    points = sweep_of(arm | {"settings": {}, "grid": grid}, settings=of_all | {"regularizer.settings.gain": 1.0}).points
    assert [point.recipe.regularizer.settings for point in points] == grid["regularizer.settings"]


def test_inner_settings_can_be_a_grid(sweep_of: SweepOf) -> None:
    settings = {"model.policy": "middle_out", "model.policy_settings": {"gates": "hard"}}
    settings |= {"regularizer.name": "target_share", "regularizer.settings": {"outer": 1}}
    grid = {"regularizer.settings.target_share": [0.6, 0.7], "training.max_steps": [2, 3]}
    points = sweep_of({"name": "gated", "recipe": "recipe.yaml", "settings": settings, "grid": grid}).points
    assert [point.recipe.regularizer.settings for point in points] == [
        {"outer": 1, "target_share": share} for share in (0.6, 0.6, 0.7, 0.7)
    ]
    assert [point.recipe.training.max_steps for point in points] == [2, 3, 2, 3]


def test_settings_of_data_can_be_a_grid_and_a_date_is_a_name(sweep_of: SweepOf) -> None:
    settings = {"data.source": "pointers", "data.length": 65}
    arm = {"name": "hops", "recipe": "recipe.yaml", "settings": settings, "grid": {"data.settings.num_hops": [2, 4]}}
    assert [point.recipe.data.settings["num_hops"] for point in sweep_of(arm).points] == [2, 4]
    days = [datetime.date(2024, 5, 1), datetime.date(2024, 6, 1)]
    sweep = sweep_of({"name": "days", "recipe": "recipe.yaml", "grid": {"data.source": days}})
    assert [run.recipe.data.source for run in sweep.runs({})][:2] == ["2024-05-01", "2024-06-01"]


def test_every_run_is_done_once_and_leaves_a_result(sweep_of: SweepOf, ran: list[Run]) -> None:
    sweep = sweep_of()
    run_sweep(sweep, console=QUIET)
    assert [run.key for run in ran] == keys_of(sweep)
    for run in ran:
        result = result_of(sweep, run.key)
        assert result["recipe"] == plan.decides(run.recipe) and (result["key"], result["seed"]) == (run.key, run.seed)
        assert result["report"] == stand_in(sweep, run) and (result["training_flops"], result["seconds"]) == (7, 2)
        assert result["machine"]["torch"] and re.match(r"\d{4}-\d\d-\d\dT", result["finished"])
    points = index_of(sweep)["dense"]
    assert [point["settings"] for point in points] == [{"model.num_hidden_layers": layers} for layers in (1, 2)]
    assert [key for seed in "01" for key in (point["seeds"][seed] for point in points)] == keys_of(sweep)
    assert [point["trials"] for point in points] == [1, 1]
    assert not any((sweep.output / "running").iterdir())
    run_sweep(sweep, console=QUIET)
    assert len(ran) == 4, "what is done is not done again"


def test_a_value_more_in_the_grid_does_what_is_new(sweep_of: SweepOf, ran: list[Run]) -> None:
    run_sweep(sweep_of(), console=QUIET)
    sweep = sweep_of(DENSE | {"grid": {"model.num_hidden_layers": [2, 3]}})
    run_sweep(sweep, console=QUIET)
    assert [run.recipe.model.num_hidden_layers for run in ran[4:]] == [3, 3]
    assert len(list((sweep.output / "results").iterdir())) == 6, "the result of a value that is gone stays"
    assert [point["settings"]["model.num_hidden_layers"] for point in index_of(sweep)["dense"]] == [2, 3]


def test_the_learning_rate_is_chosen_at_one_seed(sweep_of: SweepOf, ran: list[Run]) -> None:
    sweep = sweep_of(TUNED, seeds=[0, 1, 2])
    run_sweep(sweep, console=QUIET)
    at = [(run.recipe.model.num_hidden_layers, run.seed, run.recipe.training.learning_rate) for run in ran]
    trials = [(layers, 0, rate) for layers in (1, 2) for rate in (0.001, 0.002, 0.004)]
    assert at == [*trials, (1, 1, 0.002), (2, 1, 0.002), (1, 2, 0.002), (2, 2, 0.002)]
    for point in index_of(sweep)["dense"]:
        assert point["trials"] == 3 and point["learning_rate"] == 0.002
        assert point["seeds"]["0"] == point["tuning"][1]["key"], "the best trial is the run of its seed"
        assert {
            key: result_of(sweep, key)["recipe"]["training"]["learning_rate"] for key in point["seeds"].values()
        } == dict.fromkeys(point["seeds"].values(), 0.002)
    assert sweep.points[0].num_runs() == 5 and len(at) == 10


def test_the_rate_of_an_arm_is_chosen_at_its_first_point(sweep_of: SweepOf, ran: list[Run]) -> None:
    sweep = sweep_of(TUNED | {"tune_at": "first_point"})
    run_sweep(sweep, console=QUIET)
    at = [(run.recipe.model.num_hidden_layers, run.seed, run.recipe.training.learning_rate) for run in ran]
    trials = [(1, 0, rate) for rate in (0.001, 0.002, 0.004)]
    assert at == [*trials, (2, 0, 0.002), (1, 1, 0.002), (2, 1, 0.002)]
    first, second = index_of(sweep)["dense"]
    assert first["tuning"] == second["tuning"] and second["trials"] == 3 and second["learning_rate"] == 0.002
    assert [point.num_runs() for point in sweep.points] == [4, 2]


def test_what_waits_for_a_learning_rate_is_counted(sweep_of: SweepOf) -> None:
    sweep = sweep_of(TUNED | {"tune_at": "first_point"}, seeds=[0, 1, 2])
    assert list(listed(sweep))[3:] == ["and 5 runs more, once the learning rates of their points are chosen"]


def test_an_arm_with_one_rate_is_not_tuned(sweep_of: SweepOf) -> None:
    sweep = sweep_of(TUNED, DENSE | {"name": "once", "learning_rates": [0.01]}, tune_seed=5)
    once = {arm["name"]: arm["points"] for arm in sweep.index({})["arms"]}["once"]
    assert [(row["trials"], row["learning_rate"], sorted(row["seeds"])) for row in once] == [(1, 0.01, ["0", "1"])] * 2
    assert not any("tuning" in row for row in once) and [point.num_runs() for point in sweep.points] == [5, 5, 2, 2]
    assert [run.recipe.training.learning_rate for run in sweep.runs({})].count(0.01) == 4, "no run that chooses"


def test_an_arm_may_take_the_rate_of_an_arm_above(sweep_of: SweepOf) -> None:
    wide = TUNED | {"name": "wide", "settings": {"model.hidden_size": 32}}
    first, _, *others = sweep_of(TUNED, wide | {"tune_at": "dense"}).points
    assert [point.tuned_at for point in others] == [first, first] and len(others) == 2
    losses = {trial.key: loss for trial, loss in zip(first.trials(), (3.0, 1.0, 2.0), strict=True)}
    assert [point.learning_rate(losses) for point in others] == [0.002, 0.002]
    assert all(run.recipe.model.hidden_size == 32 for point in others for run in point.own_runs(losses).values())
    with pytest.raises(ValueError, match="tune_at is 'sparse'; expected each_point, first_point or the name of an arm"):
        sweep_of(TUNED, wide | {"tune_at": "sparse"})
    with pytest.raises(ValueError, match="tune_at is 'first_point' without learning_rates to try; give them, or leave"):
        sweep_of(DENSE | {"tune_at": "first_point"})
    with pytest.raises(ValueError, match="tune_seed is 7 without learning_rates to try; give them, or leave"):
        sweep_of(DENSE, tune_seed=7)
    with pytest.raises(
        ValueError, match=r"training\.learning_rate is set, and learning_rates are to be tried; expected"
    ):
        sweep_of(DENSE, settings={"training.learning_rate": 0.5}, learning_rates=[0.1, 0.2])
    of_a_name = sweep_of(TUNED | {"name": "first_point"}, wide).points
    assert [point.tuned_at for point in of_a_name] == [None] * 4, "a name says nothing to arms that do not give it"
    with pytest.raises(ValueError, match="arm 'wide': tune_at is 'dense', which tries other learning_rates"):
        sweep_of(TUNED, wide | {"tune_at": "dense", "learning_rates": [0.1, 0.2, 0.3]})


def test_before_the_learning_rate_is_chosen_seeds_have_no_key(sweep_of: SweepOf) -> None:
    index = sweep_of(TUNED, tune_seed=5).index({})
    assert [point["seeds"] for point in index["arms"][0]["points"]] == [{}, {}]
    assert [trial["seed"] for trial in index["arms"][0]["points"][0]["tuning"]] == [5, 5, 5]


def test_a_rate_that_diverges_loses(sweep_of: SweepOf, ran: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    def diverges(sweep: Sweep, run: Run) -> dict[str, Any]:
        if run.recipe.training.learning_rate > 0.003:
            raise FloatingPointError("step 3 is not finite")
        return stand_in(sweep, run) | {"validation": {"loss": -run.recipe.training.learning_rate}}

    monkeypatch.setattr(work, "train_run", diverges)
    sweep = sweep_of(TUNED)
    with pytest.raises(FailedRunsError, match=r"2 of 8 runs failed: dense .*learning_rate=0\.004.*not finite"):
        run_sweep(sweep, console=QUIET)
    assert [point["learning_rate"] for point in index_of(sweep)["dense"]] == [0.002, 0.002]
    monkeypatch.setattr(work, "train_run", lambda sweep, run: pytest.fail("it is known that this diverges"))
    with pytest.raises(FailedRunsError, match="2 of 8 runs failed"):
        run_sweep(sweep, console=QUIET)


def test_a_run_that_fails_is_told_and_tried_again(
    sweep_of: SweepOf,
    ran: list[Run],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(sweep: Sweep, run: Run) -> dict[str, Any]:
        if run.seed:
            raise RuntimeError("no text")  # as torch says of memory, drivers of themselves, and plugins of anything
        return stand_in(sweep, run)

    sweep, works = sweep_of(), work.train_run
    monkeypatch.setattr(work, "train_run", fails)
    assert cli.main(["sweep", str(tmp_path / "sweep.yaml")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "2 of 4 runs failed: dense num_hidden_layers=1 seed=1, dense num_hidden_layers=2 seed=1." in error
    failed = sorted(path.name for path in (sweep.output / "failed").iterdir())
    assert failed == sorted(f"{run.key}.{of}" for run in sweep.runs({}) if run.seed for of in ("txt", "log"))
    log, why = ((sweep.output / "failed" / name).read_text() for name in failed[:2])
    assert why == "RuntimeError: no text\n" and log.endswith(why) and "in fails" in log
    assert len(list((sweep.output / "results").iterdir())) == 2
    monkeypatch.setattr(work, "train_run", works)
    assert cli.main(["sweep", str(tmp_path / "sweep.yaml")]) == 0
    assert [run.seed for run in ran] == [1, 1] and not any((sweep.output / "failed").iterdir())


def test_a_run_that_another_process_has_is_left_to_it(
    sweep_of: SweepOf, ran: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = sweep_of()
    first, *others = sweep.runs({})
    store = Store(sweep.output)
    store.make()
    pauses = []

    def pause(seconds: float) -> None:
        pauses.append([run.key for run in ran])
        store.write_result(first.key, work.result_of(first, stand_in(sweep, first)))

    monkeypatch.setattr("midskip.sweep.work.time.sleep", pause)
    with store.claimed(first.key) as is_ours:
        assert is_ours
        run_sweep(sweep, console=QUIET)
    assert pauses == [[run.key for run in others]], "the others first, and then it was looked at again"
    assert [run.key for run in ran] == [run.key for run in others]


def test_a_run_that_ended_in_between_is_not_done_again(sweep_of: SweepOf, ran: list[Run]) -> None:
    sweep = sweep_of()
    first, second, *_ = sweep.runs({})
    store = Store(sweep.output)
    store.make()
    store.write_result(first.key, work.result_of(first, stand_in(sweep, first)))
    store.write_failure(second.key, ValueError("no text"))
    assert work.attempt(sweep, store, first) and work.attempt(sweep, store, second) and not ran


def test_what_a_killed_process_left_is_tidied(sweep_of: SweepOf, ran: list[Run]) -> None:
    sweep = sweep_of()
    run_sweep(sweep, console=QUIET)
    done = ran[0].key
    folder = sweep.output / "runs" / done
    (folder / "checkpoint-2").mkdir(parents=True)
    for name in ("report.json", "recipe.yaml", "history.jsonl", "model.safetensors", "checkpoint-2/optimizer.pt"):
        (folder / name).write_text("x")
    (sweep.output / "running" / done).touch()
    keeps = replace(sweep, keep_runs=True)
    run_sweep(keeps, console=QUIET)
    assert (folder / "model.safetensors").is_file()
    run_sweep(sweep, console=QUIET)
    assert {path.name for path in folder.iterdir()} == {"report.json", "recipe.yaml", "history.jsonl"}
    assert not any((sweep.output / "running").iterdir()) and len(ran) == 4


def test_lines_and_the_table_tell_how_far_it_is(sweep_of: SweepOf, ran: list[Run]) -> None:
    told = StringIO()
    run_sweep(sweep_of(TUNED), console=Console(file=told, width=120))
    text = told.getvalue()
    assert (
        "0 of 8 runs done" in text and "dense num_hidden_layers=2 seed=1 learning_rate=0.002: loss 1.0100, 2 s" in text
    )
    assert re.search(r"dense +│ num_hidden_layers=1 +│ +4/4 │ +│ +│ +0\.002 │ 2\.0050", text)
    terminal = StringIO()
    run_sweep(sweep_of(TUNED), console=Console(file=terminal, width=120, force_terminal=True))
    assert "4/4" in terminal.getvalue()


def test_the_list_runs_nothing(
    sweep_of: SweepOf, ran: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = sweep_of(TUNED)
    assert cli.main(["sweep", str(tmp_path / "sweep.yaml"), "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and all(line.endswith(": to do") for line in lines[:6])
    assert lines[6] == "and 2 runs more, once the learning rates of their points are chosen"
    assert not ran and not sweep.output.exists()
    run_sweep(sweep, console=QUIET)
    lines = list(listed(sweep))
    assert len(lines) == 8 and all(": done, loss " in line for line in lines)


def test_a_result_that_is_broken_is_named(sweep_of: SweepOf, ran: list[Run]) -> None:
    sweep = sweep_of()
    run_sweep(sweep, console=QUIET)
    (sweep.output / "results" / f"{ran[0].key}.json").write_text("{")
    with pytest.raises(ValueError, match=rf"{ran[0].key}.json' is no result of a run .*: remove it"):
        run_sweep(sweep, console=QUIET)


def test_ray_is_asked_for_where_it_lacks(
    sweep_of: SweepOf, ran: list[Run], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = sweep_of()
    monkeypatch.setitem(sys.modules, "ray", None)
    assert cli.main(["sweep", str(sweep.path), "--ray"]) == 2
    assert "pip install 'midskip[sweep]'" in capsys.readouterr().err and not ran


def test_recipes_are_found_beside_the_file_or_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sweeps").mkdir()
    path = write_sweep(tmp_path / "sweeps")
    beside = read_sweep(path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"training": {"max_steps": 9}}))
    monkeypatch.chdir(tmp_path)
    assert keys_of(read_sweep(path)) == keys_of(beside)
    (tmp_path / "sweeps" / "recipe.yaml").unlink()
    assert read_sweep(path).points[0].recipe.training.max_steps == 9
