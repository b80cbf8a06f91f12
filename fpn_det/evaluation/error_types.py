"""Errors of a detector by type, and the AP that repairing each would gain (Bolya et al., TIDE, ECCV 2020, section 2).

A false detection has one type, by its IoU with objects of its class and of others:

    localization    an object of its class with an IoU from BACKGROUND_IOU to the match IoU
    classification  an object of another class with at least the match IoU
    duplicate       an object of its class with at least the match IoU, which a better score has taken
    background      no object with more than BACKGROUND_IOU
    both            what is left: of another class and badly placed

An object is missed if no detection takes it, and none would after its class or box is repaired. The repair of a localization or
classification error makes a hit of the detection with the best score for that object and removes the others; that of the
other false detections removes them; that of a missed object removes the object.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fpn_det.evaluation.curves import average_precision
from fpn_det.evaluation.detection_table import DetectionTable
from fpn_det.evaluation.matching import IGNORED, NOTHING, Matches, find_pairs

BACKGROUND_IOU = 0.1
TYPES = ("classification", "localization", "both", "duplicate", "background", "missed")
CLASSIFICATION, LOCALIZATION, BOTH, DUPLICATE, BACKGROUND, MISSED = range(len(TYPES))
NO_ERROR = -1


@dataclass(frozen=True)
class Errors:
    """Type of every false detection, and the missed objects. Letters as in `matching`.

    All detections are looked at, whatever their score, as AP does.
    """

    matches: Matches
    types: NDArray[np.int64]  # [D], number in TYPES; NO_ERROR for hits and on crowd regions
    objects: NDArray[np.int64]  # [D], object that a classification or localization error concerns; NOTHING elsewhere
    becomes_hit: NDArray[np.bool_]  # [D], its repair makes a hit; others are removed
    missed: NDArray[np.bool_]  # [G]

    def repair(
        self, error: int, detections: NDArray[np.bool_] | None = None, objects: NDArray[np.bool_] | None = None
    ) -> NDArray[np.float64]:
        """Compute the AP of each class [K] after the errors of a type are repaired; NaN without objects.

        Args:
            error: number in TYPES.
            detections: [D], restricts the repair to some detections.
            objects: [G], restricts the repair to some missed objects.
        """
        matches = self.matches
        repaired = self.types == error
        if detections is not None:
            repaired &= detections
        hits = matches.matched[0, 0] >= 0
        kept = (hits | (self.types != NO_ERROR)) & ~(repaired & ~self.becomes_hit)
        labels = matches.detection_labels.copy()
        changed = repaired & self.becomes_hit
        labels[changed] = matches.object_labels[self.objects[changed]]
        gone = self.missed & (error == MISSED)
        if objects is not None:
            gone &= objects
        num_objects = np.bincount(matches.object_labels[~gone], minlength=matches.annotations.num_classes)
        return _ap_by_class(labels[kept], matches.scores[kept], (hits | changed)[kept], num_objects)

    def ap(self) -> NDArray[np.float64]:
        """Compute the AP of each class [K] as it is; NaN without objects."""
        return self.repair(NO_ERROR, np.zeros(len(self.types), bool))

    def costs(
        self, detections: NDArray[np.bool_] | None = None, objects: NDArray[np.bool_] | None = None
    ) -> NDArray[np.float64]:
        """Compute the AP that the repair of each type would gain: [6, K]; NaN for classes without objects.

        The mean over classes is the cost of a type. A class all of whose objects are missed gains nothing by their removal.
        """
        before = self.ap()
        gains = np.stack([self.repair(error, detections, objects) - before for error in range(len(TYPES))])
        return np.where(np.isnan(gains) & ~np.isnan(before), 0.0, gains)


def find_errors(matches: Matches, detections: DetectionTable) -> Errors:
    """Find the errors at the first IoU threshold of `matches`, over all areas.

    Args:
        matches: of `detections`.
        detections: in the original frame.
    """
    threshold, matched = float(matches.iou_thresholds[0]), matches.matched[0, 0]
    rows, boxes, ious = find_pairs(matches.annotations, detections.take(matches.detections), least=0.0)
    columns = matches.index_of[boxes]
    is_object = columns >= 0
    rows, columns, ious = rows[is_object], columns[is_object], ious[is_object]
    same = matches.object_labels[columns] == matches.detection_labels[rows]
    used = np.zeros(len(matches.objects), bool)
    used[matched[matched >= 0]] = True

    count = len(matches.detections)
    own, own_object = _best(rows[same], columns[same], ious[same], count)
    other, other_object = _best(rows[~same], columns[~same], ious[~same], count)
    taken, _ = _best(rows[same & used[columns]], columns[same & used[columns]], ious[same & used[columns]], count)
    types = np.select(
        [
            (matched >= 0) | (matched == IGNORED),
            (own >= BACKGROUND_IOU) & (own <= threshold),
            other >= threshold,
            taken >= threshold,
            np.maximum(own, other) <= BACKGROUND_IOU,
        ],
        [NO_ERROR, LOCALIZATION, CLASSIFICATION, DUPLICATE, BACKGROUND],
        BOTH,
    )
    objects = np.select([types == LOCALIZATION, types == CLASSIFICATION], [own_object, other_object], NOTHING)
    becomes_hit = np.zeros(count, bool)
    claims = np.flatnonzero(objects >= 0)
    claims = claims[~used[objects[claims]]]
    claims = claims[np.argsort(-matches.scores[claims], kind="stable")]
    claimed, first = np.unique(objects[claims], return_index=True)
    becomes_hit[claims[first]] = True
    missed = ~used
    missed[claimed] = False
    return Errors(matches, types, objects, becomes_hit, missed)


def _best(
    rows: NDArray[np.int64], columns: NDArray[np.int64], ious: NDArray[np.float64], count: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the highest IoU of each detection [D], 0 without a pair, and its object; of equal ones the first."""
    best, objects = np.zeros(count), np.full(count, NOTHING)
    order = np.lexsort((-columns, ious, rows))  # the last of a row has the highest IoU
    best[rows[order]], objects[rows[order]] = ious[order], columns[order]
    return best, objects


def _ap_by_class(
    labels: NDArray[np.int64], scores: NDArray[np.float64], is_hit: NDArray[np.bool_], num_objects: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Compute the AP of each class at one IoU threshold [K], from detections [D] in any order; NaN without objects."""
    order = np.lexsort((-scores, labels))
    labels, is_hit = labels[order], is_hit[order]
    bounds = np.searchsorted(labels, np.arange(len(num_objects) + 1))
    result = np.full(len(num_objects), np.nan)
    for label in np.flatnonzero(num_objects).tolist():
        places = np.flatnonzero(is_hit[bounds[label] : bounds[label + 1]])[None]
        hits = np.arange(1.0, places.shape[1] + 1)[None]
        counted = (places + 1).astype(np.float64)
        result[label] = average_precision(hits, counted, num_objects[label : label + 1].astype(np.float64))[0]
    return result
