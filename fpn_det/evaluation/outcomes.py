"""Outcome of each detection and object at the operating point: hit, false, missed, or confused with another class.

A detection counts from the score threshold of its class on. First every detection takes an object of its own class
(`matching`), then those without one take what is left of other classes, best score first. Each object and each detection is in
one cell of the confusion matrix, so its rows sum to the objects and its columns to the detections.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fpn_det.evaluation.detection_table import DetectionTable
from fpn_det.evaluation.matching import IGNORED, NOTHING, Matches, find_pairs, take_greedily
from fpn_det.structures import ScoreThresholds

HIT, FALSE, MISSED, CONFUSED, IGNORED_KIND = range(5)
OUTCOME_NAMES = ("hit", "false", "missed", "class confused", "ignored")


@dataclass(frozen=True)
class Outcomes:
    """Detections and objects of `matches` at the operating point. Letters as in `matching`."""

    matches: Matches
    shown: NDArray[np.bool_]  # [D], from the threshold of the class on, and not on a crowd region
    object_of: NDArray[np.int64]  # [D], the object that a shown detection takes, of any class; NOTHING elsewhere

    @cached_property
    def detection_of(self) -> NDArray[np.int64]:
        """The detection that takes each object, of any class, [G]; NOTHING where there is none."""
        taken = np.full(len(self.matches.objects), NOTHING)
        taking = np.flatnonzero(self.object_of >= 0)
        taken[self.object_of[taking]] = taking
        return taken

    @cached_property
    def is_hit(self) -> NDArray[np.bool_]:
        """Detections [D] that take an object of their class."""
        return (self.object_of >= 0) & (self._label_of_object == self.matches.detection_labels)

    @cached_property
    def is_confused(self) -> NDArray[np.bool_]:
        """Detections [D] that take an object of another class."""
        return (self.object_of >= 0) & (self._label_of_object != self.matches.detection_labels)

    @cached_property
    def is_found(self) -> NDArray[np.bool_]:
        """Objects [G] taken by a detection of their class."""
        found = np.zeros(len(self.matches.objects), bool)
        found[self.object_of[self.is_hit]] = True
        return found

    @cached_property
    def detection_kinds(self) -> NDArray[np.int64]:
        """Outcome of each detection, [D]: HIT, FALSE or CONFUSED; IGNORED_KIND for those that are not shown."""
        kinds = np.where(self.is_hit, HIT, np.where(self.is_confused, CONFUSED, FALSE))
        return np.where(self.shown, kinds, IGNORED_KIND)

    @cached_property
    def object_kinds(self) -> NDArray[np.int64]:
        """Outcome of each object, [G]: HIT, CONFUSED or MISSED."""
        return np.where(self.is_found, HIT, np.where(self.detection_of == NOTHING, MISSED, CONFUSED))

    @property
    def _label_of_object(self) -> NDArray[np.int64]:
        labels = np.append(self.matches.object_labels, NOTHING)  # the last is read by index -1
        return labels[self.object_of]

    @cached_property
    def confusion(self) -> NDArray[np.int64]:
        """Counts by class of the object (rows) and of the detection (columns), i64 [K + 1, K + 1].

        The last row is background: detections without an object. The last column is missed: objects without a detection.
        """
        background = self.matches.annotations.num_classes
        matrix = np.zeros((background + 1, background + 1), np.int64)
        truth = np.where(self.object_of >= 0, self._label_of_object, background)
        np.add.at(matrix, (truth[self.shown], self.matches.detection_labels[self.shown]), 1)
        missed = self.matches.object_labels[self.detection_of == NOTHING]
        np.add.at(matrix, (missed, background), 1)
        return matrix


def find_outcomes(matches: Matches, detections: DetectionTable, thresholds: ScoreThresholds | None) -> Outcomes:
    """Find the outcomes at the first IoU threshold of `matches`, over all areas.

    Args:
        matches: of `detections`.
        detections: in the original frame.
        thresholds: scores from which detections count; None counts all.
    """
    annotations, matched = matches.annotations, matches.matched[0, 0].astype(np.int64)
    least = np.array(thresholds.of(annotations.class_names)) if thresholds else np.zeros(annotations.num_classes)
    shown = (matches.scores >= least[matches.detection_labels]) & (matched != IGNORED)
    object_of = np.where(shown, matched, NOTHING)
    free = np.ones(len(matches.objects), bool)
    free[object_of[object_of >= 0]] = False

    rows = np.flatnonzero(shown & (object_of == NOTHING))
    rows = rows[np.argsort(-matches.scores[rows], kind="stable")]
    others = detections.take(matches.detections[rows])
    found, boxes, ious = find_pairs(annotations, others, least=float(matches.iou_thresholds[0]))
    columns = matches.index_of[boxes]
    kept = columns >= 0
    kept[kept] = free[columns[kept]]
    never = np.zeros(len(matches.objects), bool)
    taken = take_greedily(
        found[kept], columns[kept], ious[kept], others.images, never, never, matches.iou_thresholds[:1]
    )
    object_of[rows] = taken[0]
    return Outcomes(matches, shown, object_of)
