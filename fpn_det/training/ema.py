"""Exponential moving average of the weights."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class EMA(Generic[M]):
    """A copy of a model whose weights are the moving average of the model's.

    The decay is `min(decay, (1 + step) / (10 + step))`, a function of the step, so that early averages forget the initial
    weights. Buffers (statistics of norms) are copied, not averaged.
    """

    def __init__(self, model: M, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"ema: expected a decay between 0 and 1, got {decay}. Use 0.999, or null for no average.")
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        pairs = list(zip(self.model.parameters(), model.parameters(), strict=True))
        self._averages: list[Tensor] = [average for average, weight in pairs if weight.requires_grad]
        self._weights: list[Tensor] = [weight for _, weight in pairs if weight.requires_grad]
        self._own_buffers = list(self.model.buffers())
        self._buffers = list(model.buffers())

    def rate(self, step: int) -> float:
        """The share of the new weights in the average after a step, 1 - decay."""
        return 1 - min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, rate: Tensor) -> None:
        """Move the average toward the weights by `rate`, a scalar on the device; 0 after a step that is skipped."""
        # three kernels for all weights; a foreach lerp with a rate on the device has a kernel for each
        changes = torch._foreach_sub(self._weights, self._averages)
        torch._foreach_mul_(changes, rate)
        torch._foreach_add_(self._averages, changes)
        if self._buffers:
            torch._foreach_copy_(self._own_buffers, self._buffers)
