"""torch.compile around attention: the same numbers and names, and few graphs however many tokens there are."""

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_exactness import FIXED, same
from torch import Tensor
from torch._dynamo.utils import counters

from midskip import MidskipForCausalLM
from midskip.cost import Meter
from midskip.model.layers import compile_blocks

pytestmark = [  # torch's own, as it compiles
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
]
Make = Callable[..., MidskipForCausalLM]
ACCURATE = "aot_eager"  # traces forward and backward as the real compiler does, and then runs what it traced


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def batches() -> Iterator[dict[str, Tensor]]:
    """Batches of many sizes: even, padded, of documents, of one token, of none."""
    draw = torch.Generator().manual_seed(0)
    for shape in ((2, 29), (3, 14), (1, 1), (2, 2), (2, 30)):
        ids_BT = torch.randint(31, shape, generator=draw)
        mask_BT = (torch.rand(shape, generator=draw) < 0.8).long()
        position_BT = torch.randint(1, 4, shape, generator=draw).cumsum(1) % 11
        yield {"input_ids": ids_BT}
        yield {"input_ids": ids_BT, "attention_mask": mask_BT}
        yield {"input_ids": ids_BT, "attention_mask": mask_BT, "position_ids": position_BT}
    yield {"input_ids": ids_BT, "attention_mask": 0 * mask_BT}


def trained(model: MidskipForCausalLM, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients of a pass."""
    model.zero_grad()
    output = model.train()(**batch, labels=batch["input_ids"])
    (output.loss + output.gates.square().mean()).backward()
    found = {"loss": output.loss, "logits": output.logits, "gates": output.gates}
    return {name: x.detach() for name, x in found.items()} | {name: x.grad for name, x in model.named_parameters()}


@torch.no_grad()
def predicted(model: MidskipForCausalLM, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    output = model.eval()(**batch)
    return {"logits": output.logits, "gates": output.gates}


def check_equal(plain: MidskipForCausalLM, compiled: MidskipForCausalLM) -> None:
    for batch in batches():
        batch = {name: x.to(plain.device) for name, x in batch.items()}
        for run in (trained, predicted):
            got, expected = run(compiled, batch), run(plain, batch)
            for name in expected:
                same(got[name], expected[name], f"{name} of {list(batch['input_ids'].shape)}, {list(batch)}")


def pair(make_model: Make, backend: str, **changes: Any) -> tuple[MidskipForCausalLM, MidskipForCausalLM]:
    """A model, and its twin with compiled blocks."""
    plain, compiled = make_model(**changes), make_model(**changes)
    compile_blocks(compiled.model.layers, backend)
    return plain, compiled


# ---- numbers, and graphs: in training and in evaluation, one for what stands before attention, once more where keys
# have rows of their own, two for what comes after it (even sequences give it a view), and two for each direction of the
# loss (of all logits at once, or of a part). Where a number of tokens happens to be a width when a graph is made, torch
# makes that one again; no number of the first batch is


@pytest.mark.slow
@pytest.mark.parametrize("skipped_kv, num_graphs", [("drop", 8), ("keep", 10)])
def test_compiled_equals_plain_in_few_graphs(make_model: Make, skipped_kv: str, num_graphs: int) -> None:
    check_equal(*pair(make_model, ACCURATE, skipped_kv=skipped_kv, num_hidden_layers=3))
    assert counters["stats"]["unique_graphs"] <= num_graphs
    assert not counters["graph_break"]


@pytest.mark.integration
def test_blocks_that_no_token_reaches_are_not_compiled(make_model: Make) -> None:
    plain, compiled = pair(make_model, "eager", gates="late", num_hidden_layers=6)
    for batch in batches():
        got, expected = trained(compiled, batch), trained(plain, batch)
        for name in expected:
            same(got[name], expected[name], name)
    assert (got["model.layers.3.mlp.up_proj.weight"] == 0).all()
    assert counters["stats"]["unique_graphs"] <= 7


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"policy": "dense", "norms": "pre"},
        {"gates": "mixed", "num_key_value_heads": 1},
        {"gates": "mixed", "norms": "pre", "skipped_kv": "keep"},
        {"policy": FIXED, "policy_settings": {"skip_share": 0.5}, "skipped_kv": "keep"},
        {"policy": FIXED, "policy_settings": {"skip_share": 0.3, "fractional": True}},
    ],
)
def test_inductor_equals_plain(make_model: Make, changes: dict[str, Any]) -> None:
    check_equal(*pair(make_model, "inductor", **changes, num_hidden_layers=3))
    assert counters["stats"]["unique_graphs"] <= 12
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize(  # where rounding does not change who is present
    "changes", [{"gates": "open"}, {"policy": FIXED, "policy_settings": {"skip_share": 0.5, "fractional": True}}]
)
def test_inductor_under_autocast_is_as_close_to_float32(make_model: Make, changes: dict[str, Any]) -> None:
    plain, compiled = pair(make_model, "inductor", **changes, dtype=torch.float32, hidden_size=64)
    batch = {"input_ids": torch.randint(31, (4, 60))}
    exact = trained(plain, batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = [trained(model, batch) for model in (plain, compiled)]
    for name in ("logits", *(name for name, _ in plain.named_parameters())):
        before, after = ((found[name] - exact[name]).norm() for found in rounded)
        assert after <= 1.5 * before + 1e-6, name


# ---- beside what else can be done with a model


@pytest.mark.parametrize(
    ("backend", "skip_unit"),
    [
        ("eager", "sublayer"),
        *(pytest.param(backend, "block", marks=pytest.mark.slow) for backend in (ACCURATE, "inductor")),
        pytest.param("inductor", "sublayer", marks=pytest.mark.slow),
    ],
)
@pytest.mark.integration
def test_with_gradient_checkpointing(make_model: Make, backend: str, skip_unit: str) -> None:
    plain, compiled = pair(make_model, backend, num_hidden_layers=3, skip_unit=skip_unit)
    getattr(compiled, "activation_checkpointing_enable", compiled.gradient_checkpointing_enable)()
    for batch in list(batches())[::4]:
        with Meter(compiled) as meter:
            got = trained(compiled, batch)
        with Meter(plain) as other:
            expected = trained(plain, batch)
        for name in expected:
            same(got[name], expected[name], name)
        assert meter.layers == other.layers


@pytest.mark.integration
def test_names_copies_and_files_stay_what_they_were(make_model: Make, tmp_path: Path) -> None:
    plain, compiled = pair(make_model, "eager")
    batch = {"input_ids": torch.randint(31, (2, 7))}
    expected = predicted(compiled, batch)["logits"]
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in compiled.named_modules()] == [name for name, _ in plain.named_modules()]
    compiled.save_pretrained(tmp_path)
    loaded = MidskipForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert all(block.backend is None for block in loaded.model.layers)
    same(predicted(loaded, batch)["logits"], expected, "loaded")
    other = pickle.loads(pickle.dumps(copy.deepcopy(compiled)))
    with torch.no_grad():
        for parameter in other.model.layers.parameters():
            parameter.zero_()  # the copy's own, and not those of the model it was copied from
    same(predicted(compiled, batch)["logits"], expected, "after its copy was changed")
    assert (predicted(other, batch)["logits"] - expected).abs().max() > 0.1
