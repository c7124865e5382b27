"""On a GPU: the numbers of the CPU, in every precision, training, and how often the host has to wait.

pytest -m gpu tests/test_gpu.py -rA      # -rA also shows what was measured
"""

import copy
import json
import math
import warnings
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from test_compile import check_equal, pair
from test_documents import POLICIES, POSITIONS
from test_exactness import gradients, outputs, same
from torch import Tensor
from torch._dynamo.utils import counters

from midskip import MidskipForCausalLM
from midskip.cost import Meter
from midskip.evaluate import evaluate

DEVICE = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    # what torch, transformers and accelerate warn of on a GPU is not ours; -rA shows it
    pytest.mark.filterwarnings("default"),
]
Make = Callable[..., MidskipForCausalLM]
Batch = dict[str, Tensor]
KINDS = ("even", "ragged", "documents")
# where rounding does not change who is present
STEADY = {name: POLICIES[name] for name in ("dense", "open", "fixed", "fractional")}


@pytest.fixture
def batches(ragged: tuple[Tensor, Tensor]) -> dict[str, Batch]:
    mask_BT = torch.tensor([[p is not None and p not in (-1, 99) for p in row] for row in POSITIONS]).long()
    position_BT = torch.tensor([[-5 if p is None else p for p in row] for row in POSITIONS])
    ids_BT = torch.randint(31, mask_BT.shape)
    return {
        "even": {"input_ids": torch.randint(31, (3, 21))},
        "ragged": {"input_ids": ragged[0], "attention_mask": ragged[1]},
        "documents": {"input_ids": ids_BT, "attention_mask": mask_BT, "position_ids": position_BT},
    }


def run(model: MidskipForCausalLM, batch: Batch) -> tuple[Batch, Batch]:
    """Outputs and gradients of a training pass where the model is, brought to the CPU."""
    batch = {name: x.to(model.device) for name, x in batch.items()}
    labels_BT = torch.where(torch.arange(batch["input_ids"].shape[1], device=model.device) % 4 == 2, -100, 1)
    labels_BT = torch.where(labels_BT == -100, labels_BT, batch["input_ids"])
    found = {name: x.cpu() for name, x in outputs(model(**batch, labels=labels_BT, output_hidden_states=True)).items()}
    grads = {name: x.cpu() for name, x in gradients(model, found).items() if x is not None}
    assert grads.keys() == dict(model.named_parameters()).keys()
    return {name: x.detach() for name, x in found.items()}, grads


def twins(model: MidskipForCausalLM, dtype: torch.dtype = torch.float64) -> MidskipForCausalLM:
    """A copy on the GPU."""
    return copy.deepcopy(model).to(DEVICE, dtype)


def distance(got: Batch, expected: Batch) -> float:
    """Norm of all differences, over that of all that is expected."""
    differences = [(got[name].double() - expected[name].double()).norm() for name in expected]
    return (torch.stack(differences).norm() / torch.stack([x.double().norm() for x in expected.values()]).norm()).item()


# ---- numbers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norms", ["sandwich", "pre"])
@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
@pytest.mark.parametrize("policy", POLICIES)
def test_float64_equals_the_cpu(
    make_model: Make, batches: dict[str, Batch], policy: str, skipped_kv: str, norms: str, kind: str
) -> None:
    model = make_model(**POLICIES[policy], skipped_kv=skipped_kv, norms=norms, num_hidden_layers=5)
    on_gpu, batch = twins(model), batches[kind]
    for got, expected in zip(run(on_gpu, batch), run(model, batch), strict=True):
        assert got.keys() == expected.keys()
        for name in expected:
            same(got[name], expected[name], name)
    with torch.no_grad():
        moved = {name: x.to(DEVICE) for name, x in batch.items()}
        got, expected = on_gpu.eval()(**moved), model.eval()(**batch)
    same(got.logits.cpu(), expected.logits, "logits in evaluation")
    same(got.gates.cpu(), expected.gates, "gates in evaluation")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
@pytest.mark.parametrize("policy", STEADY)
def test_float32_is_as_exact_as_on_the_cpu(
    make_model: Make, batches: dict[str, Batch], policy: str, skipped_kv: str, kind: str
) -> None:
    assert torch.get_float32_matmul_precision() == "highest", "no TF32 unless asked for"
    model = make_model(**STEADY[policy], skipped_kv=skipped_kv)
    exact = run(model, batches[kind])
    found = run(twins(model, torch.float32), batches[kind])
    for got, expected in zip(found, exact, strict=True):
        assert distance(got, expected) < 1e-5


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
@pytest.mark.parametrize("policy", STEADY)
def test_bfloat16_errs_no_more_than_on_the_cpu(
    make_model: Make, batches: dict[str, Batch], policy: str, skipped_kv: str, kind: str, autocast: bool
) -> None:
    model = make_model(**STEADY[policy], skipped_kv=skipped_kv, num_hidden_layers=2)
    exact = run(model, batches[kind])
    dtype = torch.float32 if autocast else torch.bfloat16
    on_gpu, on_cpu = twins(model, dtype), copy.deepcopy(model).to(dtype)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        found = run(on_gpu, batches[kind])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        beside = run(on_cpu, batches[kind])
    assert 0 < distance({"logits": found[0]["logits"]}, {"logits": exact[0]["logits"]}) < 0.03
    for got, other, expected in zip(found, beside, exact, strict=True):
        assert distance(got, expected) < 1.5 * distance(other, expected) + 0.003


@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
def test_the_meter_counts_the_same(make_model: Make, batches: dict[str, Batch], skipped_kv: str) -> None:
    model = make_model("mixed", skipped_kv=skipped_kv, num_hidden_layers=5)
    on_gpu = twins(model)
    for batch in batches.values():
        with Meter(model) as expected:
            model(**batch)
        with Meter(on_gpu) as found:
            on_gpu(**{name: x.to(DEVICE) for name, x in batch.items()})
        assert found.layers == expected.layers and found.seqlens == expected.seqlens
        assert found.flops(backward=True) == expected.flops(backward=True)


def numbers(value: Any) -> list[float]:
    """A number or a list of some, with -1 for None."""
    return [-1 if one is None else one for one in (value if isinstance(value, list) else [value])]


@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
def test_generation_and_evaluation_equal_the_cpu(make_model: Make, skipped_kv: str) -> None:
    model = make_model("mixed", skipped_kv=skipped_kv).eval()
    on_gpu = twins(model)
    ids_BT, mask_BT = torch.randint(31, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask_BT[1, :4] = 0
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    found = on_gpu.generate(ids_BT.to(DEVICE), attention_mask=mask_BT.to(DEVICE), **settings)
    assert torch.equal(found.cpu(), model.generate(ids_BT, attention_mask=mask_BT, **settings))
    windows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(31, (7, 20))]
    got, expected = (evaluate(one, windows, torch.arange(31), batch_size=3) for one in (on_gpu, model))
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        for one, other in zip(numbers(got[name]), numbers(value), strict=True):
            assert one == pytest.approx(other, rel=1e-9), name


# ---- the compiler


@pytest.mark.parametrize("changes", [{"policy": "dense"}, {"gates": "mixed"}, {"gates": "open", "skipped_kv": "keep"}])
def test_compiled_blocks_equal_plain_ones(make_model: Make, changes: dict[str, Any]) -> None:
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = pair(make_model, "inductor", **changes, num_hidden_layers=3)
    check_equal(plain.to(DEVICE), compiled.to(DEVICE))
    assert counters["stats"]["unique_graphs"] <= 12
    assert not counters["graph_break"]


# ---- training


@pytest.mark.skipif(find_spec("jsonargparse") is None, reason="recipes need jsonargparse")
@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
def test_training_in_bfloat16_plain_and_compiled(make_recipe: Callable[..., Any], skipped_kv: str) -> None:
    from midskip.runs import load_run
    from midskip.train import train

    losses = {}
    for compiled in (False, True):
        torch._dynamo.reset()
        recipe = make_recipe(
            "target_share", {"target_share": 0.6}, output=f"run-{compiled}", max_steps=30,
            per_device_train_batch_size=4, learning_rate=0.01,
            model={"skipped_kv": skipped_kv, "policy_settings": {"start": "spread"}}, bf16=True, torch_compile=compiled,
            gradient_checkpointing=compiled, eval_steps=15, save_steps=15,
        )  # fmt: skip
        report = train(recipe, console=Console(quiet=True))
        rows = [json.loads(line) for line in Path(recipe.output, "history.jsonl").read_text().splitlines()]
        losses[compiled] = [row["cross_entropy"] for row in rows]
        assert all(math.isfinite(loss) for loss in losses[compiled])
        assert sum(losses[compiled][-5:]) < 0.9 * sum(losses[compiled][:5])
        assert rows[-1]["executed_share"] < 1
        model, _ = load_run(Path(recipe.output))
        assert model.device.type == "cuda" and math.isfinite(report["validation"]["loss"])
    assert losses[True][:3] == pytest.approx(losses[False][:3], rel=0.01)


# ---- waiting


def waits(task: Callable[[], Any]) -> Counter[str]:
    """How often the host waited for the device, by line of code. (torch does not see every wait.)"""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            task()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [one for one in seen if "called a synchronizing CUDA operation" in str(one.message)]
    return Counter(f"{Path(one.filename).name}:{one.lineno}" for one in found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_pass_waits_once_for_each_thing_the_host_must_know(
    make_model: Make, batches: dict[str, Batch], kind: str, record_property: Callable[[str, object], None]
) -> None:
    model = twins(make_model("mixed", num_hidden_layers=6), torch.float32)
    batch = {name: x.to(DEVICE) for name, x in batches[kind].items()}

    def step() -> None:
        model(**batch, labels=batch["input_ids"]).loss.backward()

    step()
    found = waits(step)
    print(kind, dict(found))
    record_property("waits", dict(found))
    # how many are valid in each row, if there is a mask; with positions also who starts a document, and their range
    of_the_batch = ("attention_mask" in batch) + ("position_ids" in batch)
    # for each of three sets of tokens kept: how many in each sequence
    assert sum(found.values()) <= of_the_batch + 3, found
