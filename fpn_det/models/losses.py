"""Classification and box losses, and their sums over sampled candidates.

A loss returns a value for each candidate. The RPN and the ROI head sum it over their samples and divide by a constant,
which is known in advance on every rank, so that accumulation and more ranks change nothing.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from fpn_det.boxes import BoxCoder, box_area, box_sides
from fpn_det.schema import Amount, Fraction, Positive

EPS = 1e-7  # added to areas and lengths that are divided by


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
class Focal:
    """Focal loss of objectness logits (Lin et al. 2017, eq. 5): cross-entropy with less weight on what is already right.

    It is meant for many easy negatives, as with a larger `num_samples` of the sampler. The RPN divides by that number, where the
    paper divides by the anchors of objects: set `weight` in proportion to it, and that of the box loss too.
    """

    alpha: Fraction = 0.25  # weight of positives; negatives have 1 - alpha
    gamma: Amount = 2.0  # exponent of the probability of the wrong answer; 0 = cross-entropy weighted by alpha
    weight: Positive = 1.0  # of the loss

    def __call__(self, logits: Tensor, positive: Tensor) -> Tensor:
        """Logits [...] and bool labels [...] to losses [...]."""
        return self.weight * sigmoid_focal_loss(logits, positive.float(), self.alpha, self.gamma)


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy of class logits (Fast R-CNN, eq. 1)."""

    label_smoothing: Fraction = 0.0  # share of the target spread over all classes

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits [N, K + 1] and labels [N] to losses [N]."""
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)


class WeightedCrossEntropy(nn.Module):
    """Cross-entropy with a weight for each class, for classes of very different frequency.

    Args:
        class_weights: of the K classes in their order, then of the background; K + 1 numbers.
        label_smoothing: share of the target spread over all classes.
    """

    def __init__(self, class_weights: tuple[Positive, ...], label_smoothing: Fraction = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.register_buffer("class_weights", torch.tensor(class_weights), persistent=False)
        self.class_weights: Tensor

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits [N, K + 1] and labels [N] to losses [N].

        Raises:
            ValueError: the number of weights is not K + 1.
        """
        if logits.shape[1] != len(self.class_weights):
            raise ValueError(
                f"model.roi_head.cls_loss.class_weights: expected {logits.shape[1]} weights, one for each class and the last "
                f"for the background, got {len(self.class_weights)}."
            )
        return F.cross_entropy(
            logits, labels, self.class_weights, reduction="none", label_smoothing=self.label_smoothing
        )


@dataclass(frozen=True)
class SmoothL1:
    """Smooth L1 distance of box deltas, summed over the four (Fast R-CNN, eq. 3)."""

    beta: Amount = 0.0  # below it the loss is quadratic; 0 = L1

    def __call__(self, deltas: Tensor, gt_boxes: Tensor, references: Tensor, coder: BoxCoder) -> Tensor:
        """Losses [...] of deltas [..., 4]; see `BoxLoss`."""
        target_deltas = coder.encode(gt_boxes, references)
        return F.smooth_l1_loss(deltas, target_deltas, reduction="none", beta=self.beta).sum(-1)


@dataclass(frozen=True)
class DecodedBoxLoss(ABC):
    """A loss of the overlap of decoded boxes with their ground truth, by which the four deltas are learned together.

    torchvision's losses of the same names have the same values, but read the device.
    """

    weight: Positive = (
        10.0  # of the loss; it suits the second stage, where deltas are multiplied by 10. 1 suits the RPN
    )

    def __call__(self, deltas: Tensor, gt_boxes: Tensor, references: Tensor, coder: BoxCoder) -> Tensor:
        """Losses [...] of deltas [..., 4]; see `BoxLoss`."""
        return self.weight * self.of_boxes(coder.decode(deltas, references), gt_boxes)

    @abstractmethod
    def of_boxes(self, boxes: Tensor, gt_boxes: Tensor) -> Tensor:
        """Losses [...] of decoded boxes [..., 4]."""


@dataclass(frozen=True)
class IoU(DecodedBoxLoss):
    """-log(IoU) (UnitBox, Yu et al. 2016, eq. 1); without overlap it is constant."""

    def of_boxes(self, boxes: Tensor, gt_boxes: Tensor) -> Tensor:
        """Losses [...] of decoded boxes [..., 4]."""
        return -_iou_and_union(boxes, gt_boxes)[0].clamp(min=1e-6).log()


@dataclass(frozen=True)
class GIoU(DecodedBoxLoss):
    """1 - IoU, and the part of the enclosing box that neither covers (Rezatofighi et al. 2019, Algorithm 1)."""

    def of_boxes(self, boxes: Tensor, gt_boxes: Tensor) -> Tensor:
        """Losses [...] of decoded boxes [..., 4]."""
        iou, union = _iou_and_union(boxes, gt_boxes)
        enclosing = _enclosing_sides(boxes, gt_boxes).prod(dim=-1)
        return 1 - iou + (enclosing - union) / (enclosing + EPS)


@dataclass(frozen=True)
class DIoU(DecodedBoxLoss):
    """1 - IoU, and the squared distance of the centers relative to the enclosing diagonal (Zheng et al. 2020, eq. 7)."""

    def of_boxes(self, boxes: Tensor, gt_boxes: Tensor) -> Tensor:
        """Losses [...] of decoded boxes [..., 4]."""
        return 1 - _iou_and_union(boxes, gt_boxes)[0] + self.distance(boxes, gt_boxes)

    def distance(self, boxes: Tensor, gt_boxes: Tensor) -> Tensor:
        """Squared distance [...] of the centers relative to the squared diagonal of the enclosing box."""
        shift = (boxes[..., :2] + boxes[..., 2:] - gt_boxes[..., :2] - gt_boxes[..., 2:]) / 2
        diagonal = _enclosing_sides(boxes, gt_boxes).square().sum(dim=-1)
        return shift.square().sum(dim=-1) / (diagonal + EPS)


@dataclass(frozen=True)
class CIoU(DIoU):
    """DIoU, and the difference of the aspect ratios (Zheng et al. 2020, eq. 8 to 11)."""

    def of_boxes(self, boxes: Tensor, gt_boxes: Tensor) -> Tensor:
        """Losses [...] of decoded boxes [..., 4]."""
        iou = _iou_and_union(boxes, gt_boxes)[0]
        angles = [torch.atan2(*box_sides(both)) for both in (gt_boxes, boxes)]
        difference = 4 / math.pi**2 * (angles[0] - angles[1]).square()
        trade_off = (difference / (1 - iou + difference + EPS)).detach()  # eq. 11, a constant to the gradient
        return 1 - iou + self.distance(boxes, gt_boxes) + trade_off * difference


def _iou_and_union(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and area of the union [...] of boxes [..., 4] and others [..., 4], row by row, with a gradient."""
    low, high = torch.maximum(boxes[..., :2], others[..., :2]), torch.minimum(boxes[..., 2:], others[..., 2:])
    intersection = (high - low).clamp(min=0).prod(dim=-1)
    union = box_area(boxes) + box_area(others) - intersection
    return intersection / (union + EPS), union


def _enclosing_sides(boxes: Tensor, others: Tensor) -> Tensor:
    """Width and height [..., 2] of the smallest box around boxes [..., 4] and others [..., 4], row by row."""
    return torch.maximum(boxes[..., 2:], others[..., 2:]) - torch.minimum(boxes[..., :2], others[..., :2])


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of `values` where `mask`; NaN or infinity elsewhere does not count."""
    return torch.where(mask, values, 0.0).sum()
