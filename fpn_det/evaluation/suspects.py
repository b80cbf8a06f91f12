"""Rank annotations that look wrong, by what confident detections say against them.

A detector disagrees with sound annotations too. So the events of each kind and class are compared with the detections of that
class that are right. Let `right` be the number of objects that are found with at least the strength of an event, and `events`
the number of events at least as strong. If every annotation had the same chance of an error, the errors among the events would be
proportional to `right`, so right / events ranks events of all kinds and classes on one scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fpn_det.evaluation.detection_table import DetectionTable
from fpn_det.evaluation.matching import NOTHING, Matches, find_pairs, take_greedily

CONFIDENT = 0.5  # score from which a detection contradicts an annotation
Kind = Literal["class", "place", "missing", "unseen"]


@dataclass(frozen=True)
class Suspect:
    """An annotation that may be wrong, or a place where one may be missing.

    Attributes:
        kind: class: a detection of another class covers the object; place: an object of its class is beside it; missing: a
            detection without an object; unseen: no detection covers the object.
        suspicion: right / (right + events), in [0, 1]; the list is sorted by it.
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
    rivals, contradicted = take(is_rival & (scores[rows] >= CONFIDENT) & (scores[rows] > support[objects] / 2))
    alone = support < CONFIDENT
    alone[contradicted] = False
    places, moved = take(same & alone[objects] & is_orphan[rows])
    alone[moved] = False
    unseen = np.flatnonzero(alone)
    is_orphan[places] = False
    missing = np.flatnonzero(is_orphan)
    proposed = found.images, found.labels, found.boxes
    annotated_boxes = matches.annotations.boxes.numpy()[matches.objects]
    annotated = matches.images[matches.object_images], object_labels, annotated_boxes
    lead = scores[rivals] - support[contradicted]
    events: tuple[tuple[Kind, tuple[NDArray, ...], NDArray, NDArray, NDArray, NDArray], ...] = (
        # where, and which of them; annotations in doubt; strength of the events, and with which objects are found
        ("class", proposed, rivals, matches.objects[contradicted], lead, support - rival),
        ("place", proposed, places, matches.objects[moved], scores[places], support),
        ("missing", proposed, missing, np.full(len(missing), NOTHING), scores[missing], support),
        ("unseen", annotated, unseen, matches.objects[unseen], -support[unseen], np.zeros(count)),
    )
    suspects: list[Suspect] = []
    for kind, where, which, doubted, strengths, right in events:
        images, labels, corners = (column[which] for column in where)
        suspicions = _suspicions(labels, strengths, object_labels, right)
        columns = (suspicions, images, doubted, corners, labels)
        suspects += [
            Suspect(kind, suspicion, image, None if annotation == NOTHING else annotation, tuple(box), label)
            for suspicion, image, annotation, box, label in zip(*(column.tolist() for column in columns), strict=True)
        ]
    return sorted(suspects, key=lambda suspect: -suspect.suspicion)


def _suspicions(
    labels: NDArray[np.int64],
    strengths: NDArray[np.float64],
    object_labels: NDArray[np.int64],
    right: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return right / (right + events) for each event of one kind [n].

    One is added to `right`, because no event is beyond doubt. A stronger event is no less suspicious than a weaker one.

    Args:
        labels, strengths: of the events, [n].
        object_labels: [G]
        right: strength with which each object is found, [G].
    """
    suspicions = np.zeros(len(labels))
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        mine = mine[np.argsort(strengths[mine], kind="stable")]
        events = _count_from(strengths[mine], strengths[mine])
        found = _count_from(right[object_labels == label], strengths[mine]) + 1
        suspicions[mine] = np.maximum.accumulate(found / (found + events))
    return suspicions


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
