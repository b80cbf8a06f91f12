"""Analysis of the detections of one evaluation, and the comparison of two."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fpn_det.data.transforms import Pipeline
from fpn_det.evaluation.bootstrap import Interval, Resampled, draw_weights, resample
from fpn_det.evaluation.coco import Evaluation
from fpn_det.evaluation.config import EvaluationConfig
from fpn_det.evaluation.engines import IOU_THRESHOLDS
from fpn_det.evaluation.error_types import Errors, find_errors
from fpn_det.evaluation.matching import Matches, match_detections
from fpn_det.evaluation.outcomes import Outcomes, find_outcomes
from fpn_det.evaluation.suspects import Suspect, find_suspects
from fpn_det.image_io import MAX_PIXELS
from fpn_det.models.detector import Detector
from fpn_det.report.levels import Levels, find_levels
from fpn_det.structures import Annotations

RESAMPLES = 500
ENOUGH_IMAGES = 10  # the interval of fewer is too narrow; that of one has no width


@dataclass(frozen=True)
class Analysis:
    """Everything that the report shows of one evaluation. Letters as in `evaluation.matching`."""

    annotations: Annotations
    evaluation: Evaluation
    config: EvaluationConfig
    matches: Matches  # at `config.match_iou`
    outcomes: Outcomes
    errors: Errors
    resampled: Resampled
    suspects: list[Suspect]
    levels: Levels
    max_pixels: int  # largest width * height of an image

    @property
    def values(self) -> dict[str, float | None]:
        """The metrics of the whole set: COCO's, and precision, recall and F1 with the threshold of each class."""
        matrix = self.outcomes.confusion
        hits, found, objects = np.trace(matrix[:-1, :-1]), matrix[:, :-1].sum(), matrix[:-1].sum()
        point = {
            "F1": _ratio(2 * hits, found + objects),
            "precision": _ratio(hits, found),
            "recall": _ratio(hits, objects),
        }
        names = self.config.metric_names
        return {name: self.evaluation.metrics[name] for name in names} | point

    @property
    def intervals(self) -> dict[str, Interval]:
        return {name: Interval.of(value, self.resampled.metrics[name]) for name, value in self.values.items()}


def analyze(
    annotations: Annotations,
    evaluation: Evaluation,
    config: EvaluationConfig,
    model: Detector,
    transform: Pipeline,
    max_pixels: int = MAX_PIXELS,
) -> Analysis:
    """Match, count and resample the detections of an evaluation of all images.

    Args:
        annotations: the ground truth.
        evaluation: on rank 0, which has the detections.
        config: of the evaluation, whose target is detections.
        model: whose level assigner is used; its weights are not.
        transform: of the evaluation.
        max_pixels: largest width * height of an image.

    Raises:
        ValueError: images were left out, because they cannot be read.
    """
    if evaluation.num_images != len(annotations):
        raise ValueError(
            f"report: expected {len(annotations)} evaluated images, got {evaluation.num_images}, because others cannot be read. "
            "Repair those in bad_files.txt."
        )
    images, detections = np.arange(len(annotations)), evaluation.detections
    matches = match_detections(annotations, detections, images, config, np.array([config.match_iou]))
    outcomes = find_outcomes(matches, detections, evaluation.score_thresholds)
    by_area = match_detections(annotations, detections, images, config, IOU_THRESHOLDS, by_area=True)
    return Analysis(
        annotations,
        evaluation,
        config,
        matches,
        outcomes,
        find_errors(matches, detections),
        resample(by_area, outcomes, config, draw_weights(len(images), RESAMPLES)),
        find_suspects(matches, detections),
        find_levels(matches, detections, model, transform),
        max_pixels,
    )


@dataclass(frozen=True)
class Comparison:
    """Differences of a detector from another one on the same images; positive where the first is better."""

    differences: dict[str, Interval]
    per_class: dict[str, Interval]  # AP by class name
    gained: list[int]  # image rows on which the first detector has more right, the most first
    lost: list[int]
    same_settings: bool  # both were trained with the same settings, up to the seed
    images: int  # of the evaluation

    def verdict(self, name: str, other: str) -> str:
        """Answer in a sentence which of two detectors is better, by their AP.

        The interval covers the choice of the images, not the chance within a training. So two trainings with the same
        settings are not distinguishable, even where the weights of one are better beyond doubt.
        """
        ap = self.differences["AP"]
        if ap.value is None or ap.low is None or ap.high is None:
            return f"{name} and {other} cannot be compared: AP is not defined."
        if self.images < ENOUGH_IMAGES:
            return (
                f"{name} and {other} are not distinguishable: AP of {name} - AP of {other} is {ap.value:+.3f}, on {self.images} "
                f"{'image' if self.images == 1 else 'images'}, which are too few for an interval. Compare them on {ENOUGH_IMAGES} or more."
            )
        better = name if ap.value > 0 else other
        equal = f"{name} and {other} are not distinguishable"
        if not ap.excludes_zero:
            verdict, reason = equal, ""
        elif self.same_settings:
            verdict = equal
            reason = (
                f" Their settings differ in no more than the seed, and seeds alone made the weights of {better} better."
            )
        else:
            verdict, reason = f"{better} is better", " Other seeds of training are not part of the interval."
        return (
            f"{verdict}: AP of {name} - AP of {other} is {ap.value:+.3f}, 95 % interval {ap.low:+.3f} to {ap.high:+.3f} "
            f"(paired bootstrap over {RESAMPLES} resamples of the images).{reason}"
        )


def compare(one: Analysis, other: Analysis, same_settings: bool = False) -> Comparison:
    """Compare two detectors by paired resamples.

    Args:
        one: positive differences say that this one is better.
        other: of another detector on the same images.
        same_settings: both were trained with the same settings, up to the seed.

    Raises:
        ValueError: they were not evaluated on the same images and objects.
    """
    if one.annotations.digest() != other.annotations.digest():
        raise ValueError(
            "against: expected a run evaluated on the same images and annotations, got others. Set split or data.* alike."
        )
    values = other.values
    differences = {
        name: Interval.of(_difference(value, values[name]), one.resampled.metrics[name] - other.resampled.metrics[name])
        for name, value in one.values.items()
    }
    per_class = {}
    for name, row in one.evaluation.per_class.items():
        resampled = one.resampled.per_class[name]["AP"] - other.resampled.per_class[name]["AP"]
        per_class[name] = Interval.of(_difference(row["AP"], other.evaluation.per_class[name]["AP"]), resampled)
    change = mistakes(other) - mistakes(one)
    order = np.argsort(-change, kind="stable")
    return Comparison(
        differences,
        per_class,
        [row for row in order.tolist() if change[row] > 0],
        [row for row in order[::-1].tolist() if change[row] < 0],
        same_settings,
        len(one.annotations),
    )


def mistakes(analysis: Analysis) -> NDArray[np.int64]:
    """Count missed objects and detections that are no hits, by image."""
    matches, outcomes = analysis.matches, analysis.outcomes
    false = matches.detection_images[outcomes.shown & ~outcomes.is_hit]
    missed = matches.object_images[~outcomes.is_found]
    return np.bincount(np.concatenate([false, missed]), minlength=len(matches.images))


def _difference(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None
