"""95 % intervals of all metrics by a bootstrap over images, from the matches of one evaluation.

A resample draws as many images as there are, with replacement. It is a row of weights: how often each image was drawn. Matches
do not change with it, so the metrics of a resample are weighted counts, and precision is needed at the hits only.
Intervals are the 2.5th and 97.5th percentile (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13). Two
detectors are compared on the same resamples, which removes what is common to both: some images are harder than others.

Letters: R resamples, T IoU thresholds, E area ranges, X limits of detections, K classes, I images, D detections.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fpn_det.evaluation.config import EvaluationConfig
from fpn_det.evaluation.curves import average_precision
from fpn_det.evaluation.matching import NOTHING, Matches
from fpn_det.evaluation.outcomes import Outcomes

MAX_CELLS = 4_000_000  # of weights by resample and detection, held at once
CONFIDENCE = 0.95

Weights = NDArray[np.float64]  # [R, I]


@dataclass(frozen=True)
class Interval:
    """A number and the interval that holds the true one with a confidence of 95 %; None where it is undefined."""

    value: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, value: float | None, resampled: NDArray[np.float64]) -> Interval:
        """Take percentiles of the resampled numbers [R]; NaN where a resample does not define it."""
        defined = resampled[~np.isnan(resampled)]
        if value is None or not len(defined):
            return cls(value, None, None)
        low, high = np.quantile(defined, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return cls(value, float(low), float(high))

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Resampled:
    """Metrics of every resample, [R] each; NaN where undefined."""

    metrics: dict[str, NDArray[np.float64]]  # by the names of EvaluationConfig.metric_names, and F1, precision, recall
    per_class: dict[str, dict[str, NDArray[np.float64]]]  # class name -> AP, AP50, AR, F1, precision, recall


def draw_weights(num_images: int, resamples: int, seed: int = 0) -> Weights:
    """Draw how often each image is in each resample. The first half of more resamples is not that of fewer.

    Args:
        num_images: of the evaluation.
        resamples: number of rows.
        seed: equal seeds give equal weights, as a paired comparison needs.
    """
    rng = np.random.default_rng(seed)
    share = np.full(num_images, 1 / max(num_images, 1))
    return rng.multinomial(num_images, share, size=resamples).astype(np.float64)


def resample(matches: Matches, outcomes: Outcomes, config: EvaluationConfig, weights: Weights) -> Resampled:
    """Compute all metrics of every resample.

    With weights of one they are those of the evaluation itself.

    Args:
        matches: at COCO's IoU thresholds, by area.
        outcomes: at the operating point, whose thresholds are not searched again.
        config: of the evaluation.
        weights: [R, I], of the images in `matches.images`.
    """
    annotations, (num_areas, num_ious, _) = matches.annotations, matches.matched.shape
    shape = (len(weights), num_ious, annotations.num_classes, num_areas)
    precision, recall = np.full(shape, np.nan), np.full(shape, np.nan)
    limited = np.full((*shape[:3], len(config.max_dets)), np.nan)
    for label in range(annotations.num_classes):
        rows = matches.of_class(label)
        objects = np.flatnonzero(matches.object_labels == label)
        totals = [  # of the objects in each area range, [R]
            weights
            @ np.bincount(
                matches.object_images[objects[matches.object_in_area[area, objects]]], minlength=weights.shape[1]
            )
            for area in range(num_areas)
        ]
        if not len(objects):
            continue
        size = max(MAX_CELLS // max(rows.stop - rows.start, 1), 1)
        for start in range(0, len(weights), size):
            part = slice(start, start + size)
            drawn = weights[part][:, matches.detection_images[rows]]  # [r, d]
            for area in range(num_areas):
                total = np.where(totals[area][part] > 0, totals[area][part], np.nan)
                for iou, (ap, hits, places) in enumerate(_curves(matches, rows, area, drawn, total)):
                    precision[part, iou, label, area] = ap
                    recall[part, iou, label, area] = hits[:, -1:].sum(axis=1) / total
                    if area:
                        continue
                    ranks = matches.ranks[rows][places]
                    for x, limit in enumerate(config.max_dets):
                        limited[part, iou, label, x] = drawn[:, places[ranks < limit]].sum(axis=1) / total
    counts = _count(outcomes, weights)
    return _summarize(precision, recall, limited, counts, annotations.class_names, config)


def _curves(
    matches: Matches, rows: slice, area: int, drawn: NDArray[np.float64], total: NDArray[np.float64]
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]]:
    """Yield for each IoU threshold the AP [r], the hits up to each hit [r, h], and the places of the hits [h]."""
    in_area = matches.detection_in_area[area, rows]
    inside = (drawn * in_area).cumsum(axis=1)
    for matched in matches.matched[area, :, rows]:
        is_hit = matched >= 0
        places = np.flatnonzero(is_hit)
        hits = drawn[:, places].cumsum(axis=1)
        # what counts differs from what is in the area at few detections: those on crowds and on objects of another size
        counts = is_hit | ((matched == NOTHING) & in_area)
        other = np.flatnonzero(counts != in_area)
        counted = inside[:, places]
        if len(other):
            change = (drawn[:, other] * np.where(counts[other], 1.0, -1.0)).cumsum(axis=1)
            change = np.concatenate([np.zeros((len(drawn), 1)), change], axis=1)
            counted = counted + change[:, np.searchsorted(other, places, side="right")]
        yield average_precision(hits, counted, total), hits, places


def _count(outcomes: Outcomes, weights: Weights) -> NDArray[np.float64]:
    """Weighted counts of hits, detections and objects of each class at the operating point, [R, K, 3]."""
    matches = outcomes.matches
    num_classes, num_images = matches.annotations.num_classes, weights.shape[1]
    counts = np.zeros((len(weights), num_classes, 3))
    columns = (
        (matches.detection_labels, matches.detection_images, outcomes.is_hit),
        (matches.detection_labels, matches.detection_images, outcomes.shown),
        (matches.object_labels, matches.object_images, np.ones(len(matches.objects), bool)),
    )
    for column, (labels, images, kept) in enumerate(columns):
        for label in np.unique(labels[kept]).tolist():
            per_image = np.bincount(images[kept & (labels == label)], minlength=num_images)
            counts[:, label, column] = weights @ per_image
    return counts


def _summarize(
    precision: NDArray[np.float64],
    recall: NDArray[np.float64],
    limited: NDArray[np.float64],
    counts: NDArray[np.float64],
    class_names: tuple[str, ...],
    config: EvaluationConfig,
) -> Resampled:
    """Average the tables as COCO does: classes without objects are left out."""
    areas = range(1, precision.shape[3])
    metrics = {
        "AP": _mean(precision[..., 0]),
        "AP50": _mean(precision[:, :1, :, 0]),
        "AP75": _mean(precision[:, 5:6, :, 0]),
        **{f"AP{name}": _mean(precision[..., area]) for name, area in zip(config.area_ranges, areas, strict=True)},
        **{f"AR{limit}": _mean(limited[..., x]) for x, limit in enumerate(config.max_dets)},
        **{f"AR{name}": _mean(recall[..., area]) for name, area in zip(config.area_ranges, areas, strict=True)},
        **_at_point(counts.sum(axis=1)),
    }
    per_class = {
        name: {
            "AP": _mean(precision[:, :, label, :1]),
            "AP50": _mean(precision[:, :1, label, :1]),
            "AR": _mean(recall[:, :, label, :1]),
            **_at_point(counts[:, label]),
        }
        for label, name in enumerate(class_names)
    }
    return Resampled(metrics, per_class)


def _mean(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Average what is defined in each resample, [R]."""
    table = table.reshape(len(table), -1)
    defined = ~np.isnan(table)
    count = defined.sum(axis=1)
    total = np.where(defined, table, 0).sum(axis=1)
    return np.divide(total, count, out=np.full(len(table), np.nan), where=count > 0)


def _at_point(counts: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """F1, precision and recall from hits, detections and objects [R, 3]."""
    hits, detections, objects = counts.T
    with np.errstate(invalid="ignore"):
        return {"F1": 2 * hits / (detections + objects), "precision": hits / detections, "recall": hits / objects}
