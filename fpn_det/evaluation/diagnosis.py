"""Why AP is about 0: what can be proved from the detections alone.

Each common mistake has a way back. If the detections score well on that way, the mistake is proved and named; if none
does, they are compared with chance. A part of the images is enough for that.
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
PROOF = 0.3  # AP50 from which a mistake is proved
MOST_IMAGES = 100
MOST_SEARCHED, MOST_DETECTIONS = 30, 30  # images, and detections on each, for the search of a scale
SAME_OBJECT = 0.5  # IoU

Boxes = NDArray[np.floating]
Sizes = NDArray[np.int64]  # [D, 2], (h, w) of each detection's image


def _mirrored(boxes: Boxes, sizes: Sizes, axis: int) -> Boxes:
    """Boxes with x (axis 0) or y (1) counted from the other side."""
    mirrored = boxes.copy()
    mirrored[:, [axis, axis + 2]] = sizes[:, [1 - axis]] - boxes[:, [axis + 2, axis]]
    return mirrored


def _sides(boxes: Boxes) -> Boxes:
    return boxes[:, 2:] - boxes[:, :2]


# What may have happened to boxes xyxy, and how to undo it.
MISTAKES: dict[str, Callable[[Boxes, Sizes], Boxes]] = {
    "x and y of the boxes are exchanged": lambda boxes, sizes: boxes[:, [1, 0, 3, 2]],
    "boxes hold x, y, width, height where corners are expected": lambda boxes, sizes: (
        boxes + np.pad(boxes[:, :2], ((0, 0), (2, 0)))
    ),
    "boxes hold corners where x, y, width, height are expected": lambda boxes, sizes: (
        boxes - np.pad(boxes[:, :2], ((0, 0), (2, 0)))
    ),
    "boxes begin at their centers": lambda boxes, sizes: boxes - np.tile(_sides(boxes) / 2, 2),
    "boxes are mirrored left to right": lambda boxes, sizes: _mirrored(boxes, sizes, 0),
    "boxes are upside down": lambda boxes, sizes: _mirrored(boxes, sizes, 1),
    "boxes are fractions of the sides of the image": lambda boxes, sizes: boxes * np.tile(sizes[:, ::-1], 2),
}


def diagnose(annotations: Annotations, detections: DetectionTable, images: NDArray[np.int64]) -> list[str]:
    """What explains that detections score about nothing, a sentence each; nothing if there is no object to find.

    Args:
        annotations: the ground truth.
        detections: of any images.
        images: the rows that were evaluated.
    """
    truth = _Truth(annotations, images)
    if not len(truth.rows):
        return []
    if not len(detections):
        return [
            "No object was found because there are no detections: no score passes model.roi_head.test_filter.score_threshold (yet)."
        ]
    found = detections.take(np.argsort(detections.images, kind="stable"))
    found = found.take(np.flatnonzero(np.isin(found.images, truth.rows)))
    if not len(found):
        return [
            "No detection is on an image with objects: are the detections those of another data set, or its image ids others?"
        ]
    as_it_is = truth.ap50(found) if truth.recall(found) >= PROOF else 0.0
    best, cause, undone = as_it_is, "", found
    for name, boxes in truth.undo(found):
        other = DetectionTable(found.images, boxes, found.scores, found.labels)
        if (
            truth.recall(other) >= PROOF and (ap50 := truth.ap50(other)) > best
        ):  # AP is at most the recall, and takes longer
            best, cause, undone = ap50, name, other
    if best < PROOF:
        return truth.compare_with_chance(found)
    reasons = []
    if cause and best > 2 * as_it_is:
        reasons.append(
            f"The frame of the boxes is wrong: {cause}. Undone, AP50 without regard to classes is {best:.2f} instead of {as_it_is:.2f}."
        )
    else:
        undone = found
    named = truth.ap50(undone, by_class=True)
    if named < best / 2:
        reasons.append(
            f"The class mapping is wrong: without regard to classes AP50 is {truth.ap50(undone):.2f}, with classes {named:.2f}. "
            f"{truth.naming(undone)}"
        )
    return reasons


class _Truth:
    """Some of the images that were evaluated, all with objects."""

    def __init__(self, annotations: Annotations, images: NDArray[np.int64]) -> None:
        owners = annotations.image_of_boxes.numpy()
        real = ~annotations.iscrowd.numpy()
        rows = np.intersect1d(images, owners[real])
        self.annotations = annotations
        self.rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), MOST_IMAGES)).astype(int)]
        self._objects = {row: np.flatnonzero((owners == row) & real) for row in self.rows.tolist()}
        self._boxes, self._labels = annotations.boxes.numpy(), annotations.labels.numpy()
        self._sizes = annotations.sizes.numpy()

    def ap50(self, found: DetectionTable, by_class: bool = False) -> float:
        settings = EvaluationConfig(max_dets=(100,), area_ranges={})
        precision, _ = precision_and_recall(self.annotations, found, self.rows, settings, class_agnostic=not by_class)
        values = precision[0, ..., 0, -1]
        return float(np.nanmean(values)) if not np.isnan(values).all() else 0.0

    def undo(self, found: DetectionTable) -> Iterator[tuple[str, Boxes]]:
        """Every mistake, and the boxes without it."""
        sizes, boxes = self._sizes[found.images], found.boxes.astype(np.float64)
        for name, way_back in MISTAKES.items():
            yield name, way_back(boxes, sizes)
        shorter = sizes.min(axis=1, keepdims=True) / np.median(self._sizes.min(axis=1))
        factor = self._best_factor(found, np.ones_like(shorter))
        yield f"boxes have to be multiplied by {factor:.3g}, as if they were those of a resized image", boxes * factor
        factor = self._best_factor(found, shorter)
        yield "boxes are in the frame of images resized to one shorter side", boxes * factor * shorter

    def _best_factor(self, found: DetectionTable, shape: NDArray) -> float:
        """By what to multiply the boxes, times `shape` [D, 1], so that they meet objects best."""
        best = 1.0
        for factors in (np.geomspace(1 / 16, 16, 64), np.geomspace(0.95, 1.05, 21)):
            tried = [best * factor for factor in factors.tolist()]
            best = max(tried, key=lambda factor: self._overlap(found, found.boxes * factor * shape))
        return best

    def _overlap(self, found: DetectionTable, boxes: Boxes) -> float:
        rows = self.rows[:: -(-len(self.rows) // MOST_SEARCHED)]
        return float(
            np.mean(
                np.concatenate(
                    [iou.max(axis=0, initial=0) for _, _, iou in self._pairs(found, boxes, MOST_DETECTIONS, rows)]
                )
            )
        )

    def _pairs(
        self, found: DetectionTable, boxes: Boxes, most: int | None = None, rows: NDArray | None = None
    ) -> Iterator[tuple[NDArray, NDArray, NDArray]]:
        """For each image the rows of its detections (the best `most`), those of its objects, and their IoU [d, g]."""
        rows = self.rows if rows is None else rows
        starts, stops = np.searchsorted(found.images, rows), np.searchsorted(found.images, rows, side="right")
        for row, start, stop in zip(rows.tolist(), starts, stops, strict=True):
            detected, objects = np.arange(start, stop)[:most], self._objects[row]
            yield detected, objects, _iou(boxes[detected], self._boxes[objects])

    def naming(self, found: DetectionTable) -> str:
        """How the classes of detections and of the objects they lie on belong together."""
        names = self.annotations.class_names
        counts = np.zeros((len(names), len(names)), dtype=np.int64)  # [found as, drawn as]
        for detected, objects, iou in self._pairs(found, found.boxes):
            on_object = np.flatnonzero(iou.max(axis=1, initial=0) >= SAME_OBJECT)
            if len(on_object):
                np.add.at(
                    counts, (found.labels[detected[on_object]], self._labels[objects[iou[on_object].argmax(axis=1)]]), 1
                )
        used = np.flatnonzero(counts.any(axis=1))
        meant = counts.argmax(axis=1)
        if len(used) == 1 and len(np.flatnonzero(counts.any(axis=0))) > 1:
            return f"Every detection is called {names[used[0]]!r}."
        if counts.max(axis=1).sum() < 0.7 * counts.sum():
            return (
                "The names do not follow from the classes that are drawn: boxes were learned, classes were not (yet)."
            )
        moved = [label for label in used.tolist() if meant[label] != label]
        steps = {int(meant[label]) - label for label in moved}
        shift = f" Labels are off by {-steps.pop()}." if len(steps) == 1 and len(moved) > 1 else ""
        listed = ", ".join(f"{names[label]!r} is {names[meant[label]]!r}" for label in moved[:10])
        return f"The classes are permuted: what is called {listed}{' ...' if len(moved) > 10 else ''}.{shift}"

    def compare_with_chance(self, found: DetectionTable) -> list[str]:
        """Whether the boxes lie nearer to the objects than those of the next image would."""
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
        spread = f"scores lie between {low:.2f} and {high:.2f}"
        if recall <= 1.5 * chance + 0.02:
            return [
                f"The detector is untrained: its boxes meet {recall:.0%} of the objects, those of another image {chance:.0%}; {spread}."
            ]
        return [
            f"Boxes meet {recall:.0%} of the objects with IoU {SAME_OBJECT:g} (by chance {chance:.0%}), but not as the best ones; {spread}. "
            "No mistake of frame or classes explains it: train longer, or look at optimizer.lr."
        ]

    def recall(self, found: DetectionTable) -> float:
        """The share of the objects that some detection meets."""
        met = [iou.max(axis=0, initial=0) >= SAME_OBJECT for _, _, iou in self._pairs(found, found.boxes)]
        return float(np.mean(np.concatenate(met)))


def _iou(boxes: NDArray, others: NDArray) -> NDArray[np.float64]:
    """[n, m]; 0 where a box has no area."""
    sides = np.minimum(boxes[:, None, 2:], others[None, :, 2:]) - np.maximum(boxes[:, None, :2], others[None, :, :2])
    shared = sides.clip(min=0).prod(axis=2)
    areas, other_areas = (_sides(part).clip(min=0).prod(axis=1) for part in (boxes, others))
    return shared / np.maximum(areas[:, None] + other_areas[None] - shared, 1e-9)
