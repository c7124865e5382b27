"""Per-layer statistics: against numbers of the released code, and against all values at once."""

from pathlib import Path

import numpy as np
import pytest
import torch

from midskip.layer_statistics import LayerStatistics

REFERENCE = np.load(Path(__file__).parent / "data" / "gate_metrics.npz")
NAMES = {"masks": "depth_score", "gates": "gate", "zeros": "skipped", "resid_l2_norm": "hidden_norm"}
BATCHES = [
    [torch.from_numpy(array) for array in batch]
    for batch in zip(REFERENCE["gates"], REFERENCE["soft_masks"], REFERENCE["hidden_states"], strict=True)
]


def reference_statistics() -> LayerStatistics:
    statistics = LayerStatistics()
    for gates_LBT, depth_scores_LBT, hidden_LBTD in BATCHES:
        statistics.add_gates(gates_LBT, depth_scores_LBT, hidden_LBTD)
    return statistics


def test_agrees_with_the_released_code_in_every_number() -> None:
    statistics = reference_statistics()
    numbers = [key for key in REFERENCE.files if "." in key]
    assert len(numbers) == 3 * (4 + 3 + 6 + 6 + 6)
    for key in numbers:
        quantity, moment, *layer = key.split(".")
        by_layer, overall = {
            "mean": (statistics.mean, statistics.overall_mean),
            "var": (statistics.variance, statistics.overall_variance),
            "std": (statistics.standard_deviation, statistics.overall_standard_deviation),
        }[moment]
        name = NAMES[quantity]
        got = by_layer(name)[int(layer[0].removeprefix("layer_"))] if layer else overall(name)
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
    torch.testing.assert_close(statistics.standard_deviation("x"), all_LN.std(1, correction=0))
    torch.testing.assert_close(statistics.overall_mean("x"), all_LN.mean())


def test_variance_never_rounds_below_zero() -> None:
    statistics = LayerStatistics()
    statistics.add("x", torch.full((1, 3, 7), 0.1, dtype=torch.float64))
    assert statistics.variance("x").item() >= 0
    assert statistics.standard_deviation("x").isfinite().all()


def test_only_what_is_given_is_counted() -> None:
    statistics = LayerStatistics()
    gates_LBT = torch.tensor([[[1.0, 0.0]], [[1e-9, 0.0]]], requires_grad=True)
    statistics.add_gates(gates_LBT, valid_BT=torch.tensor([[True, True]]))
    assert list(statistics.sums()) == ["gate", "skipped"]
    assert statistics.mean("skipped").tolist() == [0.5, 0.5]  # a tiny gate is not a gate of 0
    assert not statistics.mean("gate").requires_grad


def test_hidden_states_may_come_layer_by_layer() -> None:
    gates_LBT, _, hidden_LBTD = BATCHES[0]
    together, apart = LayerStatistics(), LayerStatistics()
    together.add_gates(gates_LBT, hidden_LBTD=hidden_LBTD)
    apart.add_gates(gates_LBT, hidden_LBTD=list(hidden_LBTD))
    assert torch.equal(together.mean("hidden_norm"), apart.mean("hidden_norm"))


def test_sums_of_several_add_up_to_those_of_all() -> None:
    whole, reduced = reference_statistics(), LayerStatistics()
    for gates_LBT, depth_scores_LBT, hidden_LBTD in BATCHES:
        part = LayerStatistics()
        part.add_gates(gates_LBT, depth_scores_LBT, hidden_LBTD)
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
    assert torch.equal(first.mean("gate"), reference_statistics().mean("gate"))
    assert torch.equal(second.mean("gate"), first.mean("gate"))


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
        statistics.overall_mean("x")
