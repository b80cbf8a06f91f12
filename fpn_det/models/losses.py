"""Classification and box losses, and their sums over sampled candidates.

A loss returns a value for each candidate. The RPN and the ROI head sum it over their samples and divide by a constant,
which is known in advance on every rank, so that accumulation and more ranks change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fpn_det.boxes import BoxCoder
from fpn_det.schema import Amount, Fraction


class BinaryLoss(Protocol):
    """A loss of objectness logits."""

    def __call__(self, logits: Tensor, positive: Tensor) -> Tensor:
        """Logits [...] and bool labels [...] to losses [...]."""


class ClassLoss(Protocol):
    """A loss of class logits."""

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits [N, K + 1], of which the last is the background, and labels [N] in [0, K] to losses [N]."""


class BoxLoss(Protocol):
    """A loss of predicted boxes."""

    def __call__(self, deltas: Tensor, gt_boxes: Tensor, references: Tensor, coder: BoxCoder) -> Tensor:
        """Losses [...] of predicted deltas.

        Args:
            deltas: predictions [..., 4], encoded by `coder`.
            gt_boxes: boxes [..., 4] that they should decode to; xyxy, px.
            references: anchors or proposals [..., 4] that the deltas are relative to.
            coder: encodes and decodes.
        """


@dataclass(frozen=True)
class BinaryCrossEntropy:
    """Binary cross-entropy of objectness logits (Faster R-CNN, eq. 1)."""

    def __call__(self, logits: Tensor, positive: Tensor) -> Tensor:
        """Logits [...] and bool labels [...] to losses [...]."""
        return F.binary_cross_entropy_with_logits(logits, positive.float(), reduction="none")


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy of class logits (Fast R-CNN, eq. 1)."""

    label_smoothing: Fraction = 0.0  # share of the target spread over all classes

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits [N, K + 1] and labels [N] to losses [N]."""
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class SmoothL1:
    """Smooth L1 distance of box deltas, summed over the four (Fast R-CNN, eq. 3)."""

    beta: Amount = 0.0  # below it the loss is quadratic; 0 = L1

    def __call__(self, deltas: Tensor, gt_boxes: Tensor, references: Tensor, coder: BoxCoder) -> Tensor:
        """Losses [...] of deltas [..., 4]; see `BoxLoss`."""
        target_deltas = coder.encode(gt_boxes, references)
        return F.smooth_l1_loss(deltas, target_deltas, reduction="none", beta=self.beta).sum(-1)


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of `values` where `mask`; NaN or infinity elsewhere does not count."""
    return torch.where(mask, values, 0.0).sum()
