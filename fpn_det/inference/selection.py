"""Choice of the detections that a prediction shows: by score, by class, and the best of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fpn_det.schema import did_you_mean
from fpn_det.structures import ScoreThresholds


@dataclass(frozen=True)
class Thresholds:
    """Score from which a detection is shown, class by class, and the words that say where it comes from."""

    values: tuple[float, ...]  # [K]
    origin: str

    @classmethod
    def choose(cls, class_names: Sequence[str], score: float | None, saved: ScoreThresholds | None) -> Thresholds:
        """Take `score` for all classes; without it those of a checkpoint; without these every detection of the model.

        Args:
            class_names: of the model.
            score: in [0, 1].
            saved: of a checkpoint.

        Raises:
            ValueError: `score` is not in [0, 1].
        """
        if score is not None:
            if not 0 <= score <= 1:
                raise ValueError(f"score: expected a number in 0..1, got {score}.")
            return cls((score,) * len(class_names), f"score >= {score:g}")
        if saved is None:
            zeros = (0.0,) * len(class_names)
            return cls(zeros, "every detection of the model: the checkpoint has no score thresholds")
        values = tuple(saved.of(class_names))
        low, high = min(values), max(values)
        shown = f"{low:.2f}" if high - low < 0.005 else f"{low:.2f} to {high:.2f} by class"
        return cls(values, f"score >= {shown}, the best F1 of the checkpoint's evaluation")


@dataclass(frozen=True)
class Selection:
    """Selects detections of one image.

    Attributes:
        thresholds: f32 [K], a detection's score must not be below that of its class; 2 excludes a class.
        max_detections: the best that are kept; None keeps all.
    """

    thresholds: Tensor
    max_detections: int | None = None

    @classmethod
    def of(
        cls,
        class_names: Sequence[str],
        thresholds: Thresholds,
        classes: Sequence[str] | None = None,
        max_detections: int | None = None,
    ) -> Selection:
        """Build a selection.

        Args:
            class_names: of the model.
            thresholds: of the scores.
            classes: names of the classes to keep; None keeps all.
            max_detections: per image.

        Raises:
            ValueError: a class is unknown, or `max_detections` is not positive.
        """
        if isinstance(classes, str):
            classes = [classes]
        for name in classes or ():
            if name not in class_names:
                known = ", ".join(class_names[:10]) + (", ..." if len(class_names) > 10 else "")
                raise ValueError(f"classes: expected some of {known}, got '{name}'.{did_you_mean(name, class_names)}")
        if max_detections is not None and max_detections < 1:
            raise ValueError(f"max_detections: expected at least 1, got {max_detections}.")
        values = torch.tensor(thresholds.values)
        if classes is not None:
            wanted = torch.tensor([name in classes for name in class_names])
            values = torch.where(wanted, values, 2.0)
        return cls(values, max_detections)

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Select from boxes [D, 4], scores [D] and labels [D], which are sorted by descending score."""
        (kept,) = torch.where(scores >= self.thresholds[labels])
        kept = kept[: self.max_detections]
        return boxes[kept], scores[kept], labels[kept]
