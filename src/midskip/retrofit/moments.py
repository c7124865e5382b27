"""Ridge regression from sums over tokens, so that any number of them takes the same memory.

N tokens, D features in, K out.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Sums from which outputs [N, K] are regressed on features [N, D] and a constant.

    Attributes:
        num_tokens: added so far.
    """

    def __init__(self, width: int, num_outputs: int):
        self.gram = torch.zeros(width + 1, width + 1, dtype=torch.float64)
        self.cross = torch.zeros(width + 1, num_outputs, dtype=torch.float64)
        self.num_tokens, self.squares = 0, torch.zeros(num_outputs, dtype=torch.float64)

    def add(self, z_ND: Tensor, y_NK: Tensor) -> None:
        """Floating point, on any device; sums are kept in float64 on the CPU."""
        z_ND, y_NK = z_ND.float(), y_NK.float()
        z_NE = torch.cat([z_ND, z_ND.new_ones(len(z_ND), 1)], 1)
        self.gram += (z_NE.T @ z_NE).double().cpu()
        self.cross += (z_NE.T @ y_NK).double().cpu()
        self.squares += y_NK.square().sum(0).double().cpu()
        self.num_tokens += len(z_ND)

    def solve(self, ridge: float, of_all: Moments | None = None) -> tuple[Tensor, Tensor]:
        """Weights [K, D] and constants [K], float64, of least squares with `ridge` times the sum of squares of each
        feature as its penalty; of those in `of_all`, if it is given, so that few tokens change little."""
        penalty = (of_all or self).gram.diagonal().clamp(min=torch.finfo(torch.float64).tiny)
        solved_EK = torch.linalg.solve(self.gram + torch.diag(ridge * penalty), self.cross)
        return solved_EK[:-1].T, solved_EK[-1]

    def explained(self, weight_KD: Tensor, constant_K: Tensor) -> Tensor:
        """float64 [K], the share of the outputs' variance that this linear function explains (R squared)."""
        solved_EK = torch.cat([weight_KD.T, constant_K[None]])
        fitted_K = (solved_EK * (2 * self.cross - self.gram @ solved_EK)).sum(0)
        mean_K = self.cross[-1] / max(1, self.num_tokens)
        left_K = self.squares - fitted_K
        return 1 - left_K / (self.squares - self.num_tokens * mean_K.square()).clamp(min=1e-30)
