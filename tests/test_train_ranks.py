"""`midskip train` on two ranks (DDP over gloo, as torchrun starts them) does what it does on one with twice the batch.

One launch runs everything: this file as a program becomes two ranks, which write what they found. That the model itself
agrees under DDP and FSDP2 is in test_ranks.py.
"""

import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_processes import run_program, start_ranks
from tiny_runs import (
    QUIET,
    assert_same_weights,
    distance,
    everything,
    history,
    timeless,
    tiny_recipe,
    weights,
    windows_of,
    write_documents,
)
from torch import Tensor

from midskip.data import WindowOrder
from midskip.locks import locked
from midskip.policies import Decision, Policy
from midskip.regularizers import FixedRegularizer, TargetShare
from midskip.train import Recipe, read_recipe, report, train
from midskip.train.checkpoints import fault_of
from midskip.train.trainer import MidskipTrainer

pytestmark = pytest.mark.slow  # tests/test_ranks.py has a step on two ranks
RELEASED = {"policy_settings": {"start": "released"}, "initializer_range": 0.3}
EARLY = {"policy": "test_train_ranks:Late"}
LATE_POSITION = 12
# a large epsilon, for AdamW makes steps of full size from gradients that are nothing but rounding
STEPS = {
    "max_steps": 6,
    "adam_epsilon": 1e-3,
    "learning_rate": 0.02,
    "warmup_ratio": 0.2,
    "logging_steps": 2,
    "save_steps": 2,
}
RUNS: dict[str, dict[str, Any]] = {
    "target_share": {
        "regularizer": "target_share",
        "settings": {"target_share": 0.4, "ramp_steps": 4},
        "model": RELEASED,
    },
    "sparsity": {"regularizer": "sparsity", "settings": {"mean_coefficient": 1.0}, "model": RELEASED},
    "late": {"model": EARLY},
}


class Late(Policy):
    """All run the outer blocks; only tokens far into their document run the others."""

    def decide(self, layer: int, h_ND: Tensor, state: dict[str, Any], batch: Any) -> Decision:
        if layer in (0, self.num_layers - 1):
            return Decision()
        return state.setdefault("late", Decision(keep_N=batch.position_N >= LATE_POSITION))


class Ill(FixedRegularizer):
    """On the second rank its term, or the gradient of that, is not finite in the third step."""

    changing = ("num_steps",)

    def __init__(self, num_layers: int, kind: str) -> None:
        super().__init__(num_layers)
        self.kind, self.num_steps = kind, torch.zeros(())

    def update(self, *statistics: Any) -> None:
        self.num_steps = self.num_steps + 1

    def loss(self, gates_LBT: Tensor, valid_BT: Tensor | None = None) -> Tensor:
        term = gates_LBT.mean()
        if self.num_steps < 2 or int(os.environ["RANK"]) == 0:
            return term
        return term * math.nan if self.kind == "loss" else term + (term - term.detach()).sqrt()


def recipe_of(folder: Path, name: str, batch_size: int, **more: Any) -> Recipe:
    """Two passes a step; the text is prepared into the folder."""
    return tiny_recipe(
        folder / "text", folder / f"{name}-{batch_size}" / "run", **(RUNS.get(name, {}) | STEPS | more),
        data={"vocab_size": 300, "validation_share": 0.2}, per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=2, eval_steps=3,
    )  # fmt: skip


# ---- what every rank does


class Stop(Exception):
    pass


def stopped_and_resumed(recipe: Recipe) -> None:
    """The run dies on all ranks in the regularizer's update of its fourth step, and goes on."""
    update, seen = TargetShare.update, []

    def dying(self: TargetShare, *args: Any) -> None:
        seen.append(1)
        if len(seen) == 4:
            raise Stop
        update(self, *args)

    TargetShare.update = dying
    try:
        train(recipe, console=QUIET)
    except Stop:
        train(recipe, resume=True, console=QUIET)
    TargetShare.update = update


def message_of(recipe: Recipe) -> str:
    try:
        train(recipe, console=QUIET)
    except (FloatingPointError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was wrong"


def be_late(rank: int) -> None:
    """The second rank comes late to each evaluation, as a busy machine may have it."""
    keep_best = MidskipTrainer.keep_best

    def late(self: MidskipTrainer, loss: float) -> None:
        time.sleep(0.2 * rank)
        keep_best(self, loss)

    MidskipTrainer.keep_best = late


def run_rank(rank: int, folder: Path, port: int) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    report.write_picture = lambda *args: None
    be_late(rank)
    written: set[str] = set()

    def look(event: str, args: tuple[Any, ...]) -> None:
        writes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
        writes |= event == "open" and bool((args[2] or 0) & (os.O_WRONLY | os.O_RDWR))
        if writes and str(folder) in str(args[0]) and not (event == "os.mkdir" and os.path.isdir(args[0])):
            written.add(os.path.relpath(args[0], folder))

    sys.addaudithook(look)
    found: dict[str, Any] = {"reports": {}}
    for name in RUNS:
        found["reports"][name] = train(recipe_of(folder, name, 2), console=QUIET)
    stopped_and_resumed(recipe_of(folder / "stopped", "target_share", 2))
    found["again"] = train(recipe_of(folder, "target_share", 2), resume=True, console=QUIET)
    found["written"] = sorted(written)
    found["foreign"] = message_of(recipe_of(folder, "foreign", 2))
    found["held"] = message_of(recipe_of(folder, "held", 2))
    for kind in ("loss", "gradient"):
        ill = recipe_of(folder, kind, 2, regularizer="test_train_ranks:Ill", settings={"kind": kind})
        found[kind] = message_of(ill)
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main(folder: Path) -> None:
    with locked(folder / "held-2" / "run"):
        start_ranks(run_rank, folder)


# ---- the tests


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of the runs, and what each rank found. Runs of twice the batch on one rank lie beside those on two."""
    folder = tmp_path_factory.mktemp("ranks")
    for place in (folder, folder / "stopped"):
        place.mkdir(exist_ok=True)
        write_documents(place / "text")
    (folder / "foreign-2" / "run").mkdir(parents=True)
    (folder / "foreign-2" / "run" / "thesis.txt").write_text("mine")
    run_program(__file__, folder, timeout_s=120)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_picture", lambda *args: None)
        for module in (torch.cuda, torch.accelerator):
            patch.setattr(module, "is_available", lambda: False)
        for name in RUNS:
            train(recipe_of(folder, name, 4), console=QUIET)
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


Ranks = tuple[Path, list[dict[str, Any]]]


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_train_as_one_with_twice_the_batch(ranks: Ranks, name: str) -> None:
    folder, _ = ranks
    two, one = (recipe_of(folder, name, size) for size in (2, 4))
    rows = [timeless(history(recipe)) for recipe in (one, two)]
    assert [row["num_tokens"] for row in rows[1]] == [2 * 2 * 2 * 16] * 6
    assert 0 < min(row["executed_share"] for row in rows[0]) < 1 and "norm_in_by_layer" in rows[1][1]
    for on_one, on_two in zip(*rows, strict=True):
        assert on_one.keys() == on_two.keys()
        for key in on_one:
            assert on_two[key] == pytest.approx(on_one[key], rel=1e-4, abs=1e-6), (key, on_one["step"])
    for row in history(two)[1::2]:
        assert row["utilisation"] == pytest.approx(row["tokens_per_s"] * row["flops_per_token"] / (2 * 1e12), rel=1e-9)
    assert distance(weights(one), weights(two)) < 1e-5
    assert distance(weights(one), weights(one, "checkpoint-4")) > 1e-3
    states = [json.loads(Path(recipe.output, "checkpoint-6", "regularizer.json").read_text()) for recipe in (one, two)]
    assert states[0].keys() == states[1].keys() and (name != "target_share" or states[1]["num_updates"] == 6)
    for key in states[0]:
        assert states[1][key] == pytest.approx(states[0][key], rel=1e-4)
    scheduler = [
        torch.load(Path(recipe.output, "checkpoint-6", "scheduler.pt"), weights_only=True) for recipe in (one, two)
    ]
    assert scheduler[0]["_last_lr"] == scheduler[1]["_last_lr"] and scheduler[1]["last_epoch"] == 6


def test_a_block_was_reached_by_no_token_of_one_rank(ranks: Ranks) -> None:
    """Else the run "late" tests little."""
    folder, _ = ranks
    windows, _ = windows_of(recipe_of(folder, "late", 2))
    order = list(WindowOrder(len(windows), 6 * 8, 0))
    reached = [any(int(windows[i]["position_ids"].max()) >= LATE_POSITION for i in order[at : at + 2])
               for at in range(0, len(order), 2)]  # fmt: skip
    steps = list(zip(reached[::2], reached[1::2], strict=True))
    assert (True, False) in steps or (False, True) in steps


def values(found: Any) -> list[Any]:
    return found if isinstance(found, list) else [found]


@pytest.mark.parametrize("name", RUNS)
def test_evaluation_is_of_all_held_out_text(ranks: Ranks, name: str) -> None:
    folder, found = ranks
    one, two = (json.loads(Path(recipe_of(folder, name, size).output, "report.json").read_text()) for size in (4, 2))
    assert found[0]["reports"][name] == two and found[1]["reports"][name] == {}
    assert one["validation"].keys() == two["validation"].keys()
    for key, expected in one["validation"].items():
        for got, x in zip(values(two["validation"][key]), values(expected), strict=True):
            assert got == (None if x is None else pytest.approx(x, rel=1e-4)), key
    assert two["best"]["step"] == one["best"]["step"] and two["best"]["loss"] == pytest.approx(one["best"]["loss"])


def test_a_run_on_two_ranks_is_resumed_bit_for_bit(ranks: Ranks) -> None:
    folder, found = ranks
    whole, stopped = (everything(place / "target_share-2" / "run") for place in (folder, folder / "stopped"))
    assert {"checkpoint-6/rng_state_0.pth", "checkpoint-6/rng_state_1.pth", "best/model.safetensors"} < set(whole)
    for files in (whole, stopped):
        settings = files.pop("text/prepared.json")
        assert b"source" in settings  # another folder of the same text
        files["recipe.yaml"] = files["recipe.yaml"].replace("/stopped", "")
    assert stopped.keys() == whole.keys()
    assert [name for name in whole if stopped[name] != whole[name]] == []
    assert found[0]["again"] == found[0]["reports"]["target_share"] and found[1]["again"] == {}, "finished is finished"


def test_only_the_first_rank_writes(ranks: Ranks) -> None:
    _, found = ranks
    assert {"target_share-2/run/history.jsonl", "target_share-2/run/recipe.yaml.part"} < set(found[0]["written"])
    folders = {f"{name}/run/checkpoint-{step}" for name in (*RUNS, "stopped/target_share") for step in (2, 4, 6)}
    assert {name.replace("-2/run", "/run") for name in found[1]["written"]} <= folders, "for its random numbers"


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_number_that_is_none_on_one_rank_stops_both(ranks: Ranks, kind: str) -> None:
    folder, found = ranks
    assert found[0][kind].startswith("FloatingPointError: step 3 is not finite (cross-entropy 5.")
    assert found[0][kind] == found[1][kind]
    recipe = recipe_of(folder, kind, 2)
    assert [row["step"] for row in history(recipe)] == [1, 2]
    assert [path.name for path in Path(recipe.output).glob("checkpoint-*")] == ["checkpoint-2"]
    assert fault_of(Path(recipe.output, "checkpoint-2")) is None
    with pytest.raises(ValueError, match=r"this run did not begin like that \(2 processes and now 1\)"):
        train(read_recipe(Path(recipe.output, "recipe.yaml")), resume=True, console=QUIET)


def test_what_the_first_rank_refuses_the_other_leaves_alone(ranks: Ranks) -> None:
    folder, found = ranks
    assert "which holds other files; give a new or empty folder" in found[0]["foreign"]
    assert found[1]["foreign"] == found[0]["foreign"]
    assert [path.name for path in (folder / "foreign-2" / "run").iterdir()] == ["thesis.txt"]
    assert re.search(r"held-2/run' is in use by process \d+ on .* since ", found[0]["held"])
    assert found[1]["held"] == found[0]["held"] and not (folder / "held-2").exists()


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    # without a GPU, --multi_gpu is what makes accelerate start two processes; with --cpu it starts one, or MPI does
    "accelerate launch": ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
                          "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_do_the_same(ranks: Ranks, tmp_path: Path, launcher: str) -> None:
    folder, _ = ranks
    recipe = recipe_of(folder, "target_share", 2)
    here = replace(recipe, output=str(tmp_path / "run"))
    here.save(tmp_path / "recipe.yaml")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
    environment["HF_HOME"] = str(tmp_path / "home")  # where accelerate looks for a configuration of its own
    command = [
        sys.executable,
        "-m",
        *LAUNCHERS[launcher],
        "-m",
        "midskip.cli",
        "train",
        str(tmp_path / "recipe.yaml"),
        "--json",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "run" / "report.json").read_text()), "printed once"
    assert_same_weights(weights(here), weights(recipe))
    assert timeless(history(here)) == timeless(history(recipe))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
