"""Per-layer statistics: against numbers of the released code, and against all values at once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from midskip.layer_statistics import LayerStatistics

REFERENCE = np.load(Path(__file__).parent / "data" / "gate_metrics.npz")
BATCHES = [
    [torch.from_numpy(array) for array in batch]
    for batch in zip(REFERENCE["gates"], REFERENCE["soft_masks"], REFERENCE["hidden_states"], strict=True)
]


def reference_statistics() -> LayerStatistics:
    statistics = LayerStatistics()
    for batch in BATCHES:
        add(statistics, *batch)
    return statistics


def add(statistics: LayerStatistics, gates_LBT: Tensor, depth_scores_LBT: Tensor, hidden_LBTD: Tensor) -> None:
    """What the released code measures, by its names."""
    statistics.add("masks", depth_scores_LBT)
    statistics.add("gates", gates_LBT)
    statistics.add("zeros", gates_LBT == 0)
    statistics.add("resid_l2_norm", torch.linalg.vector_norm(hidden_LBTD, dim=-1))


def test_agrees_with_the_released_code_in_every_number() -> None:
    statistics = reference_statistics()
    numbers = [key for key in REFERENCE.files if "." in key]
    assert len(numbers) == 3 * (4 + 3 + 6 + 6 + 6)
    for key in numbers:
        quantity, moment, *layer = key.split(".")
        by_layer = statistics.mean(quantity) if moment == "mean" else statistics.variance(quantity)
        by_layer = by_layer.sqrt() if moment == "std" else by_layer
        got = by_layer[int(layer[0].removeprefix("layer_"))] if layer else by_layer.mean()
        assert got.dtype == torch.float64
        assert got.item() == pytest.approx(REFERENCE[key].item(), abs=1e-5), key


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 7), (5, 7, 63)])
def test_batches_of_unequal_size_weigh_by_their_valid_tokens(shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    statistics = LayerStatistics()
    kept: list[torch.Tensor] = []
    for extra in (0, 1, 6):
        values_LBT = torch.randn(shape[0], shape[1] + extra, shape[2], generator=generator)
        valid_BT = torch.rand(values_LBT.shape[1:], generator=generator) < 0.7
        valid_BT[0, 0] = True
        kept.append(values_LBT[:, valid_BT].double())
        statistics.add("x", values_LBT.where(valid_BT, torch.nan), valid_BT)
    all_LN = torch.cat(kept, 1)
    torch.testing.assert_close(statistics.mean("x"), all_LN.mean(1))
    torch.testing.assert_close(statistics.variance("x"), all_LN.var(1, correction=0))


def test_variance_never_rounds_below_zero() -> None:
    statistics = LayerStatistics()
    statistics.add("x", torch.full((1, 3, 7), 0.1, dtype=torch.float64))
    assert statistics.variance("x").item() >= 0


def test_no_gradient_is_kept() -> None:
    statistics = LayerStatistics()
    statistics.add("x", torch.ones(2, 1, 3, requires_grad=True))
    assert not statistics.mean("x").requires_grad


def test_sums_of_several_add_up_to_those_of_all() -> None:
    whole, reduced = reference_statistics(), LayerStatistics()
    for batch in BATCHES:
        part = LayerStatistics()
        add(part, *batch)
        reduced.add_sums(part.sums())
    for name, sums_3L in whole.sums().items():
        assert sums_3L.dtype == torch.float64 and sums_3L.shape[0] == 3
        torch.testing.assert_close(reduced.sums()[name], sums_3L)
        assert torch.equal(sums_3L[0], torch.full_like(sums_3L[0], 3 * 2 * 5))


def test_sums_are_copies() -> None:
    first, second = reference_statistics(), LayerStatistics()
    sums = first.sums()
    second.add_sums(sums)
    for sums_3L in sums.values():
        sums_3L.zero_()
    assert torch.equal(first.mean("gates"), reference_statistics().mean("gates"))
    assert torch.equal(second.mean("gates"), first.mean("gates"))


def test_what_cannot_be_added_is_refused() -> None:
    statistics = LayerStatistics()
    statistics.add("x", torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match=r"'x' must be \[layers, sequences, positions\], got \[3, 4\]"):
        statistics.add("x", torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"sums of 'x' must be \[3, 2\] .* got \[3, 5\]"):
        statistics.add("x", torch.ones(5, 3, 4))
    for wrong in (torch.ones(3, 4), torch.ones(4, 3).bool()):
        with pytest.raises(ValueError, match=r"valid must be torch.bool \[3, 4\].* got"):
            statistics.add("x", torch.ones(2, 3, 4), wrong)
    before = statistics.sums()
    for wrong in (torch.ones(3), torch.ones(2, 2), torch.ones(3, 2, 1)):
        with pytest.raises(ValueError, match=r"sums of 'y' must be .* got"):
            statistics.add_sums({"x": before["x"], "y": wrong})
    assert torch.equal(statistics.sums()["x"], before["x"])


def test_a_mean_of_nothing_is_refused() -> None:
    statistics = LayerStatistics()
    with pytest.raises(ValueError, match="nothing was added as 'x'; there is: nothing"):
        statistics.mean("x")
    statistics.add("x", torch.ones(2, 1, 3), torch.zeros(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="nothing was added as 'y'; there is: x"):
        statistics.variance("y")
    with pytest.raises(ValueError, match="'x' has no valid token yet"):
        statistics.mean("x")
