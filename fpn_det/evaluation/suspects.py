"""Rank annotations that look wrong, by what detections say against them.

Suspicion is a product of two numbers. The first is how sure the detector is: the score of its detection, or the share of one class
against the other. The second compares with sound annotations, which are contradicted too: right / (right + events), where `events` is
the number of contradictions of this kind and class that are at least as strong, and `right` the number of objects of the class that
are found with at least this strength. If every annotation had the same chance of an error, the errors among the events would be
proportional to `right`. So kinds and classes are on one scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fpn_det.evaluation.detection_table import DetectionTable
from fpn_det.evaluation.matching import NOTHING, Matches, find_pairs, take_greedily

CONFIDENT = 0.5  # score from which a detection without an object is suspicious
UNSEEN = 0.1  # score below which detections of an object do not count: its annotation may belong elsewhere
Kind = Literal["class", "place", "missing", "unseen"]


@dataclass(frozen=True)
class Suspect:
    """An annotation that may be wrong, or a place where one may be missing.

    Attributes:
        kind: class: a detection of another class covers the object; place: an object of its class is beside it; missing: a
            detection without an object; unseen: no detection covers the object.
        suspicion: in [0, 1]; the list is sorted by it.
        image: row of Annotations.
        annotation: row of `Annotations.boxes`; None for a missing one.
        box: that a detection proposes, or of the annotation if it is unseen; xyxy, original frame.
        label: class of that box.
    """

    kind: Kind
    suspicion: float
    image: int
    annotation: int | None
    box: tuple[float, ...]
    label: int


def find_suspects(matches: Matches, detections: DetectionTable) -> list[Suspect]:
    """Rank the suspects of an evaluation, the most suspicious first. Each object and each detection occurs once."""
    order = np.argsort(-matches.scores, kind="stable")
    found, scores = detections.take(matches.detections[order]), matches.scores[order]
    is_free = matches.matched[0, 0, order] == NOTHING
    object_labels, count = matches.object_labels, len(matches.objects)
    rows, boxes, ious = find_pairs(matches.annotations, found, least=0.0)
    covers = ious >= float(matches.iou_thresholds[0])
    is_orphan = scores >= CONFIDENT
    is_orphan[rows[covers]] = False  # crowd regions included
    is_object = matches.index_of[boxes] >= 0
    rows, objects = rows[is_object], matches.index_of[boxes[is_object]]
    ious, covers = ious[is_object], covers[is_object]
    same = found.labels[rows] == object_labels[objects]
    support = _best(scores[rows], objects, covers & same, count)
    # the detection of another object says nothing about this one
    is_rival = covers & ~same & is_free[rows]
    rival = _best(scores[rows], objects, is_rival, count)

    def take(pairs: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Let each detection take the object of highest IoU that is free. Returns detections and objects, [n] each."""
        never = np.zeros(count, bool)
        taken = take_greedily(rows[pairs], objects[pairs], ious[pairs], found.images, never, never, np.zeros(1))[0]
        taking = np.flatnonzero(taken != NOTHING)
        return taking, taken[taking]

    # an object that was learned with its wrong class has detections of both
    rivals, contradicted = take(is_rival & (scores[rows] > support[objects] / 2))
    alone = support < CONFIDENT
    alone[contradicted] = False
    places, moved = take(same & is_orphan[rows] & alone[objects] & (support[objects] < UNSEEN))
    alone[moved] = False
    unseen = np.flatnonzero(alone)
    is_orphan[places] = False
    missing = np.flatnonzero(is_orphan)

    proposed = found.images, found.labels, found.boxes
    annotated_boxes = matches.annotations.boxes.numpy()[matches.objects]
    annotated = matches.images[matches.object_images], object_labels, annotated_boxes
    against, own, near = scores[rivals], support[contradicted], scores[places]
    of_class = against / (against + own)
    # a moved box explains both the detection and the annotation without one, of which there are few
    of_place = near / (near + (1 - near) * _share_by_class(support < UNSEEN, object_labels)[found.labels[places]])
    of_nothing = (1 - support[unseen]) / 2  # no detection says less than a detection
    doubted, new, always = matches.objects, np.full(len(missing), NOTHING), np.zeros(count)
    signs = (
        _Signs("class", proposed, rivals, doubted[contradicted], of_class, against - own, support - rival),
        _Signs("place", proposed, places, doubted[moved], of_place, near, support),
        _Signs("missing", proposed, missing, new, scores[missing], scores[missing], support),
        _Signs("unseen", annotated, unseen, doubted[unseen], of_nothing, -support[unseen], always),
    )
    suspects = [suspect for one in signs for suspect in one.suspects(object_labels)]
    return sorted(suspects, key=lambda suspect: -suspect.suspicion)


@dataclass(frozen=True)
class _Signs:
    """Contradictions [n] of one kind."""

    kind: Kind
    places: tuple[NDArray[np.int64], NDArray[np.int64], NDArray]  # images, labels and boxes, of which ...
    rows: NDArray[np.int64]  # [n] ... these are contradicted
    doubted: NDArray[np.int64]  # [n], rows of Annotations.boxes; NOTHING for a missing annotation
    certainty: NDArray[np.float64]  # [n], of the detector, in [0, 1]
    strengths: NDArray[np.float64]  # [n]
    right: NDArray[np.float64]  # [G], strength with which objects are found

    def suspects(self, object_labels: NDArray[np.int64]) -> Iterator[Suspect]:
        """Yield the suspects, given the labels of all objects [G]."""
        images, labels, boxes = (column[self.rows] for column in self.places)
        suspicion = self.certainty.copy()
        for label in np.unique(labels):
            mine = np.flatnonzero(labels == label)
            mine = mine[np.argsort(self.strengths[mine], kind="stable")]
            events = _count_from(self.strengths[mine], self.strengths[mine])
            # one more, because no contradiction is beyond doubt
            right = _count_from(self.right[object_labels == label], self.strengths[mine]) + 1
            # a stronger one is no less suspicious than a weaker one
            suspicion[mine] *= np.maximum.accumulate(right / (right + events))
        columns = (suspicion, images, self.doubted, boxes, labels)
        for value, image, annotation, box, label in zip(*(column.tolist() for column in columns), strict=True):
            yield Suspect(self.kind, value, image, None if annotation == NOTHING else annotation, tuple(box), label)


def _share_by_class(chosen: NDArray[np.bool_], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the share of each class [K] that is chosen [G]; 0 without objects."""
    counts = np.bincount(labels)
    return np.bincount(labels, weights=chosen) / np.maximum(counts, 1)


def _count_from(values: NDArray[np.float64], least: NDArray[np.float64]) -> NDArray[np.int64]:
    """Count the values that are at least as large as each of `least`."""
    return len(values) - np.searchsorted(np.sort(values), least)


def _best(
    scores: NDArray[np.float64], columns: NDArray[np.int64], kept: NDArray[np.bool_], count: int
) -> NDArray[np.float64]:
    """Return the best score of the kept pairs of each object [count], 0 without one."""
    best = np.zeros(count)
    np.maximum.at(best, columns[kept], scores[kept])
    return best
