"""On a GPU: skip paths give the numbers of the CPU, and a fit does too.

pytest -m gpu tests/test_gpu_retrofit.py
"""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_gpu import DEVICE, distance, run
from test_retrofit import dense, settings_of  # noqa: F401
from test_retrofit_fit import to_skip, windows
from tiny_runs import QUIET
from torch import Tensor, nn

from midskip import MidskipForCausalLM
from midskip.evaluate import evaluate
from midskip.retrofit import retrofit
from midskip.retrofit.fit import fit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.filterwarnings("default"),
]
Make = Callable[..., MidskipForCausalLM]


@pytest.mark.parametrize("skip_path", ["linear", "adapter"])
def test_skip_paths(make_model: Make, ragged: tuple[Tensor, Tensor], skip_path: str) -> None:
    model = make_model(gates="mixed", skip_path=skip_path)
    for parameter in model.model.skip_paths.parameters():
        nn.init.normal_(parameter, std=0.3)
    batch = {"input_ids": ragged[0], "attention_mask": ragged[1]}
    expected, expected_gradients = run(model, batch)
    got, gradients = run(copy.deepcopy(model).to(DEVICE), batch)
    assert distance(got, expected) < 1e-9 and distance(gradients, expected_gradients) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("policy", ["independent", "middle_out", "early_exit"])
def test_a_fit(make_model: Make, policy: str) -> None:
    on_cpu = to_skip(make_model, policy)
    on_gpu = copy.deepcopy(on_cpu).to(DEVICE)
    reports = [fit(model, windows(200), num_cost_windows=2, batch_size=24) for model in (on_cpu, on_gpu)]
    assert reports[1].error == pytest.approx(reports[0].error, rel=1e-2)
    assert evaluate(on_gpu, windows(24))["executed_share"] == pytest.approx(0.75, abs=0.08)


@pytest.mark.parametrize("finetune", ["lora", "all"])
def test_all_stages(dense: Path, finetune: str) -> None:  # noqa: F811
    """On the device that `midskip retrofit` takes, the GPU."""
    steps: dict[str, int] = {"distil_steps": 4, "finetune_steps": 4}
    report = retrofit(settings_of(dense, choice="spans", finetune=finetune, learning_rate=3e-3, **steps), QUIET)
    assert list(report["stages"]) == ["fit", "distil", "finetune"]
    assert all(math.isfinite(row[0]) for row in report["stages"]["finetune"]["history"])
