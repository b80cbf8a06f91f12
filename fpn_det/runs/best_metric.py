"""Best value of a metric, and the number of evaluations without progress for early stopping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass
class BestMetric:
    """Track the best value of one metric. Larger is better, except for `loss`; None (undefined) is worse than any value.

    The fields are stored in checkpoints.
    """

    metric: str
    value: float | None = None  # best value
    step: int = 0  # of the best value; 0 before the first evaluation
    mark: float | None = None  # value that an evaluation must exceed by min_delta to count as progress
    misses: int = 0  # evaluations since the last progress

    def update(self, step: int, metrics: Mapping[str, float | None], min_delta: float = 0.0) -> bool:
        """Record an evaluation and return whether it is the best so far.

        Args:
            step: of the evaluation.
            metrics: must contain `self.metric`.
            min_delta: improvement over `mark` that counts as progress.
        """
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
