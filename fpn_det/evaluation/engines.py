"""Tables of precision and recall, by pycocotools or hotcoco. The only module that imports these libraries.

Both engines receive data prepared here: annotation ids count from 1 (pycocotools reads id 0 as unmatched and equal ids as one
object), image ids are replaced by their order, and boxes are float64. The tables of both are equal to the last bit.

Letters: T IoU thresholds, R recall thresholds, K classes, E area ranges (all areas first), X limits of detections per image.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fpn_det.evaluation.config import EvaluationConfig
from fpn_det.evaluation.detection_table import DetectionTable, xyxy_to_xywh
from fpn_det.structures import Annotations

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
ANY_AREA = (0.0, 1e10)

# Process whose threads hotcoco uses; None before its first use.
_hotcoco_process: int | None = None

Engine = Literal["pycocotools", "hotcoco"]
# precision [T, R, K, E, X] and recall [T, K, E, X]
Tables = tuple[NDArray[np.float64], NDArray[np.float64]]


def choose_engine(config: EvaluationConfig) -> Engine:
    """Return the engine of `evaluation.engine`; `auto` is hotcoco if it can be used.

    Raises:
        ValueError: hotcoco is requested and cannot be used.
    """
    if config.engine == "pycocotools":
        return "pycocotools"
    problem = ""
    if importlib.util.find_spec("hotcoco") is None:
        problem = "expected an installed hotcoco, got none. Install it with pip install 'fpn_det[fast-eval]', or set"
    elif _hotcoco_process not in (None, os.getpid()):  # its threads do not exist here, and waiting for them never ends
        problem = (
            "expected a process that was started anew, got a fork of one that has used hotcoco. Start it anew, or set"
        )
    if not problem:
        return "hotcoco"
    if config.engine == "hotcoco":
        raise ValueError(f"evaluation.engine: {problem} evaluation.engine=pycocotools.")
    return "pycocotools"


def describe_engine(engine: Engine) -> str:
    """Return name and version, such as `pycocotools 2.0.10`."""
    return f"{engine} {metadata.version(engine)}"


def precision_and_recall(
    annotations: Annotations,
    detections: DetectionTable,
    images: NDArray[np.int64],
    config: EvaluationConfig,
    class_agnostic: bool = False,
) -> Tables:
    """Compute the tables from which all metrics are derived: precision [T, R, K, E, X] and recall [T, K, E, X].

    Undefined cells are NaN. Detections of other images are ignored.

    Args:
        annotations: the ground truth.
        detections: in the original frame.
        images: rows of `annotations` that were evaluated.
        config: limits and area ranges.
        class_agnostic: K is 1 and every box may match every object, as for proposals.
    """
    image_order = np.unique(annotations.image_ids.numpy(), return_inverse=True)[1]
    truth = _Boxes(
        image_order[annotations.image_of_boxes.numpy()],
        annotations.labels.numpy(),
        xyxy_to_xywh(annotations.boxes.numpy()),
        annotations.area.numpy(),
        iscrowd=annotations.iscrowd.numpy(),
    ).select(image_order[images], class_agnostic)
    boxes = xyxy_to_xywh(detections.boxes)
    found = _Boxes(
        image_order[detections.images],
        detections.labels,
        boxes,
        boxes[:, 2] * boxes[:, 3],
        scores=detections.scores.astype(np.float64),
    ).select(image_order[images], class_agnostic)

    num_classes = 1 if class_agnostic else annotations.num_classes
    compute = _hotcoco if choose_engine(config) == "hotcoco" else _pycocotools
    precision, recall = compute(truth, found, num_classes, config)
    precision[precision == -1] = np.nan
    recall[recall == -1] = np.nan
    return precision, recall


def recall_of_proposals(
    annotations: Annotations, proposals: DetectionTable, images: NDArray[np.int64], config: EvaluationConfig
) -> NDArray[np.float64]:
    """Compute the class-agnostic recall [T, E, X] of proposals; NaN where undefined.

    Proposals that overlap no object by the lowest IoU threshold cannot match. They are dropped after the limits of proposals
    per image are applied, because the engines would compare each of them (about a thousand per image) with all objects.
    """
    order = np.lexsort((-proposals.scores, proposals.images))  # by image, then by descending score
    proposals = proposals.take(order)
    position = np.arange(len(order)) - np.searchsorted(proposals.images, proposals.images)
    can_match = _best_iou(annotations, proposals) >= IOU_THRESHOLDS[0]
    recalls = []
    for limit in config.max_dets:
        kept = proposals.take(np.flatnonzero(can_match & (position < limit)))
        one_limit = replace(config, max_dets=(limit,))
        recalls.append(precision_and_recall(annotations, kept, images, one_limit, class_agnostic=True)[1][:, 0, :, 0])
    return np.stack(recalls, axis=-1)


def _best_iou(annotations: Annotations, table: DetectionTable) -> NDArray[np.float64]:
    """Compute the largest IoU of each box with an object of its image, as pycocotools does. The table is sorted by image."""
    best, boxes = np.zeros(len(table)), xyxy_to_xywh(table.boxes)
    for image in np.unique(table.images):
        rows = slice(*np.searchsorted(table.images, [image, image + 1]))
        objects = annotations.rows(int(image))
        truth, crowd = xyxy_to_xywh(annotations.boxes[objects].numpy()), annotations.iscrowd[objects].numpy()
        if len(truth):
            best[rows] = mask.iou(boxes[rows], truth, crowd.astype(np.uint8)).max(axis=1)
    return best


@dataclass(frozen=True)
class _Boxes:
    """Columns of ground truth (with `iscrowd`) or of detections (with `scores`)."""

    images: NDArray[np.int64]
    labels: NDArray[np.int64]
    boxes: NDArray[np.float64]  # xywh
    area: NDArray[np.float64]
    iscrowd: NDArray[np.bool_] | None = None
    scores: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: NDArray) -> _Boxes:
        """Select rows, in the given order."""
        return _Boxes(
            self.images[rows],
            self.labels[rows],
            self.boxes[rows],
            self.area[rows],
            None if self.iscrowd is None else self.iscrowd[rows],
            None if self.scores is None else self.scores[rows],
        )

    def select(self, images: NDArray[np.int64], class_agnostic: bool) -> _Boxes:
        """Keep the boxes of some images, sorted by class; then set all classes to 0 if `class_agnostic`.

        pycocotools orders boxes of equal score by class in both cases.
        """
        kept = self.take(np.flatnonzero(np.isin(self.images, images)))
        kept = kept.take(np.argsort(kept.labels, kind="stable"))
        return replace(kept, labels=np.zeros_like(kept.labels)) if class_agnostic else kept

    def of_class(self, label: int) -> _Boxes:
        """Select one class."""
        return self.take(np.arange(*np.searchsorted(self.labels, [label, label + 1])))


def _area_ranges(config: EvaluationConfig) -> list[list[float]]:
    return [list(bounds) for bounds in (ANY_AREA, *config.area_ranges.values())]


def _pycocotools(truth: _Boxes, found: _Boxes, num_classes: int, config: EvaluationConfig) -> Tables:
    """Evaluate one class at a time, on the images where it occurs, so that the records of one class are in memory."""
    shape = (num_classes, 1 + len(config.area_ranges), len(config.max_dets))
    precision, recall = np.full((len(IOU_THRESHOLDS), 101, *shape), -1.0), np.full((len(IOU_THRESHOLDS), *shape), -1.0)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        for label in range(num_classes):
            coco_truth, coco_found = _as_coco(truth.of_class(label)), _as_coco(found.of_class(label))
            if not coco_truth.anns:
                continue
            run = COCOeval(coco_truth, coco_found, "bbox")
            run.params.imgIds = sorted({*coco_truth.imgToAnns, *coco_found.imgToAnns})
            run.params.catIds = [0]
            run.params.maxDets = list(config.max_dets)
            run.params.areaRng = _area_ranges(config)
            run.evaluate()
            run.accumulate()
            precision[:, :, label], recall[:, label] = run.eval["precision"][:, :, 0], run.eval["recall"][:, 0]
    return precision, recall


def _as_coco(boxes: _Boxes) -> COCO:
    """Convert the boxes of one class to a pycocotools data set with category 0."""
    columns = {"image_id": boxes.images, "bbox": boxes.boxes, "area": boxes.area}
    if boxes.iscrowd is not None:
        columns["iscrowd"] = boxes.iscrowd.astype(int)
    if boxes.scores is not None:
        columns["score"] = boxes.scores
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image} for image in np.unique(boxes.images).tolist()],
        "categories": [{"id": 0}],
        "annotations": [
            {"id": row, "category_id": 0, **dict(zip(columns, values, strict=True))}
            for row, values in enumerate(zip(*(column.tolist() for column in columns.values()), strict=True), start=1)
        ],
    }
    coco.createIndex()
    return coco


def _hotcoco(truth: _Boxes, found: _Boxes, num_classes: int, config: EvaluationConfig) -> Tables:
    """Evaluate all classes at once."""
    import hotcoco

    global _hotcoco_process
    _hotcoco_process = os.getpid()
    assert truth.iscrowd is not None and found.scores is not None, "ground truth and detections are exchanged"
    images = np.union1d(truth.images, found.images).tolist()
    coco_truth = hotcoco.COCO.from_arrays(
        [{"id": image} for image in images],
        [{"id": label, "name": str(label)} for label in range(num_classes)],
        truth.images,
        truth.labels,
        truth.boxes,
        ids=np.arange(1, len(truth) + 1),
        area=truth.area,
        iscrowd=truth.iscrowd.astype(np.int64),
    )
    rows = np.column_stack([found.images, found.boxes, found.scores, found.labels]).astype(np.float64)
    run = hotcoco.COCOeval(coco_truth, coco_truth.load_res(rows), "bbox")
    run.params.max_dets = list(config.max_dets)
    run.params.area_rng = _area_ranges(config)
    run.params.area_rng_lbl = ["all", *config.area_ranges]
    run.evaluate()
    run.accumulate()
    tables = run.eval
    assert tables is not None, "accumulate() fills them"
    return np.array(tables["precision"], np.float64), np.array(tables["recall"], np.float64)
