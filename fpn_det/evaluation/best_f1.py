"""Find the score from which detections have the best F1, for each class and for all together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fpn_det.evaluation.curves import Curve, curve_of
from fpn_det.evaluation.matching import Matches
from fpn_det.structures import ScoreThresholds


@dataclass(frozen=True)
class OperatingPoint:
    """Counts of the detections from a score on, and what follows from them."""

    score: float  # threshold; detections of at least this score count
    hits: int
    detections: int
    objects: int

    @property
    def precision(self) -> float:
        return self.hits / max(self.detections, 1)

    @property
    def recall(self) -> float:
        return self.hits / max(self.objects, 1)

    @property
    def f1(self) -> float:
        return 2 * self.hits / max(self.detections + self.objects, 1)


def best_points(matches: Matches) -> tuple[OperatingPoint | None, list[OperatingPoint | None]]:
    """Find the operating points of best F1 at the first IoU threshold, over all areas.

    Returns:
        That of all classes with one score for all, and that of each class; None where no detection is a hit.
    """
    classes = range(matches.annotations.num_classes)
    return _best(curve_of(matches, None)), [_best(curve_of(matches, label)) for label in classes]


def as_thresholds(
    overall: OperatingPoint | None, per_class: list[OperatingPoint | None], class_names: tuple[str, ...]
) -> ScoreThresholds | None:
    """Return the scores of operating points; None if there is no hit at all."""
    if overall is None:
        return None
    points = zip(class_names, per_class, strict=True)
    return ScoreThresholds(overall.score, {name: point.score for name, point in points if point is not None})


def _best(curve: Curve) -> OperatingPoint | None:
    """Choose the score of the best F1; of equal F1 the highest."""
    if not curve.hits.any():
        return None
    best = int(np.argmax(curve.f1))
    score, below = curve.scores[best], curve.scores[min(best + 1, len(curve.scores) - 1)]
    return OperatingPoint(_between(below, score), int(curve.hits[best]), int(curve.detections[best]), curve.num_objects)


def _between(below: float, score: float) -> float:
    """Return a float32 half way between two scores, which no rounding exchanges with either; else the upper one."""
    middle = float(np.float32((below + score) / 2))
    return middle if below < middle <= score else float(score)
