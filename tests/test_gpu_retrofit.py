"""On a GPU: skip paths give the numbers of the CPU, and a fit does too.

pytest -m gpu tests/test_gpu_retrofit.py
"""

import copy
from collections.abc import Callable

import pytest
import torch
from test_gpu import DEVICE, distance, run
from test_retrofit import to_skip, windows
from torch import Tensor, nn

from midskip import MidskipForCausalLM
from midskip.evaluate import evaluate
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
def test_a_fit(make_model: Make) -> None:
    on_cpu = to_skip(make_model)
    on_gpu = copy.deepcopy(on_cpu).to(DEVICE)
    reports = [fit(model, windows(24), num_cost_windows=2) for model in (on_cpu, on_gpu)]
    assert reports[1].error == pytest.approx(reports[0].error, rel=1e-2)
    assert evaluate(on_gpu, windows(24))["executed_share"] == pytest.approx(0.75, abs=0.08)
