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
    """Counts of the detections from each distinct score on, by descending score, and what follows from them; [S] each."""

    scores: NDArray[np.float64]
    hits: NDArray[np.int64]
    detections: NDArray[np.int64]
    num_objects: int

    @property
    def precision(self) -> NDArray[np.float64]:
        return self.hits / self.detections

    @property
    def recall(self) -> NDArray[np.float64]:
        return self.hits / max(self.num_objects, 1)

    @property
    def f1(self) -> NDArray[np.float64]:
        return 2 * self.hits / (self.detections + self.num_objects)


def curve_of(matches: Matches, label: int | None) -> Curve:
    """Count the hits of one class, or of all classes with one score for all, at the first IoU threshold.

    Equal scores count together. Detections on crowd regions are left out.
    """
    rows = np.arange(len(matches.scores)) if label is None else np.r_[matches.of_class(label)]
    matched = matches.matched[0, 0]
    rows = rows[matched[rows] != IGNORED]
    rows = rows[np.argsort(-matches.scores[rows], kind="stable")]
    scores = matches.scores[rows]
    last = np.flatnonzero(np.diff(scores, append=-np.inf))
    num_objects = len(matches.objects) if label is None else int((matches.object_labels == label).sum())
    return Curve(scores[last], (matched[rows] >= 0).cumsum()[last], last + 1, num_objects)


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
