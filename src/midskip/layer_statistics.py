"""Per-layer statistics of gates and hidden states, in one pass over the batches of a step or an evaluation.

Letters in tensor names: L layers, B sequences, T positions; 3 is (count, sum, sum of squares).
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def valid_of(values_LBT: Tensor, valid_BT: Tensor | None) -> Tensor:
    """`valid_BT`, or True everywhere for None. ValueError unless it is torch.bool [B, T] of the values."""
    shape_BT = values_LBT.shape[1:]
    if valid_BT is None:
        return torch.ones(shape_BT, dtype=torch.bool, device=values_LBT.device)
    if valid_BT.dtype != torch.bool or valid_BT.shape != shape_BT:
        raise ValueError(
            f"valid must be torch.bool {list(shape_BT)}, to go with values {list(values_LBT.shape)}, "
            f"got {valid_BT.dtype} {list(valid_BT.shape)}"
        )
    return valid_BT


class LayerStatistics:
    """Mean and population variance, by layer, of named quantities that each valid token has at each layer.

    Holds three float64 sums for each layer, so that batches and ranks of unequal size weigh by their tokens;
    the variance is E[x^2] - E[x]^2. Over ranks: add up the tensors of `sums()`, in the same order on each
    rank, and give the result to `add_sums` of a new object.
    """

    def __init__(self) -> None:
        self._sums_3L: dict[str, Tensor] = {}

    def add(self, name: str, values_LBT: Tensor, valid_BT: Tensor | None = None) -> None:
        """Counts in one batch of a quantity; no gradient is kept.

        Args:
            name: the quantity; it has the same number of layers every time.
            values_LBT: real or bool [L, B, T].
            valid_BT: bool [B, T], true where there is a token; None for everywhere. Other values may be
                anything.

        Raises:
            ValueError: another shape or dtype.
        """
        if values_LBT.dim() != 3:
            raise ValueError(f"{name!r} must be [layers, sequences, positions], got {list(values_LBT.shape)}")
        valid_BT = valid_of(values_LBT, valid_BT)
        values_LBT = values_LBT.detach().double().where(valid_BT, 0.0)
        count_L = valid_BT.sum().double().expand(len(values_LBT))
        sums_3L = torch.stack([count_L, values_LBT.sum((1, 2)), values_LBT.square().sum((1, 2))])
        self.add_sums({name: sums_3L})

    def sums(self) -> dict[str, Tensor]:
        """A copy of the sums: float64 [3, L] by name, in the order in which the names first came."""
        return {name: sums_3L.clone() for name, sums_3L in self._sums_3L.items()}

    def add_sums(self, sums: Mapping[str, Tensor]) -> None:
        """Adds the `sums()` of another object. ValueError, with nothing added, if a shape is another."""
        for name, sums_3L in sums.items():
            shape = list(self._sums_3L[name].shape) if name in self._sums_3L else [3, *sums_3L.shape[1:2]]
            if sums_3L.dim() != 2 or list(sums_3L.shape) != shape:
                raise ValueError(f"sums of {name!r} must be {shape} (3, layers), got {list(sums_3L.shape)}")
        for name, sums_3L in sums.items():
            self._sums_3L[name] = sums_3L.double() + self._sums_3L.get(name, 0.0)

    def mean(self, name: str) -> Tensor:
        """Mean by layer, float64 [L]. ValueError if no valid token has come under that name."""
        return self._moments(name)[0]

    def variance(self, name: str) -> Tensor:
        """Population variance by layer, float64 [L]. ValueError as for `mean`."""
        mean_L, mean_square_L = self._moments(name)
        return (mean_square_L - mean_L.square()).clamp(min=0)  # the difference of equals may round to below 0

    def _moments(self, name: str) -> tuple[Tensor, Tensor]:
        if name not in self._sums_3L:
            raise ValueError(f"nothing was added as {name!r}; there is: {', '.join(self._sums_3L) or 'nothing'}")
        count_L, sum_L, sum_squares_L = self._sums_3L[name]
        if not bool(count_L.all()):
            raise ValueError(f"{name!r} has no valid token yet, so it has no mean")
        return sum_L / count_L, sum_squares_L / count_L
