"""Match detections with objects as COCO does: the one matcher behind all counts, curves and intervals.

In each image and class, detections take objects in the order of their scores: each the free object of highest IoU, if that is
at least the threshold. So the matches of the detections above a score do not depend on those below. Crowd regions, and objects
outside of an area range, are taken only where nothing else is; such a detection is ignored, neither a hit nor false.

Letters: T IoU thresholds, E area ranges (all areas first), G objects, D detections.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fpn_det.evaluation.config import EvaluationConfig
from fpn_det.evaluation.detection_table import DetectionTable, xyxy_to_xywh
from fpn_det.evaluation.engines import ANY_AREA
from fpn_det.structures import Annotations

NOTHING, IGNORED = -1, -2  # in place of the index of an object
MAX_PAIRS = 4_000_000  # of a detection and an object, held at once


@dataclass(frozen=True)
class Matches:
    """Objects and detections of the evaluated images, and which of them belong together.

    Objects exclude crowd regions. Detections are limited per image and class, and sorted by class, then by descending score;
    equal scores are in COCO's order.
    """

    annotations: Annotations
    iou_thresholds: NDArray[np.float64]  # [T]
    images: NDArray[np.int64]  # evaluated rows of Annotations
    objects: NDArray[np.int64]  # [G], rows of Annotations.boxes
    object_images: NDArray[np.int64]  # [G], positions in `images`
    object_labels: NDArray[np.int64]  # [G]
    object_in_area: NDArray[np.bool_]  # [E, G]
    detections: NDArray[np.int64]  # [D], rows of the DetectionTable
    detection_images: NDArray[np.int64]  # [D], positions in `images`
    detection_labels: NDArray[np.int64]  # [D]
    detection_in_area: NDArray[np.bool_]  # [E, D]
    scores: NDArray[np.float64]  # [D]
    ranks: NDArray[np.int64]  # [D], position by score within its image and class
    matched: NDArray[np.int32]  # [E, T, D], index of the object, NOTHING or IGNORED

    @cached_property
    def index_of(self) -> NDArray[np.int64]:
        """Index among the objects of each row of `Annotations.boxes`, [T]; NOTHING for crowd regions and other images."""
        index = np.full(len(self.annotations.boxes), NOTHING)
        index[self.objects] = np.arange(len(self.objects))
        return index

    def of_class(self, label: int) -> slice:
        """Return the detections of one class."""
        return slice(*np.searchsorted(self.detection_labels, [label, label + 1]).tolist())


def match_detections(
    annotations: Annotations,
    detections: DetectionTable,
    images: NDArray[np.int64],
    config: EvaluationConfig,
    iou_thresholds: NDArray[np.float64],
    by_area: bool = False,
) -> Matches:
    """Match the detections of each class with its objects.

    Args:
        annotations: the ground truth.
        detections: in the original frame. Those of images not in `images` are ignored.
        images: rows of `annotations` that were evaluated.
        config: limit of detections per image and class, and area ranges.
        iou_thresholds: [T], in [0, 1].
        by_area: also match for each area range; otherwise E is 1.
    """
    position = np.full(len(annotations), -1)
    position[images] = np.arange(len(images))
    order, ranks = _order(annotations, detections, position, config.max_dets[-1])
    table = detections.take(order)
    areas = np.array([ANY_AREA, *(config.area_ranges.values() if by_area else ())], np.float64)
    owners, crowd = annotations.image_of_boxes.numpy(), annotations.iscrowd.numpy()
    objects = np.flatnonzero((position[owners] >= 0) & ~crowd)
    index_of = np.full(len(owners), IGNORED, np.int32)  # of the row of a box
    index_of[objects] = np.arange(len(objects))

    pairs = find_pairs(annotations, table, least=float(iou_thresholds.min(initial=1.0)), same_class=True)
    rows, columns, ious = pairs
    groups = table.images * annotations.num_classes + table.labels
    object_area, sides = annotations.area.numpy(), xyxy_to_xywh(table.boxes)[:, 2:]
    in_area = _in_areas(object_area, areas)
    matched = np.empty((len(areas), len(iou_thresholds), len(table)), np.int32)
    for area, inside in enumerate(in_area):
        ignored = crowd | ~inside
        boxes = take_greedily(rows, columns, ious, groups, ignored, crowd, iou_thresholds)
        found = np.where(ignored, IGNORED, index_of)[boxes] if len(owners) else boxes
        matched[area] = np.where(boxes >= 0, found, NOTHING)
    return Matches(
        annotations,
        iou_thresholds,
        images,
        objects,
        position[owners[objects]],
        annotations.labels.numpy()[objects],
        in_area[:, objects],
        order,
        position[table.images],
        table.labels,
        _in_areas(sides.prod(axis=1), areas),
        table.scores.astype(np.float64),
        ranks,
        matched,
    )


def _order(
    annotations: Annotations, detections: DetectionTable, position: NDArray[np.int64], limit: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return rows of the evaluated detections, by class and descending score, and their ranks within image and class."""
    rows = np.flatnonzero(position[detections.images] >= 0)
    images, labels, scores = detections.images[rows], detections.labels[rows], detections.scores[rows]
    by_group = np.lexsort((-scores, images, labels))
    group = labels[by_group] * len(position) + images[by_group]
    ranks = np.empty(len(rows), np.int64)
    ranks[by_group] = np.arange(len(rows)) - np.searchsorted(group, group)
    # of equal scores, the image of the smallest id is first
    image_order = np.unique(annotations.image_ids.numpy(), return_inverse=True)[1]
    order = np.lexsort((ranks, image_order[images], -scores, labels))
    order = order[ranks[order] < limit]
    return rows[order], ranks[order]


def _in_areas(area: NDArray[np.float64], bounds: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Compare areas [n] with bounds [E, 2], both included: bool [E, n]."""
    return (area >= bounds[:, :1]) & (area <= bounds[:, 1:])


def find_pairs(
    annotations: Annotations, detections: DetectionTable, least: float, same_class: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Find detections and boxes of the same image that overlap.

    Returns:
        Rows of the detections [P], rows of `Annotations.boxes` [P], crowd regions included, and their IoU [P], computed as
        COCO does: that with a crowd region is relative to the area of the detection.

    Args:
        annotations: the ground truth.
        detections: in the original frame.
        least: smallest IoU of a pair; pairs without a common area are left out.
        same_class: only boxes of the detection's class.
    """
    parts = list(_pairs_in_parts(annotations, detections, least, same_class))
    no_pairs = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    rows, columns, ious = (np.concatenate(part) for part in zip(no_pairs, *parts, strict=True))
    return rows, columns, ious


def _pairs_in_parts(
    annotations: Annotations, detections: DetectionTable, least: float, same_class: bool
) -> Iterator[tuple[NDArray, NDArray, NDArray]]:
    """Yield the pairs of consecutive detections, so that MAX_PAIRS are compared at once."""
    starts = annotations.offsets.numpy()[detections.images]
    counts = annotations.boxes_per_image.numpy()[detections.images]
    found, truth = xyxy_to_xywh(detections.boxes), xyxy_to_xywh(annotations.boxes.numpy())
    labels, crowd = annotations.labels.numpy(), annotations.iscrowd.numpy()
    part = counts.cumsum() // MAX_PAIRS
    for first, stop in zip(*(np.searchsorted(part, np.unique(part), side) for side in ("left", "right")), strict=True):
        here = counts[first:stop]
        rows = np.repeat(np.arange(first, stop), here)
        columns = np.arange(len(rows)) - np.repeat(here.cumsum() - here, here) + np.repeat(starts[first:stop], here)
        if same_class:
            same = detections.labels[rows] == labels[columns]
            rows, columns = rows[same], columns[same]
        ious = _iou(found[rows], truth[columns], crowd[columns])
        kept = (ious >= least) & (ious > 0)
        yield rows[kept], columns[kept], ious[kept]


def _iou(found: NDArray[np.float64], truth: NDArray[np.float64], crowd: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Compute the IoU [P] of boxes [P, 4] (xywh) in the order of operations of COCO's API, which gives the same bits."""
    stops, others = found[:, :2] + found[:, 2:], truth[:, :2] + truth[:, 2:]
    sides = np.minimum(stops, others) - np.maximum(found[:, :2], truth[:, :2])
    shared = sides[:, 0] * sides[:, 1]
    area, other = found[:, 2] * found[:, 3], truth[:, 2] * truth[:, 3]
    union = np.where(crowd, area, area + other - shared)
    overlap = (sides > 0).all(axis=1)
    return np.divide(shared, union, out=np.zeros(len(found)), where=overlap)


def take_greedily(
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    ious: NDArray[np.float64],
    groups: NDArray[np.int64],
    ignored: NDArray[np.bool_],
    shared: NDArray[np.bool_],
    iou_thresholds: NDArray[np.float64],
) -> NDArray[np.int64]:
    """Let each detection take the best box that is free, in the order of the detections.

    The detections of a group compete for the same boxes. The n-th of all groups take theirs together.

    Args:
        rows: [P], detections of the pairs.
        columns: [P], boxes of the pairs.
        ious: [P]
        groups: [D], such as image and class.
        ignored: [G], boxes that are taken only if no other one can be.
        shared: [G], boxes that any number of detections may take.
        iou_thresholds: [T]

    Returns:
        The box of each detection, i64 [T, D]; NOTHING where there is none.
    """
    taken = np.full((len(iou_thresholds), len(groups)), NOTHING, np.int64)
    members, member_of = np.unique(rows, return_inverse=True)  # detections with pairs, in order
    by_group = np.argsort(groups[members], kind="stable")
    sorted_groups = groups[members][by_group]
    turns = np.empty(len(members), np.int64)
    turns[by_group] = np.arange(len(members)) - np.searchsorted(sorted_groups, sorted_groups)
    turn = turns[member_of]
    # best first: not ignored, of highest IoU; of equal ones COCO takes the last
    order = np.lexsort((-columns, -ious, ignored[columns], rows, turn))
    rows, columns, turn = rows[order], columns[order], turn[order]
    enough = ious[order, None] >= np.minimum(iou_thresholds, 1 - 1e-10)  # [P, T]
    free = np.ones((len(ignored), len(iou_thresholds)), bool)
    bounds = np.searchsorted(turn, np.arange(turns.max(initial=-1) + 2))
    for first, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        boxes = columns[first:stop]
        possible = enough[first:stop] & (free[boxes] | shared[boxes, None])
        starts = np.flatnonzero(np.diff(rows[first:stop], prepend=-1))
        # the first possible pair of each detection has the largest number
        numbers = np.arange(stop - first, 0, -1)[:, None] * possible
        best = np.maximum.reduceat(numbers, starts)
        which, threshold = np.nonzero(best)
        chosen = boxes[stop - first - best[which, threshold]]
        taken[threshold, rows[first:stop][starts[which]]] = chosen
        free[chosen, threshold] = False
    return taken
