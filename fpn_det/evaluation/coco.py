"""COCO metrics of detections, and average recall of proposals."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fpn_det.evaluation.best_f1 import OperatingPoint, as_thresholds, best_points
from fpn_det.evaluation.config import EvaluationConfig
from fpn_det.evaluation.detection_table import DetectionTable
from fpn_det.evaluation.engines import choose_engine, describe_engine, precision_and_recall, recall_of_proposals
from fpn_det.evaluation.matching import match_detections
from fpn_det.structures import Annotations, ScoreThresholds


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one evaluation. Values are in [0, 1], or None where there is no object to define them."""

    metrics: dict[str, float | None]  # by the names of EvaluationConfig.metric_names
    # class name -> AP, AP50, AR, F1 and its score, precision, recall; objects, detections. Empty for proposals
    per_class: dict[str, dict[str, float | None]]
    num_images: int
    max_detections: int  # the model's limit per image, or that of the metrics per image and class if it is smaller
    capped_images: int  # images that have as many
    detections: DetectionTable  # on rank 0; empty elsewhere
    statistics: dict[str, float] = field(default_factory=dict)  # logged only, such as detections/P2 per image
    seconds: float = 0.0  # duration of detection and scoring
    diagnosis: tuple[str, ...] = ()  # causes of an AP of about 0
    engine: str = ""  # library and version that matched the boxes
    match_iou: float = 0.5  # IoU from which a detection is a hit, for the two below
    best_f1: OperatingPoint | None = None  # of all classes with one score; None without hits, and for proposals
    score_thresholds: ScoreThresholds | None = None  # of the best F1; None where `best_f1` is

    def remarks(self) -> list[str]:
        """Return sentences about what limits the meaning of the metrics."""
        if not self.per_class:
            return []
        remarks = list(self.diagnosis)
        if not any(row["detections"] for row in self.per_class.values()):
            remarks.append("There are no detections.")
        if self.capped_images:
            remarks.append(
                f"{self.capped_images} of {self.num_images} images reached the limit of {self.max_detections} detections."
            )
        absent = sum(row["AP"] is None for row in self.per_class.values())
        if absent:
            remarks.append(f"{absent} of {len(self.per_class)} classes have no objects; the means exclude them.")
        return remarks


def score(
    annotations: Annotations,
    detections: DetectionTable,
    images: NDArray[np.int64],
    config: EvaluationConfig,
    max_detections: int | None = None,
) -> Evaluation:
    """Compute AP and AR of detections, or AR of proposals.

    Args:
        annotations: the ground truth.
        detections: in the original frame. Those of images not in `images` are ignored.
        images: rows of `annotations` that were evaluated, including images without detections.
        config: metrics to compute.
        max_detections: limit of the model per image; by default the last of `max_dets`.
    """
    assert len(np.unique(images)) == len(images), "an image was evaluated more than once"
    last = config.max_dets[-1]
    limit = min(max_detections or last, last)
    by_class = max_detections is None or limit < max_detections  # as COCO counts
    capped_images = _count_capped(detections, limit, by_class)
    engine = describe_engine(choose_engine(config))
    if config.target == "proposals":
        recall = recall_of_proposals(annotations, detections, images, config)
        metrics = dict(zip(config.metric_names, map(mean_of_defined, recall.reshape(len(recall), -1).T), strict=True))
        return Evaluation(metrics, {}, len(images), limit, capped_images, detections, engine=engine)
    precision, recall = precision_and_recall(annotations, detections, images, config)
    metrics = {
        "AP": mean_of_defined(precision[..., 0, -1]),
        "AP50": mean_of_defined(precision[0, ..., 0, -1]),
        "AP75": mean_of_defined(precision[5, ..., 0, -1]),
        **{f"AP{name}": mean_of_defined(precision[..., area, -1]) for area, name in enumerate(config.area_ranges, 1)},
        **{f"AR{limit}": mean_of_defined(recall[..., 0, x]) for x, limit in enumerate(config.max_dets)},
        **{f"AR{name}": mean_of_defined(recall[..., area, -1]) for area, name in enumerate(config.area_ranges, 1)},
    }
    num_classes = annotations.num_classes
    evaluated = np.isin(annotations.image_of_boxes.numpy(), images) & ~annotations.iscrowd.numpy()
    num_objects = np.bincount(annotations.labels.numpy()[evaluated], minlength=num_classes)
    num_detections = np.bincount(detections.labels, minlength=num_classes)
    matches = match_detections(annotations, detections, images, config, np.array([config.match_iou]))
    best_f1, points = best_points(matches)
    per_class = {
        name: {
            "AP": mean_of_defined(precision[:, :, k, 0, -1]),
            "AP50": mean_of_defined(precision[0, :, k, 0, -1]),
            "AR": mean_of_defined(recall[:, k, 0, -1]),
            **_at_best_f1(point),
            "objects": int(num_objects[k]),
            "detections": int(num_detections[k]),
        }
        for k, (name, point) in enumerate(zip(annotations.class_names, points, strict=True))
    }
    return Evaluation(
        metrics,
        per_class,
        len(images),
        limit,
        capped_images,
        detections,
        engine=engine,
        match_iou=config.match_iou,
        best_f1=best_f1,
        score_thresholds=as_thresholds(best_f1, points, annotations.class_names),
    )


def _count_capped(detections: DetectionTable, limit: int, by_class: bool) -> int:
    """Count the images that have `limit` detections, of one class if `by_class`."""
    columns = [detections.images, detections.labels] if by_class else [detections.images]
    groups, counts = np.unique(np.stack(columns), axis=1, return_counts=True)
    return len(np.unique(groups[0, counts >= limit]))


def _at_best_f1(point: OperatingPoint | None) -> dict[str, float | None]:
    if point is None:
        return dict.fromkeys(("F1", "score", "precision", "recall"))
    return {"F1": point.f1, "score": point.score, "precision": point.precision, "recall": point.recall}


def mean_of_defined(values: NDArray[np.float64]) -> float | None:
    """Average the values that are not NaN; None if there are none."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else None
