"""Two ranks agree with one process: evaluation, and training under DDP and FSDP2, also where a block is reached by no
token of one rank or of both.

One launch runs everything: this file as a program becomes two ranks (gloo, CPU), which write what they found.
"""

import io
import json
import os
import sys
from contextlib import redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_processes import run_program, start_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from midskip import MidskipConfig, MidskipForCausalLM, cli
from midskip.data import TokenWindows, encode_documents, token_bytes, train_tokenizer
from midskip.evaluate import evaluate
from midskip.policies import Decision, Policy
from midskip.runs import load_run

pytestmark = pytest.mark.integration
TIMEOUT_S = 30  # of a collective: a rank that waits for ever is a failure
STEPS = 3
POLICIES = {
    "dense": {"policy": "dense"},
    "middle_out": {"policy": "middle_out", "policy_settings": {"start": "released"}},
    "early": {"policy": "test_ranks:Early"},
}
# by name: the policy, and where the positions of the windows of rank 0 and of rank 1 begin
SITUATIONS = {
    "dense": ("dense", 0, 0),
    "middle_out": ("middle_out", 0, 0),
    "one rank reaches": ("early", 29, 32),
    "no rank reaches": ("early", 32, 32),
}


class Early(Policy):
    """All run the outer blocks; only tokens at positions below 32 run the others."""

    def decide(self, layer: int, h_ND: Tensor, state: dict[str, Any], batch: Any) -> Decision:
        if layer in (0, self.num_layers - 1):
            return Decision()
        return state.setdefault("early", Decision(keep_N=batch.position_N < 32))


# ---- what every rank does


def make_model(policy: str, skipped_kv: str) -> MidskipForCausalLM:
    torch.manual_seed(0)
    config = MidskipConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, skipped_kv=skipped_kv,
        **POLICIES[policy],
    )  # fmt: skip
    return MidskipForCausalLM(config).double()


def batch_of(starts: tuple[int, int]) -> dict[str, Tensor]:
    """Two windows for each rank, of two documents each."""
    ids_BT = torch.randint(31, (4, 9), generator=torch.Generator().manual_seed(1))
    position_T = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4])
    position_BT = position_T + torch.tensor(starts).repeat_interleave(2)[:, None]
    return {"input_ids": ids_BT, "position_ids": position_BT, "labels": ids_BT}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def train(model: nn.Module, module: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    """Losses, gradients of the first step and weights after the last."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-6, weight_decay=0.1)
    losses, gradients = [], {}
    for step in range(STEPS):
        output = module(**batch)
        output.loss.backward()
        losses.append(output.loss.detach())
        if step == 0:
            gradients = {name: None if x.grad is None else whole(x.grad) for name, x in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: whole(x) for name, x in model.named_parameters()}
    return {"losses": torch.stack(losses), "gradients": gradients, "weights": weights}


def shard(model: MidskipForCausalLM) -> MidskipForCausalLM:
    mesh = init_device_mesh("cpu", (2,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def windows() -> list[dict[str, Tensor]]:
    """In batches of two, those of the second batch reach no inner block under `Early`."""
    found = []
    for number in range(9):
        ids_T = torch.randint(31, (9,), generator=torch.Generator().manual_seed(number))
        position_T = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4]) + (32 if number in (2, 3) else 29)
        mask_T = (torch.arange(9) >= number % 4).long()
        item = {"input_ids": ids_T, "position_ids": position_T, "attention_mask": mask_T, "labels": ids_T}
        found.append(item | {"group": ids_T % 4 - 1})
    return found


TEXT = [f"Document {i}: the cat sat on mat {i % 5}, and saw it.\n" for i in range(12)]
# of 9 windows, which are five batches of two, or of 2, which are one, with none for the other rank
EVALUATIONS = [
    (*what, sharded)
    for what in (("early", "drop", 9), ("early", "keep", 2), ("middle_out", "keep", 9), ("middle_out", "drop", 2))
    for sharded in (False, True)
]
TRAININGS = [
    (situation, skipped_kv, kind)
    for situation in SITUATIONS
    for skipped_kv in (("drop", "keep") if "reach" in situation else ("drop",))
    for kind in ("ddp", "fsdp2")
]


def measure(model: MidskipForCausalLM, count: int) -> dict[str, Any]:
    return evaluate(model, windows()[:count], torch.arange(31), batch_size=2)


def run_rank(rank: int, folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    found: dict[Any, Any] = {}
    for policy, skipped_kv, count, _ in EVALUATIONS[::2]:
        found["evaluated", policy, skipped_kv, count] = measure(make_model(policy, skipped_kv), count)
    for situation, skipped_kv, _ in TRAININGS[::2]:
        policy, *starts = SITUATIONS[situation]
        model = make_model(policy, skipped_kv)
        found["trained", situation, skipped_kv] = train(model, model, batch_of((starts[0], starts[1])))
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=TIMEOUT_S)
    )
    for policy, skipped_kv, count, sharded in EVALUATIONS:
        model = make_model(policy, skipped_kv)
        found["evaluated", policy, skipped_kv, count, sharded] = measure(shard(model) if sharded else model, count)
    for situation, skipped_kv, kind in TRAININGS:
        policy, *starts = SITUATIONS[situation]
        batch = {name: x[2 * rank : 2 * rank + 2] for name, x in batch_of((starts[0], starts[1])).items()}
        model = make_model(policy, skipped_kv)
        run = train(model, DistributedDataParallel(model) if kind == "ddp" else shard(model), batch)
        dist.all_reduce(run["losses"])
        run["losses"] /= 2
        found["trained", situation, skipped_kv, kind] = run
    dist.destroy_process_group()
    found["command"] = run_command(rank, folder, port)
    torch.save(found, folder / f"rank{rank}.pt")


def run_command(rank: int, folder: Path, port: int) -> dict[str, Any]:
    """`midskip evaluate`, as torchrun would start it on each rank."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    printed = io.StringIO()
    with redirect_stdout(printed):
        options = [
            "--data",
            str(folder / "text.txt"),
            "--batch_size",
            "1",
            "--output",
            str(folder / f"{rank}.json"),
            "--json",
        ]
        status = cli.main(["evaluate", str(folder / "run"), *options])
    return {"status": status, "printed": printed.getvalue(), "joined": dist.is_initialized()}


def main(folder: Path) -> None:
    model, tokenizer = make_model("middle_out", "drop"), train_tokenizer(TEXT, 280)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder / "run")
    tokenizer.save_pretrained(folder / "run")
    (folder / "text.txt").write_text("<|endoftext|>\n".join(TEXT))
    start_ranks(run_rank, folder)


# ---- the tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[Any, Any]]:
    """What each rank found."""
    run_program(__file__, folder, timeout_s=4 * TIMEOUT_S)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def close(got: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize(("situation", "skipped_kv", "kind"), TRAININGS)
def test_training_on_two_ranks_is_training_on_one(
    ranks: list[dict[Any, Any]], situation: str, skipped_kv: str, kind: str
) -> None:
    one = ranks[0]["trained", situation, skipped_kv]
    for rank in ranks:
        two = rank["trained", situation, skipped_kv, kind]
        close(two["losses"], one["losses"], "losses")
        for name, expected in one["gradients"].items():
            assert expected is not None and two["gradients"][name] is not None, name
            close(two["gradients"][name], expected, f"gradient of {name}")
            close(two["weights"][name], one["weights"][name], name)
    inner = [x for name, x in one["gradients"].items() if ".layers.1." in name or ".layers.2." in name]
    assert all(not x.any() for x in inner) == (situation == "no rank reaches")


@pytest.mark.parametrize(("policy", "skipped_kv", "count", "sharded"), EVALUATIONS)
def test_evaluation_on_two_ranks_is_evaluation_on_one(
    ranks: list[dict[Any, Any]], policy: str, skipped_kv: str, count: int, sharded: bool
) -> None:
    one = ranks[0]["evaluated", policy, skipped_kv, count]
    assert 0.1 < one["executed_share"] < 0.9
    two = ranks[0]["evaluated", policy, skipped_kv, count, sharded]
    assert two == ranks[1]["evaluated", policy, skipped_kv, count, sharded] and two.keys() == one.keys()
    assert len(one["accuracy_by_group"]) == 3
    for name, got in two.items():
        if "loss" in name or name in ("perplexity", "bits_per_byte"):
            expected = one[name] if isinstance(one[name], list) else [one[name]]
            for x, y in zip(got if isinstance(got, list) else [got], expected, strict=True):
                assert x == (y if y is None else pytest.approx(y, rel=1e-12)), name
        else:
            assert got == one[name], name


def test_the_command_evaluates_over_ranks_and_prints_once(ranks: list[dict[Any, Any]], folder: Path) -> None:
    assert [rank["command"]["status"] for rank in ranks] == [0, 0]
    assert not any(rank["command"]["joined"] for rank in ranks), "the ranks part at the end"
    printed = ranks[0]["command"]["printed"]
    assert ranks[1]["command"]["printed"] == "" and not (folder / "1.json").exists()
    assert (folder / "0.json").read_text() == printed
    model, tokenizer = load_run(folder / "run")
    ids = encode_documents(tokenizer, TEXT)
    windows = TokenWindows(ids, 64, drop_last=False, end_of_text=tokenizer.eos_token_id)
    expected = evaluate(model, windows, token_bytes(tokenizer), 1)
    result = json.loads(printed)
    assert len(windows) % 2 == 1 and result["num_targets"] == expected["num_targets"] == len(ids) - 1
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-12)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
