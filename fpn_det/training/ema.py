"""The exponential moving average of the weights, which is often better than the weights themselves."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class EMA(Generic[M]):
    """A second model whose weights follow the first one's slowly, in place.

    The decay is `min(decay, (1 + step) / (10 + step))`: a pure function of the step that lets a young average forget the
    random start. Buffers (the statistics of norms) are copied, not averaged.
    """

    def __init__(self, model: M, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"ema: expected a decay between 0 and 1, got {decay}. Take 0.999, or null for no average.")
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        pairs = list(zip(self.model.parameters(), model.parameters(), strict=True))
        self._averages: list[Tensor] = [average for average, weight in pairs if weight.requires_grad]
        self._weights: list[Tensor] = [weight for _, weight in pairs if weight.requires_grad]
        self._own_buffers = list(self.model.buffers())
        self._buffers = list(model.buffers())

    @torch.no_grad()
    def update(self, step: int, good: Tensor) -> None:
        """Move towards the weights, unless `good` (a bool on the device) says that this step does not count."""
        decay = min(self.decay, (1 + step) / (10 + step))
        rates: list[Tensor] = [(1 - decay) * good] * len(self._weights)
        torch._foreach_lerp_(self._averages, self._weights, rates)
        if self._buffers:
            torch._foreach_copy_(self._own_buffers, self._buffers)
