"""Rank annotations that look wrong: objects that confident detections contradict, and confident detections without an object.

What contradicts an annotation is weighed by how rare that is for its class. If a detector finds 99 % of a class, an object that
it does not see is suspicious; if it finds half of it, hardly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fpn_det.evaluation.detection_table import DetectionTable
from fpn_det.evaluation.matching import Matches, find_pairs

NEAR_IOU = 0.05  # from which a detection without an object may be the true place of an unseen object
Kind = Literal["class", "place", "missing", "unseen"]


@dataclass(frozen=True)
class Suspect:
    """An annotation that may be wrong, or a place where one may be missing.

    Attributes:
        kind: class: detections of another class cover the object; place: the object of that class is beside it; missing: a
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
    found, labels = detections.take(matches.detections), matches.detection_labels
    threshold, scores = float(matches.iou_thresholds[0]), matches.scores
    rows, boxes, ious = find_pairs(matches.annotations, found, least=NEAR_IOU)
    covers = ious >= threshold
    has_object = np.zeros(len(labels), bool)
    has_object[rows[covers]] = True  # crowd regions included
    columns = matches.index_of[boxes]
    rows, columns, covers = rows[columns >= 0], columns[columns >= 0], covers[columns >= 0]
    same = labels[rows] == matches.object_labels[columns]
    count = len(matches.objects)
    support, _ = _best(scores, rows, columns, covers & same, count)
    rival, rival_at = _best(scores, rows, columns, covers & ~same, count)
    near, near_at = _best(scores, rows, columns, ~covers & same & ~has_object[rows], count)
    rarity = _rarity(support, matches.object_labels)

    suspects: list[Suspect] = []
    used = np.zeros(len(labels), bool)
    images = matches.images

    def add(kind: Kind, suspicion: float, index: int | None, detection: int | None) -> None:
        if detection is not None:
            used[detection] = True
            image, label = int(images[matches.detection_images[detection]]), int(labels[detection])
            box = found.boxes[detection]
        else:
            assert index is not None
            image, label = int(images[matches.object_images[index]]), int(matches.object_labels[index])
            box = matches.annotations.boxes[int(matches.objects[index])].numpy()
        annotation = None if index is None else int(matches.objects[index])
        suspects.append(Suspect(kind, suspicion, image, annotation, tuple(box.tolist()), label))

    for index in np.flatnonzero((support < 0.5) | (rival >= 0.5)).tolist():
        doubt = float((1 - support[index]) * rarity[index])
        if rival[index] > max(near[index], 0.5 * support[index]):
            # an object that was learned with its wrong class has detections of both
            share = float(rival[index] / (rival[index] + support[index]))
            add("class", float(rarity[index]) * share, index, int(rival_at[index]))
        elif near[index] > support[index]:
            add("place", doubt * (0.5 + 0.5 * float(near[index])), index, int(near_at[index]))
        else:
            add("unseen", doubt * 0.5, index, None)
    orphans = np.flatnonzero(~has_object & ~used & (scores >= 0.5))
    for detection in orphans.tolist():
        rate = _orphan_rate(scores, labels, ~has_object, detection)
        add("missing", float(scores[detection]) * (1 - rate) ** 2, None, detection)
    return sorted(suspects, key=lambda suspect: -suspect.suspicion)


def _best(
    scores: NDArray[np.float64], rows: NDArray, columns: NDArray, kept: NDArray[np.bool_], count: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the best score of the kept pairs of each object, 0 without one, and its detection."""
    rows, columns = rows[kept], columns[kept]
    order = np.argsort(scores[rows], kind="stable")
    best, places = np.zeros(count), np.full(count, -1)
    best[columns[order]], places[columns[order]] = scores[rows[order]], rows[order]
    return best, places


def _rarity(support: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the share of the objects of the same class that are supported better."""
    rarity = np.zeros(len(support))
    for label in np.unique(labels):
        mine = labels == label
        ordered = np.sort(support[mine])
        rarity[mine] = 1 - np.searchsorted(ordered, support[mine], side="right") / max(mine.sum(), 1)
    return rarity


def _orphan_rate(
    scores: NDArray[np.float64], labels: NDArray[np.int64], is_orphan: NDArray[np.bool_], detection: int
) -> float:
    """Return the share of other detections without an object among those of the class with at least this score."""
    peers = (labels == labels[detection]) & (scores >= scores[detection])
    return float((is_orphan[peers].sum() - 1) / peers.sum())
