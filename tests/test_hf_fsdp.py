"""A plain Trainer with accelerate's FSDP2 plugin, on two ranks, trains as one process with twice the batch.

accelerate shards on accelerators alone: on CPUs it makes DDP of the plugin and does not say so. The code that shards is
the same on both, so on CPUs it is told to take that path; the test marked gpu tells it nothing.
One launch runs everything: this file as a program becomes two ranks, which write what they found.
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
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer, TrainingArguments

from midskip import MidskipConfig, MidskipForCausalLM

POLICIES: dict[str, dict[str, Any]] = {
    "dense": {"policy": "dense"},
    "soft": {"policy_settings": {"start": "released"}},
    "hard": {"policy_settings": {"gates": "hard"}},
}
STEPS = 3


def fit(folder: Path, name: str, num_ranks: int, device: str, sharded: bool) -> dict[str, Any]:
    """Three steps of eight rows, and an evaluation; the weights go into the folder."""
    torch.manual_seed(0)
    config = MidskipConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.3, **POLICIES[name],
    )  # fmt: skip
    model = MidskipForCausalLM(config)
    if name == "hard":
        with torch.no_grad():
            model.model.policy.bias.fill_(-1.5)
    ids_BT = torch.randint(31, (24, 12), generator=torch.Generator().manual_seed(1))
    rows: Any = [{"input_ids": ids_T, "labels": ids_T} for ids_T in ids_BT]
    plugin: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2}} if sharded else {}
    if sharded and device == "cpu":
        plugin["ddp_backend"] = "gloo"
    arguments = TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=4 // num_ranks, gradient_accumulation_steps=2,
        learning_rate=0.01, adam_epsilon=1e-3, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True,
        use_cpu=device == "cpu", per_device_eval_batch_size=4, **plugin,
    )  # fmt: skip
    arguments._n_gpu = min(arguments.n_gpu, 1)  # alone, one device
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    found: dict[str, Any] = {"kinds": sorted({type(parameter).__name__ for parameter in trainer.model.parameters()})}
    found["losses"] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    found["eval_loss"] = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(folder))
    return found


def run_rank(rank: int, folder: Path, port: int, num_ranks: int, device: str) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks,
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    if device == "cpu":
        shard_on_cpus()
    found = {name: fit(folder / name, name, num_ranks, device, True) for name in POLICIES}
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main(folder: Path, num_ranks: int, device: str) -> None:
    method = "fork" if device == "cpu" else "spawn"
    start_ranks(run_rank, folder, num_ranks, device, num_ranks=num_ranks, method=method)


def launch(folder: Path, num_ranks: int, device: str) -> list[dict[str, Any]]:
    """What each rank found."""
    run_program(__file__, folder, num_ranks, device, timeout_s=240, device=device)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(num_ranks)]


def assert_same(folder: Path, name: str, ranks: list[dict[str, Any]], device: str, bound: float) -> None:
    one = fit(folder / f"{name}-alone", name, 1, device, False)
    for rank in ranks:
        found = rank[name]
        assert found["kinds"] == ["DTensor"] and one["kinds"] == ["Parameter"]
        assert found["losses"] == pytest.approx(one["losses"], rel=bound) and len(one["losses"]) == STEPS
        assert found["eval_loss"] == pytest.approx(one["eval_loss"], rel=bound)
    expected: dict[str, Tensor] = load_file(folder / f"{name}-alone" / "model.safetensors")
    weights = load_file(folder / name / "model.safetensors")
    assert weights.keys() == expected.keys()
    for key, weight in expected.items():
        torch.testing.assert_close(weights[key], weight, rtol=0, atol=bound, msg=lambda text, key=key: key + text)
    MidskipForCausalLM.from_pretrained(folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return launch(folder, 2, "cpu")


@pytest.mark.slow
@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("name", POLICIES)
def test_two_ranks_train_as_one(ranks: list[dict[str, Any]], folder: Path, name: str) -> None:
    assert_same(folder, name, ranks, "cpu", 1e-5)


@pytest.mark.gpu
def test_gpus_train_as_one(tmp_path: Path) -> None:
    """On two GPUs if there are two, else the plugin's path on one."""
    num_ranks = min(2, torch.cuda.device_count())
    found = launch(tmp_path, num_ranks, "cuda")
    for name in POLICIES:
        assert_same(tmp_path, name, found, "cuda", 1e-3)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
