"""Find the score from which detections have the best F1, for each class and for all together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fpn_det.evaluation.matching import IGNORED, Matches
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
    matched, scores = matches.matched[0, 0], matches.scores
    counted, is_hit = matched != IGNORED, matched >= 0
    per_class = []
    for label, objects in enumerate(_objects_per_class(matches)):
        rows = matches.of_class(label)
        kept = counted[rows]
        per_class.append(_best(scores[rows][kept], is_hit[rows][kept], objects))
    order = np.argsort(-scores, kind="stable")
    order = order[counted[order]]
    return _best(scores[order], is_hit[order], len(matches.objects)), per_class


def as_thresholds(
    overall: OperatingPoint | None, per_class: list[OperatingPoint | None], class_names: tuple[str, ...]
) -> ScoreThresholds | None:
    """Return the scores of operating points; None if there is no hit at all."""
    if overall is None:
        return None
    points = zip(class_names, per_class, strict=True)
    return ScoreThresholds(overall.score, {name: point.score for name, point in points if point is not None})


def _objects_per_class(matches: Matches) -> list[int]:
    return np.bincount(matches.object_labels, minlength=matches.annotations.num_classes).tolist()


def _best(scores: NDArray[np.float64], is_hit: NDArray[np.bool_], objects: int) -> OperatingPoint | None:
    """Choose among the distinct scores, given in descending order; of equal F1 the highest."""
    if not is_hit.any():
        return None
    last = np.flatnonzero(np.diff(scores, append=-np.inf))  # of each score: equal scores count together
    hits = is_hit.cumsum()[last]
    best = int(np.argmax(2 * hits / (last + 1 + objects)))
    score = scores[last[best]]
    below = scores[last[best] + 1] if last[best] + 1 < len(scores) else score
    return OperatingPoint(_between(below, score), int(hits[best]), int(last[best] + 1), objects)


def _between(below: float, score: float) -> float:
    """Return a float32 half way between two scores, which no rounding exchanges with either; else the upper one."""
    middle = float(np.float32((below + score) / 2))
    return middle if below < middle <= score else float(score)
