"""Average precision from counts; precision, recall and F1 over the score; and the calibration of scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fpn_det.evaluation.matching import IGNORED, Matches

RECALLS = np.linspace(0, 1, 101)  # at which precision is averaged
BINS = 10  # of scores, for the calibration


def average_precision(
    hits: NDArray[np.float64], counted: NDArray[np.float64], total: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Average the precision over RECALLS as COCO does; NaN without objects.

    Args:
        hits: [r, h], number of hits up to each hit, by descending score.
        counted: [r, h], number of detections up to each hit.
        total: [r], number of objects.

    Returns:
        [r], one for each row of counts.
    """
    precision = np.divide(hits, counted, out=np.zeros_like(hits), where=counted > 0)
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    defined = total > 0
    # precision at a recall is that of the first hit that reaches it
    reached = np.searchsorted(RECALLS, hits / np.where(defined, total, 1)[:, None], side="right")
    steps = np.diff(reached, axis=1, prepend=0)
    return np.where(defined, (envelope * steps).sum(axis=1) / len(RECALLS), np.nan)


@dataclass(frozen=True)
class Curve:
    """Precision, recall and F1 of the detections from each distinct score on, by descending score; [S] each."""

    scores: NDArray[np.float64]
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    f1: NDArray[np.float64]


def score_curve(scores: NDArray[np.float64], is_hit: NDArray[np.bool_], num_objects: int) -> Curve:
    """Count from the highest score down. Equal scores count together.

    Args:
        scores: [D], descending; without detections on crowd regions.
        is_hit: [D]
        num_objects: that the detections should find.
    """
    last = np.flatnonzero(np.diff(scores, append=-np.inf))
    hits = is_hit.cumsum()[last]
    found = last + 1
    return Curve(scores[last], hits / found, hits / max(num_objects, 1), 2 * hits / (found + num_objects))


def curve_of(matches: Matches, label: int | None) -> Curve:
    """Return the curve of one class, or of all classes with one score for all, at the first IoU threshold."""
    rows = np.arange(len(matches.scores)) if label is None else np.arange(len(matches.scores))[matches.of_class(label)]
    rows = rows[matches.matched[0, 0, rows] != IGNORED]
    rows = rows[np.argsort(-matches.scores[rows], kind="stable")]
    num_objects = len(matches.objects) if label is None else int((matches.object_labels == label).sum())
    return score_curve(matches.scores[rows], matches.matched[0, 0, rows] >= 0, num_objects)


@dataclass(frozen=True)
class Calibration:
    """Reliability of the scores (Guo et al., On Calibration of Modern Neural Networks, ICML 2017, eq. 3), by bins of score.

    Bins have equal widths over [0, 1]; [BINS] each, NaN in empty bins.
    """

    counts: NDArray[np.int64]  # detections
    mean_scores: NDArray[np.float64]
    precision: NDArray[np.float64]  # share of hits

    @property
    def expected_error(self) -> float | None:
        """ECE: the mean of |precision - score| over the detections; None without detections."""
        if not self.counts.sum():
            return None
        gaps = np.abs(self.precision - self.mean_scores)
        return float(np.nansum(gaps * self.counts) / self.counts.sum())


def calibrate(matches: Matches) -> Calibration:
    """Compare scores with the share of hits at the first IoU threshold, over all classes."""
    matched = matches.matched[0, 0]
    scores, hits = matches.scores[matched != IGNORED], matched[matched != IGNORED] >= 0
    bins = np.minimum((scores * BINS).astype(int), BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    divisor = np.where(counts > 0, counts, np.nan)
    return Calibration(
        counts,
        np.bincount(bins, weights=scores, minlength=BINS) / divisor,
        np.bincount(bins, weights=hits, minlength=BINS) / divisor,
    )
