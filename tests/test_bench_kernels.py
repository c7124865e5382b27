"""Other ways to compute attention, whole optimizer steps, bare products and memory: what `midskip bench` also times."""

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as flex
import torch.nn.functional as F
from tiny_bench import DTYPE, ids, settings, side

from midskip import MidskipForCausalLM
from midskip.bench import DisagreementError, kernels
from midskip.bench.agree import check_ours
from midskip.bench.kernels import attention_by
from midskip.bench.models import Side, positions
from midskip.bench.peak import flops_per_s, peak_bytes
from midskip.bench.tasks import Products
from midskip.bench.timing import Clock
from midskip.bench.trainer import TIMED_STEPS, Rows, TrainerSteps
from midskip.cost import Meter
from midskip.model import attention
from midskip.regularizers import build_regularizer


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for what runs on a GPU alone."""
    monkeypatch.setattr(kernels, "_compiled", lambda backend: kernels._flex_packed)
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)  # what it computes on a CPU has gradients


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # as torch traces it
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("gates", ["fixed", "fractional"])
@pytest.mark.parametrize("name", kernels.KERNELS)
@pytest.mark.integration
def test_every_kernel_computes_what_ours_does(name: str, gates: str, documents: bool, without_gpu: None) -> None:
    """Logits and every gradient, in float64, over more rows than FlexAttention has in a block."""
    model, ids_BT = side(0.5, gates, prompt_tokens=200).model.double(), ids(3, 150)
    position_BT = positions(ids_BT, 200)
    if documents:
        position_BT = position_BT % 70
    found = []
    for kernel in ("auto", name):
        with attention_by(kernel):
            output = model(ids_BT, position_ids=position_BT, labels=ids_BT, use_cache=False)
        found.append([output.logits, *torch.autograd.grad(output.loss, list(model.parameters()))])
    for got, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_a_kernel_is_used_and_then_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    library, calls = attention.attend, []
    run = kernels.KERNELS["padded"][1]
    monkeypatch.setitem(kernels.KERNELS, "padded", (kernels._places, lambda *given: calls.append(1) or run(*given)))
    Side("mine", side(0.25).model, attention="padded").call(ids())
    assert len(calls) == 4 and attention.attend is library
    keeps = settings().config()
    keeps.skipped_kv, keeps.policy, keeps.policy_settings = "keep", *("midskip.policies.controls:FixedDepths", {})
    with pytest.raises(ValueError, match=r"attention by 'padded' is for skipped_kv=\"drop\": leave it out"):
        Side("keeps", MidskipForCausalLM(keeps), attention="padded").call(ids())
    assert attention.attend is library


def test_a_kernel_with_wrong_gradients_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    places, run = kernels.KERNELS["padded"]
    good = side(0.25, attention=("padded",))
    assert len(check_ours(good, ids(), gradients=True)) == 6 and good.name == "skip 0.25, padded"
    monkeypatch.setitem(kernels.KERNELS, "padded", (places, lambda q, k, *more: run(q, k.detach(), *more)))
    check_ours(good, ids())
    with pytest.raises(DisagreementError, match=r"skip 0.25, padded \(training, float32\).*its gradient of"):
        check_ours(good, ids(), gradients=True)


@pytest.mark.parametrize(
    "changes",
    [{"skipped_kv": "drop"}, {"skipped_kv": "keep"}, {"skip_unit": "sublayer"}, {"skip_path": "linear"}],
    ids=str,
)
def test_products_are_those_of_the_rows_that_run(
    make_model: Callable[..., MidskipForCausalLM], changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("mixed", DTYPE, **changes)
    one, task, done, linear = Side("trained", model), Products(ids(2, 30) % 31), [], F.linear
    with torch.no_grad():
        step, work = task.begin(one), task.work(one)
        monkeypatch.setattr(F, "linear", lambda x, w: done.append(2 * len(x) * w.numel()) or linear(x, w))
        step(0)
        monkeypatch.undo()
        with Meter(model) as meter:
            one.call(task.ids_BT, logits_to_keep=1)
    flops = meter.flops()
    assert sum(done) == work.flops == flops.total - flops.attention and meter.executed_share < 1


def test_optimizer_steps_leave_the_model_as_it_was(make_model: Callable[..., MidskipForCausalLM]) -> None:
    model = make_model("mixed", DTYPE, num_hidden_layers=5)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    regularizer = build_regularizer("target_share", 5, target_share=0.5)
    state, task = regularizer.state_dict(), TrainerSteps(torch.randint(31, (2, 12)), regularizer)
    seconds = task.begin(Side("trained", model))(0)
    assert len(seconds) == TIMED_STEPS and all(second > 0 for second in seconds)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert regularizer.state_dict() == state
    for one, expected in ((Side("trained", model), "TargetShare"), (side(gates="hard"), "Unsteered")):
        trainer, _, folder = task._trainer(one)
        assert type(trainer.regularizer).__name__ == expected  # pyright: ignore[reportAttributeAccessIssue]
        folder.cleanup()


def test_rows_of_a_batch_as_windows() -> None:
    rows = Rows(ids(3, 8), 100)
    assert [rows[index]["position_ids"][0].item() for index in range(3)] == [0, 100, 200]
    assert torch.stack([rows[index]["input_ids"] for index in range(3)]).shape == (3, 8)
    assert "position_ids" not in Rows(ids(3, 8), 0)[0]


def test_memory_at_its_peak_is_what_was_held_at_once() -> None:
    def work() -> None:
        first = torch.ones(50_000_000)
        del first
        torch.ones(25_000_000)

    peak = peak_bytes(work, "cpu")
    assert peak is None or 190e6 < peak < 230e6
    assert flops_per_s("cpu", torch.bfloat16) is None


def test_a_gpu_is_timed_by_its_own_events(monkeypatch: pytest.MonkeyPatch) -> None:
    now_ms, waited = itertools.count(10.0, 5.0), []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self, stream: Any) -> None:
            self.at = next(now_ms)

        def elapsed_time(self, other: Any) -> float:
            return other.at - self.at

    fake = SimpleNamespace(Event=Event, synchronize=waited.append, current_stream=lambda device: None)
    monkeypatch.setattr(torch, "cuda", fake)
    for waits in (True, False):
        clock = Clock("cuda", waits)
        assert clock.seconds(clock.begin(), clock.end()) == 0.005
        assert len(waited) == 1
