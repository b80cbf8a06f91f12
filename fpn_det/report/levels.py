"""The part of each pyramid level in an evaluation: what it proposes, what is pooled from it, what it misses.

A detection has two levels: that of the anchor which proposed it, and the one that a box of its size is pooled from. The second is
also defined for objects, so a missed object counts at the level that it should have been pooled from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fpn_det.data.transforms import Pipeline, input_sizes
from fpn_det.evaluation.detection_table import DetectionTable
from fpn_det.evaluation.matching import NOTHING, Matches
from fpn_det.evaluation.outcomes import Outcomes
from fpn_det.models.detector import Detector


@dataclass(frozen=True)
class Levels:
    """Levels of the objects and detections of `matches`, as indices in `names`. Letters as in `evaluation.matching`.

    Boxes are pooled by their size in the input frame of the whole image, also those that were found in a tile or at another scale.
    A detection of a tile was proposed in the pyramid of that tile.
    """

    names: list[str]  # of the L levels of the pyramid, P2, ...
    objects: NDArray[np.int64]  # [G], pooled from
    detections: NDArray[np.int64]  # [D], pooled from
    proposals: NDArray[np.int64] | None  # [D], proposed by; None for a detector without RPN

    def counts(self, outcomes: Outcomes) -> list[Mapping[str, str | int]]:
        """Count by level: shown detections proposed by it and pooled from it, and objects to be pooled from it."""
        hit, false, missed = outcomes.is_hit, outcomes.shown & ~outcomes.is_hit, ~outcomes.is_found
        columns = [("pooled: hits", self.detections, hit), ("pooled: false", self.detections, false)]
        if self.proposals is not None:
            columns[:0] = [("proposed: hits", self.proposals, hit), ("proposed: false", self.proposals, false)]
        columns += [("objects", self.objects, np.ones_like(missed)), ("missed", self.objects, missed)]
        counts = {name: np.bincount(levels[kept], minlength=len(self.names)) for name, levels, kept in columns}
        return [
            {"level": level} | {name: int(column[index]) for name, column in counts.items()}
            for index, level in enumerate(self.names)
        ]

    def finders(self, outcomes: Outcomes) -> NDArray[np.int64] | None:
        """Count objects by their level (rows) and the level that proposed their hit (columns), i64 [L, L + 1].

        The last column is missed objects, so rows sum to the objects. None for a detector without RPN.
        """
        if self.proposals is None:
            return None
        matrix = np.zeros((len(self.names), len(self.names) + 1), np.int64)
        taken = outcomes.detection_of
        proposed = np.append(self.proposals, NOTHING)[taken]  # an object without a detection reads the last
        columns = np.where(outcomes.is_found, proposed, len(self.names))
        np.add.at(matrix, (self.objects, columns), 1)
        return matrix


def find_levels(matches: Matches, detections: DetectionTable, model: Detector, transform: Pipeline) -> Levels:
    """Find the levels of all objects and detections of an evaluation of all images.

    Args:
        matches: of `detections`.
        detections: in the original frame.
        model: whose level assigner is used; its weights are not.
        transform: of the evaluation.
    """
    sizes = matches.annotations.sizes.numpy()
    scale = np.tile((input_sizes(sizes, transform) / np.maximum(sizes, 1))[:, ::-1], 2)

    def pooled_from(boxes: NDArray, images: NDArray[np.int64]) -> NDArray[np.int64]:
        return model.assigner(torch.from_numpy(boxes.astype(np.float64) * scale[images])).numpy()

    proposals = detections.anchor_levels
    return Levels(
        [f"P{stride.bit_length() - 1}" for stride in model.neck.strides],
        pooled_from(matches.annotations.boxes.numpy()[matches.objects], matches.object_images),
        pooled_from(detections.boxes[matches.detections], matches.detection_images),
        None if proposals is None else proposals[matches.detections],
    )
