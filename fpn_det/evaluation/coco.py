"""Detections against ground truth, the COCO way. The only file that knows pycocotools.

pycocotools is fed one class at a time, with the images where that class occurs: its numbers do not change, and its
records of one class are all that is in memory. What it takes on trust is made here: annotation ids count from 1 (it takes
the id 0 for "unmatched", and duplicates for one object), and the headline AP is read at the largest limit of detections,
whatever that is.

Letters: T IoU thresholds, R recall thresholds, K classes, E area ranges (all sizes first), X limits of detections.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fpn_det.structures import Annotations

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
ANY_AREA = (0.0, 1e10)


@dataclass(frozen=True)
class EvaluationSettings:
    """What is counted."""

    # limits of detections per image; AP is read at the last
    max_dets: tuple[int, ...] = (1, 10, 100)
    # name (which metrics carry as a suffix: APs, ARs) -> smallest and largest area of an object, px^2
    area_ranges: Mapping[str, tuple[float, float]] = field(
        default_factory=lambda: {"s": (0.0, 32.0**2), "m": (32.0**2, 96.0**2), "l": (96.0**2, 1e10)}
    )
    # detections, by class; or proposals, boxes of no class, of which the recall is measured
    target: Literal["detections", "proposals"] = "detections"

    def __post_init__(self) -> None:
        limits = list(self.max_dets)
        if not limits or limits[0] < 1 or limits != sorted(set(limits)):
            raise ValueError(
                f"evaluation.max_dets: expected growing numbers from 1, got {limits}. COCO's are [1, 10, 100]."
            )
        for name, bounds in self.area_ranges.items():
            if len(bounds) != 2 or not 0 <= bounds[0] < bounds[1]:
                raise ValueError(
                    f"evaluation.area_ranges.{name}: expected [smallest, largest] in px^2, got {list(bounds)}."
                )

    @property
    def metric_names(self) -> tuple[str, ...]:
        """What an evaluation with these settings gives; of proposals ARs1000 is the recall of small objects among 1000."""
        if self.target == "proposals":
            return tuple(f"AR{name}{limit}" for name in ("", *self.area_ranges) for limit in self.max_dets)
        precision, recall = [f"AP{name}" for name in self.area_ranges], [f"AR{name}" for name in self.area_ranges]
        return ("AP", "AP50", "AP75", *precision, *(f"AR{limit}" for limit in self.max_dets), *recall)


@dataclass(frozen=True)
class DetectionTable:
    """Detections of many images as flat arrays, in the original frame; those of one image best first."""

    images: NDArray[np.int64]  # [D], rows of Annotations
    boxes: NDArray[np.floating]  # [D, 4], xyxy
    scores: NDArray[np.floating]  # [D]
    labels: NDArray[np.int64]  # [D]

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: NDArray) -> DetectionTable:
        """These rows, in this order."""
        return DetectionTable(self.images[rows], self.boxes[rows], self.scores[rows], self.labels[rows])

    @classmethod
    def join(cls, tables: list[DetectionTable]) -> DetectionTable:
        """All rows, ordered by image: the same table however the images were dealt out."""
        empty = cls(np.zeros(0, np.int64), np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
        tables = tables or [empty]
        images = np.concatenate([table.images for table in tables])
        joined = cls(
            images,
            np.concatenate([table.boxes for table in tables]),
            np.concatenate([table.scores for table in tables]),
            np.concatenate([table.labels for table in tables]),
        )
        return joined.take(np.argsort(images, kind="stable"))

    @classmethod
    def from_results(cls, file: Path, annotations: Annotations) -> DetectionTable:
        """Read a file in the COCO results format.

        Raises:
            ValueError: an image or a category is not in `annotations`.
        """
        rows = json.loads(file.read_text())
        image_of = {image_id: row for row, image_id in enumerate(annotations.image_ids.tolist())}
        label_of = {category_id: label for label, category_id in enumerate(annotations.category_ids)}
        strangers = [row["image_id"] for row in rows if row["image_id"] not in image_of]
        if rows and len(strangers) == len(rows):
            known = ", ".join(map(str, list(image_of)[:3]))
            raise ValueError(
                f"{file}: none of its image ids is in the annotations: it has {strangers[0]}, ..., they have {known}, ... "
                f"Take the annotations that the detections were made for."
            )
        for row in rows:
            if row["image_id"] not in image_of or row["category_id"] not in label_of:
                what = f"image {row['image_id']}, category {row['category_id']}"
                raise ValueError(
                    f"{file}: {what} is not in the annotations. Take those that the detections were made for."
                )
        xywh = np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4)
        return cls.join(
            [
                cls(
                    np.array([image_of[row["image_id"]] for row in rows], np.int64),
                    np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1),
                    np.array([row["score"] for row in rows], np.float64),
                    np.array([label_of[row["category_id"]] for row in rows], np.int64),
                )
            ]
        )

    def results(self, annotations: Annotations) -> Iterator[dict[str, Any]]:
        """The rows of a COCO results file: the data set's own ids, boxes xywh. Nothing is rounded, so they score the same."""
        columns = (
            annotations.image_ids.numpy()[self.images].tolist(),
            np.array(annotations.category_ids, np.int64)[self.labels].tolist(),
            _xywh(self.boxes).tolist(),
            self.scores.astype(np.float64).tolist(),
        )
        for image_id, category_id, box, score in zip(*columns, strict=True):
            yield {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}


@dataclass(frozen=True)
class Evaluation:
    """The result. Numbers are in 0..1, or None where no object makes them defined."""

    metrics: dict[
        str, float | None
    ]  # AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl, or as the settings say
    per_class: dict[str, dict[str, float | None]]  # name -> AP, AP50, AR, objects, detections; empty of proposals
    num_images: int
    cap: int  # as many detections as an image could have
    capped_images: int  # images that reached the cap
    detections: DetectionTable  # on rank 0; empty elsewhere
    statistics: dict[str, float] = field(default_factory=dict)  # only logged, such as detections/P2 per image
    seconds: float = 0.0  # from the first image to the numbers
    diagnosis: tuple[str, ...] = ()  # what explains an AP of about 0

    def remarks(self) -> list[str]:
        """What a reader of the numbers should know."""
        if not self.per_class:
            return []
        remarks = list(self.diagnosis)
        if not any(row["detections"] for row in self.per_class.values()):
            remarks.append("There is not a single detection.")
        if self.capped_images:
            remarks.append(
                f"{self.capped_images} of {self.num_images} images reached the cap of {self.cap} detections."
            )
        absent = sum(row["AP"] is None for row in self.per_class.values())
        if absent:
            remarks.append(f"{absent} of {len(self.per_class)} classes have no objects here; the means leave them out.")
        return remarks


def score(
    annotations: Annotations,
    detections: DetectionTable,
    images: NDArray[np.int64],
    settings: EvaluationSettings,
    cap: int | None = None,
) -> Evaluation:
    """AP and AR of detections, or AR of proposals.

    Args:
        annotations: the ground truth.
        detections: of the images in `images`; others are not looked at.
        images: the rows of `annotations` that were evaluated, also those where nothing was found.
        settings: what is counted.
        cap: as many detections as the model gives for an image; by default the last of `max_dets`.
    """
    assert len(np.unique(images)) == len(images), "an image was evaluated more than once"
    cap = min(cap or settings.max_dets[-1], settings.max_dets[-1])
    capped_images = int((np.bincount(detections.images) >= cap).sum())
    if settings.target == "proposals":
        recall = recall_of_proposals(annotations, detections, images, settings)
        metrics = dict(zip(settings.metric_names, map(_mean, recall.reshape(len(recall), -1).T), strict=True))
        return Evaluation(metrics, {}, len(images), cap, capped_images, detections)
    precision, recall = precision_and_recall(annotations, detections, images, settings)
    metrics = {
        "AP": _mean(precision[..., 0, -1]),
        "AP50": _mean(precision[0, ..., 0, -1]),
        "AP75": _mean(precision[5, ..., 0, -1]),
        **{f"AP{name}": _mean(precision[..., size, -1]) for size, name in enumerate(settings.area_ranges, 1)},
        **{f"AR{limit}": _mean(recall[..., 0, x]) for x, limit in enumerate(settings.max_dets)},
        **{f"AR{name}": _mean(recall[..., size, -1]) for size, name in enumerate(settings.area_ranges, 1)},
    }
    num_classes = annotations.num_classes
    evaluated = np.isin(annotations.image_of_boxes.numpy(), images) & ~annotations.iscrowd.numpy()
    objects = np.bincount(annotations.labels.numpy()[evaluated], minlength=num_classes)
    found = np.bincount(detections.labels, minlength=num_classes)
    per_class = {
        name: {
            "AP": _mean(precision[:, :, k, 0, -1]),
            "AP50": _mean(precision[0, :, k, 0, -1]),
            "AR": _mean(recall[:, k, 0, -1]),
            "objects": int(objects[k]),
            "detections": int(found[k]),
        }
        for k, name in enumerate(annotations.class_names)
    }
    return Evaluation(metrics, per_class, len(images), cap, capped_images, detections)


def precision_and_recall(
    annotations: Annotations,
    detections: DetectionTable,
    images: NDArray[np.int64],
    settings: EvaluationSettings,
    class_agnostic: bool = False,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The tables behind all the numbers: precision [T, R, K, E, X] and recall [T, K, E, X], NaN where undefined.

    With `class_agnostic`, as for proposals, K is 1 and every box may match every object.
    """
    image_ids = annotations.image_ids.numpy()
    truth = _Columns(
        image_ids[annotations.image_of_boxes.numpy()],
        annotations.labels.numpy(),
        _xywh(annotations.boxes.numpy()),
        {"area": annotations.area.numpy(), "iscrowd": annotations.iscrowd.numpy().astype(int)},
    ).restrict(image_ids[images])
    boxes = _xywh(detections.boxes)
    found = _Columns(
        image_ids[detections.images],
        detections.labels,
        boxes,
        {"area": boxes[:, 2] * boxes[:, 3], "score": detections.scores.astype(np.float64)},
    ).restrict(image_ids[images])

    num_groups = 1 if class_agnostic else annotations.num_classes
    shape = (num_groups, 1 + len(settings.area_ranges), len(settings.max_dets))
    precision = np.full((len(IOU_THRESHOLDS), 101, *shape), np.nan)
    recall = np.full((len(IOU_THRESHOLDS), *shape), np.nan)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        for k in range(num_groups):
            label = None if class_agnostic else k
            coco_truth, coco_found = truth.coco(label), found.coco(label)
            if not coco_truth.anns:
                continue
            run = COCOeval(coco_truth, coco_found, "bbox")
            run.params.imgIds = sorted({*coco_truth.imgToAnns, *coco_found.imgToAnns})
            run.params.catIds = [0]
            run.params.maxDets = list(settings.max_dets)
            run.params.areaRng = [list(bounds) for bounds in (ANY_AREA, *settings.area_ranges.values())]
            run.evaluate()
            run.accumulate()
            precision[:, :, k], recall[:, k] = run.eval["precision"][:, :, 0], run.eval["recall"][:, 0]
    precision[precision == -1] = np.nan
    recall[recall == -1] = np.nan
    return precision, recall


def recall_of_proposals(
    annotations: Annotations, proposals: DetectionTable, images: NDArray[np.int64], settings: EvaluationSettings
) -> NDArray[np.float64]:
    """Recall [T, E, X] of boxes that may match objects of any class, NaN where undefined.

    pycocotools looks at every box in Python, and of proposals there are a thousand per image. A box that overlaps no object by
    the least threshold matches none, so it is left out, after it has taken its place among the best 100 or 1000.
    """
    order = np.lexsort((-proposals.scores, proposals.images))  # by image, best first
    proposals = proposals.take(order)
    ranks = np.arange(len(order)) - np.searchsorted(proposals.images, proposals.images)
    matches = _best_iou(annotations, proposals) >= IOU_THRESHOLDS[0]
    recalls = []
    for limit in settings.max_dets:
        best = proposals.take(np.flatnonzero(matches & (ranks < limit)))
        only = replace(settings, max_dets=(limit,))
        recalls.append(precision_and_recall(annotations, best, images, only, class_agnostic=True)[1][:, 0, :, 0])
    return np.stack(recalls, axis=-1)


def _best_iou(annotations: Annotations, table: DetectionTable) -> NDArray[np.float64]:
    """The largest IoU of each box with an object of its image, as pycocotools computes it; the table is ordered by image."""
    best, boxes = np.zeros(len(table)), _xywh(table.boxes)
    for image in np.unique(table.images):
        here = slice(*np.searchsorted(table.images, [image, image + 1]))
        objects = annotations.rows(int(image))
        truth, crowd = _xywh(annotations.boxes[objects].numpy()), annotations.iscrowd[objects].numpy()
        if len(truth):
            best[here] = mask.iou(boxes[here], truth, crowd.astype(np.uint8)).max(axis=1)
    return best


@dataclass(frozen=True)
class _Columns:
    """Annotations or detections on their way to pycocotools."""

    image_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    boxes: NDArray[np.float64]  # xywh
    others: dict[str, NDArray]

    def take(self, rows: NDArray) -> _Columns:
        others = {name: column[rows] for name, column in self.others.items()}
        return _Columns(self.image_ids[rows], self.labels[rows], self.boxes[rows], others)

    def restrict(self, image_ids: NDArray[np.int64]) -> _Columns:
        """Only these images, ordered by class."""
        kept = self.take(np.flatnonzero(np.isin(self.image_ids, image_ids)))
        return kept.take(np.argsort(kept.labels, kind="stable"))

    def coco(self, label: int | None) -> COCO:
        """One class (None: all of them) as pycocotools wants it, as its category 0."""
        start, stop = (0, len(self.labels)) if label is None else np.searchsorted(self.labels, [label, label + 1])
        part = self.take(np.arange(start, stop))
        names = ["image_id", "bbox", *part.others]
        columns = [part.image_ids.tolist(), part.boxes.tolist(), *(column.tolist() for column in part.others.values())]
        coco = COCO()
        coco.dataset = {
            "images": [{"id": image_id} for image_id in np.unique(part.image_ids).tolist()],
            "categories": [{"id": 0}],
            "annotations": [
                {"id": row, "category_id": 0, **dict(zip(names, values, strict=True))}
                for row, values in enumerate(zip(*columns, strict=True), start=1)
            ],
        }
        coco.createIndex()
        return coco


def _xywh(boxes: NDArray) -> NDArray[np.float64]:
    boxes = boxes.astype(np.float64)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def _mean(values: NDArray[np.float64]) -> float | None:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else None
