"""What is told of a run while it goes on: TensorBoard's curves, norms around blocks, throughput, utilisation."""

import math
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import QUIET, batch_of, first_windows, history, starting_model, weights, windows_of
from transformers import TrainingArguments

from midskip.cost import LayerWork, Meter, block_flops, dense_flops, head_flops
from midskip.data import WindowOrder, token_bytes
from midskip.evaluate import evaluate
from midskip.regularizers import build_regularizer
from midskip.runs import load_run
from midskip.train import Recipe, train
from midskip.train.optimizer import build_optimizer, build_scheduler
from midskip.train.peak import known_name, measured_flops, peak_flops

MakeRecipe = Callable[..., Recipe]
pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("on_the_cpu", "no_pictures")]
RELEASED = {"policy_settings": {"start": "released"}, "initializer_range": 0.3}
TARGETS = {"mean_targets": [0.9, 0.2], "coef_update_multiplier": 1.0}


def curves(recipe: Recipe) -> dict[str, dict[int, float]]:
    """What TensorBoard would draw: by name, a value by step."""
    found: dict[str, dict[int, float]] = {}
    for file in sorted(Path(recipe.output, "runs").glob("*/events*")):
        events = EventAccumulator(str(file)).Reload()
        for name in events.Tags()["scalars"]:
            found.setdefault(name, {}).update({event.step: event.value for event in events.Scalars(name)})
    return found


def first_batch(recipe: Recipe) -> dict[str, torch.Tensor]:
    """What the first step of a run reads, in one pass."""
    windows, _ = windows_of(recipe)
    per_step = recipe.training.per_device_train_batch_size * recipe.training.gradient_accumulation_steps
    return batch_of(windows, *WindowOrder(len(windows), per_step, recipe.training.seed))


# ---- TensorBoard


def test_curves_by_layer_and_their_targets_are_in_tensorboard(make_recipe: MakeRecipe) -> None:
    more = {"max_steps": 6, "logging_steps": 2, "eval_steps": 3, "report_to": ["tensorboard"]}
    recipe = make_recipe("proportional", TARGETS, model=RELEASED, **more)
    train(recipe, console=QUIET)
    rows, drawn = history(recipe), curves(recipe)
    regularizer = build_regularizer("proportional", 4, **TARGETS)
    for row in rows:
        regularizer.update(*(torch.tensor(row[f"gate_{name}_by_layer"]) for name in ("mean", "variance")))
        if row["step"] % 2:
            continue
        expected = {
            "share": row["share_by_layer"],
            "gate_mean": row["gate_mean_by_layer"],
            "gate_variance": row["gate_variance_by_layer"],
            "norm_in": row["norm_in_by_layer"],
            "norm_out": row["norm_out_by_layer"],
            "mean_target": [0.9, 0.2, 0.2, 0.9],
            "variance_target": [0.09, 0.16, 0.16, 0.09],
            "mean_coefficient": regularizer.mean_coefficients.tolist(),
            "variance_coefficient": regularizer.variance_coefficients.tolist(),
        }
        for name, values in expected.items():
            got = [drawn[f"train/{name}/layer_{layer:02}"][row["step"]] for layer in range(4)]
            assert got == pytest.approx(values, rel=1e-5, abs=1e-7), name
        for name in ("tokens_per_s", "flops_per_token", "utilisation"):
            assert drawn[f"train/{name}"][row["step"]] == pytest.approx(row[name], rel=1e-5)
        both = rows[row["step"] - 2 : row["step"]]
        for name in ("cross_entropy", "regularizer", "total", "executed_share", "gradient_norm", "step_seconds"):
            mean = sum(recent[name] for recent in both) / 2
            assert drawn[f"train/{name}"][row["step"]] == pytest.approx(mean, rel=1e-5), name
    assert regularizer.mean_coefficients.abs().min() > 0 and rows[0]["share_by_layer"] != rows[5]["share_by_layer"]
    assert all(set(values) == {2, 4, 6} for name, values in drawn.items() if "layer_" in name)
    assert len([name for name in drawn if "layer_" in name]) == 9 * 4


def test_the_learning_rate_of_each_group_is_drawn(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(max_steps=5, logging_steps=1, report_to=["tensorboard"], warmup_ratio=0.4)
    train(recipe, console=QUIET)
    drawn = curves(recipe)
    optimizer = build_optimizer(starting_model(recipe), recipe.training)
    scheduler = build_scheduler(optimizer, recipe.training)
    for step in range(1, 6):
        optimizer.step()
        scheduler.step()
        for group in optimizer.param_groups:
            assert drawn[f"train/learning_rate/{group['name']}"][step] == pytest.approx(group["lr"], rel=1e-5)


def test_what_the_budget_regularizer_moves_is_drawn(make_recipe: MakeRecipe) -> None:
    settings = {"target_share": 0.4, "ramp_steps": 2}
    recipe = make_recipe(
        "target_share", settings, max_steps=3, logging_steps=3, save_steps=3, report_to=["tensorboard"]
    )
    train(recipe, console=QUIET)
    drawn = curves(recipe)
    model, _ = load_run(recipe.output)
    policy = model.model.policy
    bias = (policy.bias - policy.open_bias).tolist()
    targets = build_regularizer("target_share", 4, **settings).targets.tolist()
    for name, half in (("bias", bias), ("share_target", targets)):
        got = [drawn[f"train/{name}/layer_{layer:02}"][3] for layer in range(4)]
        assert got == pytest.approx([*half, *half[::-1]], rel=1e-5, abs=1e-6)


def test_evaluation_during_training_is_on_all_held_out_text(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("sparsity", max_steps=4, eval_steps=2, save_steps=2, report_to=["tensorboard"])
    report = train(recipe, console=QUIET)
    drawn = curves(recipe)
    _, tokenizer = load_run(recipe.output)
    _, validation = windows_of(recipe)
    num_tokens = sum(map(len, validation.shards))
    for step in (2, 4):
        model, _ = load_run(Path(recipe.output, "best"))
        model.load_state_dict(weights(recipe, f"checkpoint-{step}"))
        expected = evaluate(model, validation, token_bytes(tokenizer), 2)
        assert drawn["eval/loss"][step] == pytest.approx(expected["loss"], rel=1e-6)
        assert drawn["eval/bits_per_byte"][step] == pytest.approx(expected["bits_per_byte"], rel=1e-6)
        assert drawn["eval/num_targets"][step] == expected["num_targets"] == num_tokens - 1
    assert drawn["eval/loss"][4] == pytest.approx(report["validation"]["loss"], rel=1e-6)


# ---- what ran


@pytest.mark.parametrize(("passes", "skip_unit"), [(1, "block"), (3, "block"), (1, "sublayer")])
def test_norms_are_those_of_the_tokens_that_go_in_and_come_out(
    make_recipe: MakeRecipe, passes: int, skip_unit: str
) -> None:
    recipe = make_recipe(
        model=RELEASED | {"skip_unit": skip_unit},
        max_steps=1,
        logging_steps=1,
        per_device_train_batch_size=6 // passes,
        gradient_accumulation_steps=passes,
    )
    train(recipe, console=QUIET)
    (row,) = history(recipe)
    model, before_norm = starting_model(recipe), []
    model.model.norm.register_forward_pre_hook(lambda _, arguments: before_norm.append(arguments[0]))
    output = model(**first_batch(recipe), output_hidden_states=True)
    states = [h_BTD.norm(dim=-1) for h_BTD in (*output.hidden_states[:-1], before_norm[0].view(6, -1, 16))]
    present_LBT = output.gates > 0
    assert len(states) == 5 and 0 < present_LBT.float().mean() < 1
    for layer, units in enumerate(present_LBT.unflatten(0, (4, -1))):
        for name, norms_BT, present_BT in (
            ("norm_in", states[layer], units[0]),
            ("norm_out", states[layer + 1], units[-1]),
        ):
            mean = norms_BT[present_BT].mean().item()
            assert row[f"{name}_by_layer"][layer] == pytest.approx(mean, rel=1e-4), (name, layer)


def test_a_block_that_nobody_reaches_has_no_norm(make_recipe: MakeRecipe) -> None:
    model = {"policy": "midskip.policies.controls:FixedDepths", "policy_settings": {"skip_share": 1.0}}
    recipe = make_recipe(model=model, max_steps=1, logging_steps=1, report_to=["tensorboard"])
    train(recipe, console=QUIET)
    (row,) = history(recipe)
    nobody = [layer for layer, share in enumerate(row["share_by_layer"]) if share == 0]
    assert nobody
    for layer in range(4):
        for name in ("norm_in", "norm_out"):
            assert (row[f"{name}_by_layer"][layer] is None) == (layer in nobody)
            assert (f"train/{name}/layer_{layer:02}" in curves(recipe)) == (layer not in nobody)


def document_lengths(position_BT: torch.Tensor) -> list[int]:
    starts = [*(position_BT.flatten() == 0).nonzero().flatten().tolist(), position_BT.numel()]
    return [end - start for start, end in pairwise(starts)]


@pytest.mark.parametrize("passes", [1, 3])
def test_flops_are_those_of_what_ran_forward_and_backward(make_recipe: MakeRecipe, passes: int) -> None:
    more = {
        "max_steps": 1,
        "logging_steps": 1,
        "per_device_train_batch_size": 6 // passes,
        "gradient_accumulation_steps": passes,
    }
    dense, gated = make_recipe(model={"policy": "dense"}, output="dense", **more), make_recipe(model=RELEASED, **more)
    for recipe in (dense, gated):
        train(recipe, console=QUIET)
    batch = first_batch(dense)
    lengths, config = document_lengths(batch["position_ids"]), starting_model(dense).config
    assert sum(lengths) == 96 and len(lengths) > 6
    assert history(dense)[0]["flops_per_token"] == pytest.approx(3 * dense_flops(config, lengths).total / 96, rel=1e-12)

    model = starting_model(gated)
    with Meter(model) as meter:
        gates_LBT = model(**batch).gates
    found = history(gated)[0]["flops_per_token"]
    assert found == pytest.approx(meter.flops(backward=True).total / 96, rel=1e-12)
    ends = list(accumulate(lengths))
    total = 0
    for present_N in gates_LBT.flatten(1) > 0:
        counts = [int(present_N[end - length : end].sum()) for length, end in zip(lengths, ends, strict=True)]
        work = LayerWork(sum(counts), sum(counts), sum(n * (n + 1) // 2 for n in counts), 0, gated=True)
        total += block_flops(model.config, work).total
    total += head_flops(model.config, 96).total + meter.policy_flops
    assert found == pytest.approx(3 * total / 96, rel=1e-12)


def test_flops_of_training_are_those_of_every_step(make_recipe: MakeRecipe) -> None:
    dense = make_recipe(model={"policy": "dense"}, output="dense", max_steps=4, logging_steps=3)
    report, config = train(dense, console=QUIET), starting_model(dense).config
    windows, _ = windows_of(dense)
    read = batch_of(windows, *first_windows(dense, 8))
    expected = 3 * sum(dense_flops(config, document_lengths(one)).total for one in read["position_ids"].split(1))
    assert report["training"]["flops"] == expected
    several = ("target_share", {"target_share": 0.5, "lowest_share": 0.3, "ramp_steps": 1})
    found = []
    for logging_steps in (1, 3):
        gated = make_recipe(
            *several, model={"policy_settings": {"gates": "hard"}}, output=f"gated-{logging_steps}", max_steps=4,
            logging_steps=logging_steps,
        )  # fmt: skip
        report = train(gated, console=QUIET)
        found.append([row["flops"] for row in history(gated)])
        assert report["training"]["flops"] == sum(found[-1])
    assert found[0] == found[1], "steps count as much whether they are logged or not"
    assert min(found[0]) > 1.5 * expected / 4, "all three passes of a step count, not one"


def test_throughput_and_utilisation_follow_from_the_rows(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(max_steps=7, logging_steps=3, eval_steps=2, save_steps=1, peak_flops=3e9)
    report = train(recipe, console=QUIET)
    rows = history(recipe)
    logged = {row["step"]: row for row in rows if "tokens_per_s" in row}
    assert set(logged) == {3, 6}
    for step, row in logged.items():
        recent = rows[step - 3 : step]
        rate = 3 * 32 / sum(earlier["step_seconds"] for earlier in recent)
        assert row["tokens_per_s"] == pytest.approx(rate, rel=1e-9)
        assert row["utilisation"] == pytest.approx(rate * row["flops_per_token"] / 3e9, rel=1e-9)
    assert report["training"]["tokens_per_s"] == pytest.approx(sum(row["tokens_per_s"] for row in logged.values()) / 2)
    assert report["training"]["utilisation"] == pytest.approx(sum(row["utilisation"] for row in logged.values()) / 2)
    elapsed = [rows[0]["seconds"], *(late["seconds"] - row["seconds"] for row, late in pairwise(rows))]
    between = [whole - row["step_seconds"] for whole, row in zip(elapsed, rows, strict=True)]
    assert min(between) > -1e-3 and max(between[1:]) > 1e-3, "steps are timed without evaluations and checkpoints"


# ---- what a device could do


def test_a_known_device_has_the_peak_of_its_data_sheet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), bf16=True, use_cpu=True, report_to=[])
    monkeypatch.setattr(TrainingArguments, "device", torch.device("cuda:0"))
    for name, expected in (
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA H100 NVL", 835e12),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        peak, source = peak_flops(arguments)
        assert peak == expected and "data sheet" in source, name
    assert known_name("NVIDIA L400") is None


def test_another_device_is_measured(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    peak, source = peak_flops(TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    assert source == "a large matrix product here" and 1e8 < peak < 1e14
    assert torch.equal(torch.get_rng_state(), state), "the run's random numbers are its own"
    assert math.isfinite(measured_flops(torch.device("cpu"), torch.bfloat16, size=64, repeats=1))


def test_a_run_on_a_device_that_is_not_known_says_where_its_peak_is_from(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("midskip.train.run.peak_flops", lambda arguments: (5e9, "a large matrix product here"))
    report: dict[str, Any] = train(make_recipe(max_steps=2, logging_steps=1, peak_flops=None), console=QUIET)
    assert report["training"]["peak"] == {"flops_per_s": 5e9, "from": "a large matrix product here"}
    assert report["training"]["utilisation"] > 0
