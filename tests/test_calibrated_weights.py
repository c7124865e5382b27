"""A calibration holds for the weights and settings that it was measured on, however kept, and for no others."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_curve import CURVE
from torch import Tensor

from midskip import MidskipForCausalLM
from midskip.budget.calibrate import calibrate, loss_by_budget
from midskip.budget.measured_on import NUM_VALUES, hashes_of
from midskip.budget.monitor import DriftMonitor
from midskip.cli import main
from midskip.model.layers import compile_blocks

Make = Callable[..., MidskipForCausalLM]
STALE = r"calibration on 'news' was measured on other weights than it has now.*: run `midskip calibrate` on its run"
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def bound(model: MidskipForCausalLM) -> MidskipForCausalLM:
    """With `CURVE` as the calibration of its weights."""
    model.config.calibration = CURVE | {"weights": hashes_of(model)}
    return model.eval()


def trained_on(model: MidskipForCausalLM, steps: int = 1) -> MidskipForCausalLM:
    """A copy after steps that are as small as a fine-tune has them."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    for _ in range(steps):
        ids = torch.randint(31, (4, 16))
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize(
    "changes",
    [
        {"initializer_range": 1e-4},
        {"tie_word_embeddings": True},
        {"policy_settings": {"gates": "hard"}},
        {"policy": "independent"},
    ],
    ids=["tiny weights", "tied", "hard", "independent"],
)
def test_saving_loading_and_casting_keep_a_calibration(make_model: Make, tmp_path: Path, changes: dict) -> None:
    model = bound(make_model("mixed", torch.float32, **changes))
    model.save_pretrained(tmp_path / "float32")
    for dtype in DTYPES:
        model.set_budget(0.5)
        MidskipForCausalLM.from_pretrained(tmp_path / "float32", dtype=dtype).set_budget(0.5)
        copy.deepcopy(model).to(dtype).set_budget(0.5)  # pyright: ignore[reportArgumentType, reportCallIssue]
    model.to(torch.bfloat16).save_pretrained(tmp_path / "bfloat16")  # pyright: ignore[reportArgumentType, reportCallIssue]
    for dtype in DTYPES:
        MidskipForCausalLM.from_pretrained(tmp_path / "bfloat16", dtype=dtype).set_budget(0.5)
    policy = copy.deepcopy(model)
    policy.model.policy.float()
    policy.set_budget(0.5)


@pytest.mark.parametrize(
    ("name", "value"),
    [("skipped_kv", "keep"), ("policy_settings", {"gates": "hard", "first_tokens": 2})],
)
def test_settings_that_were_changed_are_seen(
    make_model: Make, tmp_path: Path, windows: list[dict[str, Tensor]], name: str, value: Any
) -> None:
    model = make_model("mixed", torch.float32, policy_settings={"gates": "hard"})
    calibrate(model, windows, "noise", batch_size=48)
    model.save_pretrained(tmp_path)
    MidskipForCausalLM.from_pretrained(tmp_path).set_budget(0.5)
    changed = MidskipForCausalLM.from_pretrained(tmp_path, **{name: value})
    with pytest.raises(ValueError, match=rf"'noise' was measured with {name}: .*, and the model has .*: set it back"):
        changed.set_budget(0.5)
    changed.set_budget()


def test_a_compiled_model_keeps_its_calibration(make_model: Make) -> None:
    model = bound(make_model("mixed", torch.float32))
    compile_blocks(model.model.layers)
    model.set_budget(0.5)
    whole: Any = torch.compile(model, backend="eager")
    whole.set_budget(0.5)
    model.model = torch.compile(model.model, backend="eager")  # pyright: ignore[reportAttributeAccessIssue]
    model.set_budget(0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fine_tune_of_one_small_step_is_seen(
    make_model: Make, tmp_path: Path, windows: list[dict[str, Tensor]], dtype: torch.dtype
) -> None:
    tuned = trained_on(bound(make_model("mixed", torch.float32)))
    tuned.save_pretrained(tmp_path)
    for model in (tuned, MidskipForCausalLM.from_pretrained(tmp_path, dtype=dtype)):
        for use in (
            lambda model: model.set_budget(0.5),
            lambda model: DriftMonitor(model),
            lambda model: loss_by_budget(model, windows, [0.5]),
        ):
            with pytest.raises(ValueError, match=STALE):
                use(model)
        model.set_budget()
        model.set_budget(max_layers=2)
    calibrate(tuned, windows, "noise", batch_size=48)
    tuned.set_budget(0.5)


def test_each_part_of_a_model_counts(make_model: Make) -> None:
    model = bound(make_model("mixed", torch.float32, skip_path="linear"))
    for name, parameter in model.named_parameters():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter += 0.01
        with pytest.raises(ValueError, match=STALE):
            model.set_budget(0.5)
        with torch.no_grad():
            parameter.copy_(before)
        model.set_budget(0.5)
        assert name


def test_hashing_reads_a_few_values_of_a_tensor_and_none_of_what_is_elsewhere() -> None:
    class Odd(torch.nn.Module):
        def __init__(self, width: int, device: str = "cpu"):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1000, width, device=device))

    model = Odd(NUM_VALUES)
    before = hashes_of(model)
    assert before and set(before) == {"bfloat16", "float16"} and before == hashes_of(Odd(NUM_VALUES))
    assert hashes_of(Odd(2 * NUM_VALUES)) != before, "the shape counts"
    seen = torch.zeros(NUM_VALUES, dtype=torch.bool)
    for column in range(NUM_VALUES):
        with torch.no_grad():
            model.weight.zero_()[:, column] = 1
        seen[column] = hashes_of(model) != before
    assert seen.float().mean() > 0.5, "not the same few columns of every row"
    assert hashes_of(Odd(1, "meta")) is None


def test_a_stale_calibration_is_one_line_of_a_command(
    make_model: Make, learnt: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = bound(make_model("mixed", torch.float32, vocab_size=len(learnt)))
    with torch.no_grad():
        model.model.norm.weight += 0.1
    model.save_pretrained(tmp_path)
    learnt.save_pretrained(tmp_path)
    for arguments in (
        ["generate", str(tmp_path), "--prompt", "the cat", "--budget", "0.5"],
        ["evaluate", str(tmp_path), "--data", str(tmp_path / "none.txt"), "--budgets", "0.5"],
    ):
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and "was measured on other weights" in err, err
    assert main(["generate", str(tmp_path), "--prompt", "the cat", "--max_new_tokens", "2"]) == 0


def test_settings_that_are_none_are_refused(make_model: Make) -> None:
    model = make_model("mixed")
    model.config.calibration = CURVE | {"settings": {"policy": "middle_out"}}
    with pytest.raises(ValueError, match=r"calibration\['settings'\] is .*; expected a dictionary of policy, "):
        model.set_budget(0.5)


@pytest.mark.parametrize("weights", [3, "abc", {"bfloat16": 3}])
def test_hashes_that_are_none_are_refused(make_model: Make, weights: Any) -> None:
    model = make_model("mixed")
    model.config.calibration = CURVE | {"weights": weights}
    with pytest.raises(
        ValueError, match=r"calibration\['weights'\] is .*; expected hashes by name of a dtype, or None"
    ):
        model.set_budget(0.5)
