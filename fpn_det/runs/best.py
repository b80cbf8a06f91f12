"""The best evaluation so far, and when to give up hope of a better one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass
class Best:
    """Keeps score by one metric: larger is better (of the loss smaller), and anything is better than undefined (None).

    Its fields are the state that a checkpoint holds.
    """

    metric: str
    value: float | None = None
    # 0 before the first evaluation
    step: int = 0
    # what the next evaluations must exceed to count as progress
    mark: float | None = None
    # evaluations since the last progress
    misses: int = 0

    def update(self, step: int, metrics: Mapping[str, float | None], min_delta: float = 0.0) -> bool:
        """Note an evaluation; progress is more than `min_delta` better than the last. Returns whether it is the best one."""
        value = metrics[self.metric]
        if value is not None and (self.mark is None or self._gain(value, self.mark) > min_delta):
            self.mark, self.misses = value, 0
        else:
            self.misses += 1
        is_best = self.step == 0 or (value is not None and (self.value is None or self._gain(value, self.value) > 0))
        if is_best:
            self.value, self.step = value, step
        return is_best

    def _gain(self, value: float, other: float) -> float:
        return other - value if self.metric == "loss" else value - other
