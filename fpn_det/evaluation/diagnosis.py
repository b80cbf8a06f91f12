"""Diagnose an AP of about 0 from the detections and the ground truth.

For each common mistake (wrong frame of the boxes, permuted classes) the detections are corrected. If the corrected detections
score well, the mistake is reported; otherwise the detections are compared with chance. A sample of the images suffices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from fpn_det.evaluation.config import EvaluationConfig
from fpn_det.evaluation.detection_table import DetectionTable
from fpn_det.evaluation.engines import precision_and_recall
from fpn_det.structures import Annotations

ABOUT_ZERO = 0.01
MIN_AP50 = 0.3  # of corrected detections, above which a mistake is reported
MAX_IMAGES = 100
MAX_SCALE_IMAGES, MAX_SCALE_DETECTIONS = 30, 30  # images, and detections per image, for the search of a scale
MATCH_IOU = 0.5

Boxes = NDArray[np.floating]
Sizes = NDArray[np.int64]  # [D, 2], (h, w) of each detection's image


def _mirrored(boxes: Boxes, sizes: Sizes, axis: int) -> Boxes:
    """Mirror boxes along x (axis 0) or y (axis 1)."""
    mirrored = boxes.copy()
    mirrored[:, [axis, axis + 2]] = sizes[:, [1 - axis]] - boxes[:, [axis + 2, axis]]
    return mirrored


def _sides(boxes: Boxes) -> Boxes:
    return boxes[:, 2:] - boxes[:, :2]


# Mistake in xyxy boxes -> function that corrects it, of boxes and image sizes.
CORRECTIONS: dict[str, Callable[[Boxes, Sizes], Boxes]] = {
    "x and y of the boxes are swapped": lambda boxes, sizes: boxes[:, [1, 0, 3, 2]],
    "boxes are xywh instead of xyxy": lambda boxes, sizes: boxes + np.pad(boxes[:, :2], ((0, 0), (2, 0))),
    "boxes are xyxy instead of xywh": lambda boxes, sizes: boxes - np.pad(boxes[:, :2], ((0, 0), (2, 0))),
    "boxes start at their centers": lambda boxes, sizes: boxes - np.tile(_sides(boxes) / 2, 2),
    "boxes are flipped horizontally": lambda boxes, sizes: _mirrored(boxes, sizes, 0),
    "boxes are flipped vertically": lambda boxes, sizes: _mirrored(boxes, sizes, 1),
    "boxes are normalized to the size of the image": lambda boxes, sizes: boxes * np.tile(sizes[:, ::-1], 2),
}


def diagnose(annotations: Annotations, detections: DetectionTable, images: NDArray[np.int64]) -> list[str]:
    """Return sentences about the causes of an AP of about 0; empty if there are no objects.

    Args:
        annotations: the ground truth.
        detections: in the original frame.
        images: rows of `annotations` that were evaluated.
    """
    truth = _Truth(annotations, images)
    if not len(truth.rows):
        return []
    if not len(detections):
        return [
            "No object was found because there are no detections: no score is above model.roi_head.test_filter.score_threshold."
        ]
    found = detections.take(np.argsort(detections.images, kind="stable"))
    found = found.take(np.flatnonzero(np.isin(found.images, truth.rows)))
    if not len(found):
        return [
            "No detection is on an image with objects. Check that detections and annotations are of the same data set."
        ]
    uncorrected = truth.ap50(found) if truth.recall(found) >= MIN_AP50 else 0.0
    best, cause, corrected = uncorrected, "", found
    for name, boxes in truth.corrected_boxes(found):
        other = DetectionTable(found.images, boxes, found.scores, found.labels)
        if truth.recall(other) < MIN_AP50:  # an upper bound of AP50 that is faster to compute
            continue
        ap50 = truth.ap50(other)
        if ap50 > best:
            best, cause, corrected = ap50, name, other
    if best < MIN_AP50:
        return truth.compare_with_chance(found)
    reasons = []
    if cause and best > 2 * uncorrected:
        reasons.append(
            f"The frame of the boxes is wrong: {cause}. Corrected, class-agnostic AP50 is {best:.2f} instead of {uncorrected:.2f}."
        )
    else:
        corrected = found
    ap50_by_class = truth.ap50(corrected, by_class=True)
    if ap50_by_class < best / 2:
        reasons.append(
            f"The class mapping is wrong: class-agnostic AP50 is {truth.ap50(corrected):.2f}, with classes {ap50_by_class:.2f}. "
            f"{truth.describe_classes(corrected)}"
        )
    return reasons


class _Truth:
    """Ground truth of a sample of the evaluated images that have objects."""

    def __init__(self, annotations: Annotations, images: NDArray[np.int64]) -> None:
        owners = annotations.image_of_boxes.numpy()
        real = ~annotations.iscrowd.numpy()
        rows = np.intersect1d(images, owners[real])
        self.annotations = annotations
        self.rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), MAX_IMAGES)).astype(int)]
        self._objects = {row: np.flatnonzero((owners == row) & real) for row in self.rows.tolist()}
        self._boxes, self._labels = annotations.boxes.numpy(), annotations.labels.numpy()
        self._sizes = annotations.sizes.numpy()

    def ap50(self, found: DetectionTable, by_class: bool = False) -> float:
        """Return the AP50 of the sample, class-agnostic unless `by_class`."""
        config = EvaluationConfig(max_dets=(100,), area_ranges={})
        precision, _ = precision_and_recall(self.annotations, found, self.rows, config, class_agnostic=not by_class)
        values = precision[0, ..., 0, -1]
        return float(np.nanmean(values)) if not np.isnan(values).all() else 0.0

    def corrected_boxes(self, found: DetectionTable) -> Iterator[tuple[str, Boxes]]:
        """Yield the description of each mistake, and the boxes with the mistake corrected."""
        sizes, boxes = self._sizes[found.images], found.boxes.astype(np.float64)
        for name, correct in CORRECTIONS.items():
            yield name, correct(boxes, sizes)
        shorter = sizes.min(axis=1, keepdims=True) / np.median(self._sizes.min(axis=1))
        factor = self._best_factor(found, np.ones_like(shorter))
        yield f"boxes are those of a resized image and must be multiplied by {factor:.3g}", boxes * factor
        factor = self._best_factor(found, shorter)
        yield "boxes are in the frame of images resized to one shorter side", boxes * factor * shorter

    def _best_factor(self, found: DetectionTable, shape: NDArray) -> float:
        """Search the factor of the boxes, times `shape` [D, 1], with the largest mean IoU of the objects."""
        best = 1.0
        for factors in (np.geomspace(1 / 16, 16, 64), np.geomspace(0.95, 1.05, 21)):
            tried = [best * factor for factor in factors.tolist()]
            best = max(tried, key=lambda factor: self._overlap(found, found.boxes * factor * shape))
        return best

    def _overlap(self, found: DetectionTable, boxes: Boxes) -> float:
        rows = self.rows[:: -(-len(self.rows) // MAX_SCALE_IMAGES)]
        return float(
            np.mean(
                np.concatenate(
                    [iou.max(axis=0, initial=0) for _, _, iou in self._pairs(found, boxes, MAX_SCALE_DETECTIONS, rows)]
                )
            )
        )

    def _pairs(
        self, found: DetectionTable, boxes: Boxes, most: int | None = None, rows: NDArray | None = None
    ) -> Iterator[tuple[NDArray, NDArray, NDArray]]:
        """Yield per image the rows of its detections (at most `most`), the rows of its objects, and their IoU [d, g]."""
        rows = self.rows if rows is None else rows
        starts, stops = np.searchsorted(found.images, rows), np.searchsorted(found.images, rows, side="right")
        for row, start, stop in zip(rows.tolist(), starts, stops, strict=True):
            detected, objects = np.arange(start, stop)[:most], self._objects[row]
            yield detected, objects, _iou(boxes[detected], self._boxes[objects])

    def describe_classes(self, found: DetectionTable) -> str:
        """Describe how the classes of detections relate to those of the objects that they overlap."""
        names = self.annotations.class_names
        counts = np.zeros((len(names), len(names)), dtype=np.int64)  # [detected class, true class]
        for detected, objects, iou in self._pairs(found, found.boxes):
            on_object = np.flatnonzero(iou.max(axis=1, initial=0) >= MATCH_IOU)
            if len(on_object):
                np.add.at(
                    counts, (found.labels[detected[on_object]], self._labels[objects[iou[on_object].argmax(axis=1)]]), 1
                )
        used = np.flatnonzero(counts.any(axis=1))
        meant = counts.argmax(axis=1)
        if len(used) == 1 and len(np.flatnonzero(counts.any(axis=0))) > 1:
            return f"Every detection has the class {names[used[0]]!r}."
        if counts.max(axis=1).sum() < 0.7 * counts.sum():
            return "Detected classes are unrelated to the annotated ones: boxes were learned, classes were not (yet)."
        moved = [label for label in used.tolist() if meant[label] != label]
        steps = {int(meant[label]) - label for label in moved}
        shift = f" Labels are off by {-steps.pop()}." if len(steps) == 1 and len(moved) > 1 else ""
        pairs = ", ".join(f"{names[label]!r} is {names[meant[label]]!r}" for label in moved[:10])
        return f"The classes are permuted: detected {pairs}{' ...' if len(moved) > 10 else ''}.{shift}"

    def compare_with_chance(self, found: DetectionTable) -> list[str]:
        """Compare the recall of the boxes with that of the boxes of another image."""
        recall = self.recall(found)
        if len(self.rows) > 1:
            position = np.searchsorted(self.rows, found.images)
            moved = self.rows[(position + 1) % len(self.rows)]
            ratio = np.tile((self._sizes[moved] / self._sizes[found.images])[:, ::-1], 2)
            order = np.argsort(moved, kind="stable")
            chance = self.recall(DetectionTable(moved, found.boxes * ratio, found.scores, found.labels).take(order))
        else:
            chance = 0.0
        low, high = np.quantile(found.scores, [0.05, 0.95])
        spread = f"scores are between {low:.2f} and {high:.2f}"
        if recall <= 1.5 * chance + 0.02:
            return [
                f"The detector is untrained: its boxes match {recall:.0%} of the objects, those of another image {chance:.0%}; {spread}."
            ]
        return [
            f"Boxes match {recall:.0%} of the objects with IoU {MATCH_IOU:g} (by chance {chance:.0%}), but their scores are low; {spread}. "
            "No mistake of frame or classes was found: train longer, or check optimizer.lr."
        ]

    def recall(self, found: DetectionTable) -> float:
        """Return the fraction of objects that a detection matches with MATCH_IOU."""
        matched = [iou.max(axis=0, initial=0) >= MATCH_IOU for _, _, iou in self._pairs(found, found.boxes)]
        return float(np.mean(np.concatenate(matched)))


def _iou(boxes: NDArray, others: NDArray) -> NDArray[np.float64]:
    """Compute the IoU [n, m]; 0 where a box has no area."""
    sides = np.minimum(boxes[:, None, 2:], others[None, :, 2:]) - np.maximum(boxes[:, None, :2], others[None, :, :2])
    shared = sides.clip(min=0).prod(axis=2)
    areas, other_areas = (_sides(part).clip(min=0).prod(axis=1) for part in (boxes, others))
    return shared / np.maximum(areas[:, None] + other_areas[None] - shared, 1e-9)
