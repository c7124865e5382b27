"""`midskip train` under accelerate's FSDP2, on two ranks, does what it does on one with twice the batch.

accelerate shards on GPUs alone; here it is made to take that path on CPUs (see test_hf_fsdp.py). One launch runs
everything: this file as a program becomes two ranks.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fsdp_on_cpus import shard_on_cpus
from rank_processes import run_program, start_ranks
from tiny_runs import QUIET, assert_same_weights, distance, history, timeless, tiny_recipe, weights, write_documents

from midskip import MidskipForCausalLM
from midskip.regularizers import Regularizer
from midskip.train import Recipe, run, train
from midskip.train.checkpoints import fault_of
from midskip.train.fsdp import SETTINGS

RUNS: dict[str, dict[str, Any]] = {
    "hard": {"regularizer": "target_share", "settings": {"target_share": 0.4, "ramp_steps": 2, "gain": 2.0},
             "model": {"policy_settings": {"gates": "hard"}}},
    "soft": {"regularizer": "sparsity", "settings": {"mean_coefficient": 1.0},
             "model": {"policy_settings": {"start": "released"}, "initializer_range": 0.3}},
}  # fmt: skip


class Stop(Exception):
    pass


def recipe_of(folder: Path, name: str, batch_size: int) -> Recipe:
    return tiny_recipe(
        folder / "text", folder / f"{name}-{batch_size}" / "run", **RUNS[name.removesuffix("-stopped")],
        data={"vocab_size": 300, "validation_share": 0.2}, per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=2, max_steps=4, adam_epsilon=1e-3, learning_rate=0.02,
        eval_steps=2, save_steps=2, logging_steps=2,
    )  # fmt: skip


def stopped_and_resumed(recipe: Recipe) -> None:
    """The run dies on all ranks in its third step, and goes on."""
    build = Recipe.build_regularizer

    def dying(self: Recipe) -> Regularizer:
        regularizer = build(self)
        update, seen = regularizer.update, []

        def once(*args: Any) -> None:
            seen.append(1)
            if len(seen) == 3:
                raise Stop
            update(*args)

        regularizer.update = once
        return regularizer

    Recipe.build_regularizer = dying
    try:
        train(recipe, console=QUIET)
    except Stop:
        Recipe.build_regularizer = build
        train(recipe, resume=True, console=QUIET)


def run_rank(rank: int, folder: Path, port: int) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update({name: wanted for name, (_, wanted) in SETTINGS.items()} | {"ACCELERATE_USE_FSDP": "true"})
    torch.set_num_threads(1)
    shard_on_cpus()
    run.check_fsdp = lambda on_cpu: None
    run.write_picture = lambda *args: None
    for name in RUNS:
        train(recipe_of(folder, name, 2), console=QUIET)
    stopped_and_resumed(recipe_of(folder, "hard-stopped", 2))
    dist.destroy_process_group()


def main(folder: Path) -> None:
    start_ranks(run_rank, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp")
    write_documents(folder / "text", 60)
    run_program(__file__, folder, timeout_s=240)
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("on_the_cpu", "no_pictures")
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_train_as_one_with_twice_the_batch(folder: Path, name: str) -> None:
    one, two = (recipe_of(folder, name, size) for size in (4, 2))
    train(one, console=QUIET)
    rows = [timeless(history(recipe)) for recipe in (one, two)]
    for on_one, on_two in zip(*rows, strict=True):
        assert on_one.keys() == on_two.keys()
        for key in on_one:
            assert on_two[key] == pytest.approx(on_one[key], rel=1e-4, abs=1e-6), (key, on_one["step"])
    reports = [json.loads(Path(recipe.output, "report.json").read_text()) for recipe in (one, two)]
    assert reports[1]["validation"]["loss"] == pytest.approx(reports[0]["validation"]["loss"], rel=1e-5)
    assert 0.2 < reports[1]["validation"]["executed_share"] < 0.95
    for place in ("", "best", "checkpoint-2", "checkpoint-4"):
        assert distance(weights(one, place), weights(two, place)) < 1e-5, place
    MidskipForCausalLM.from_pretrained(Path(two.output))


@pytest.mark.slow
def test_a_run_goes_on_from_a_checkpoint(folder: Path) -> None:
    whole, stopped = (recipe_of(folder, name, 2) for name in ("hard", "hard-stopped"))
    assert fault_of(Path(stopped.output, "checkpoint-2")) is None
    assert timeless(history(stopped)) == timeless(history(whole))
    assert_same_weights(weights(stopped), weights(whole))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
