"""Conventions of torchvision, detectron2 and mmdetection that decide the last bit of their results.

Each class changes one convention of ours. configs/experiment/compat combines them, so that weights of a project give its
own detections, losses and gradients. They are for parity, not for new recipes: results then depend on how a batch is
divided, and suppression compares boxes that were shifted by float32 offsets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torchvision
from torch import Tensor

from fpn_det.boxes import BoxCoder, box_area
from fpn_det.models.anchors import AnchorGenerator, boxes_of_sizes
from fpn_det.models.detector import Detector
from fpn_det.models.layers import set_foldable
from fpn_det.models.matching import Matcher
from fpn_det.models.roi_align import LevelAssigner, RoIAlign
from fpn_det.models.roi_head import ROIHead
from fpn_det.models.rpn import RPN, RPNHead, RPNOutput
from fpn_det.models.selection import DetectionFilter, ProposalFilter
from fpn_det.structures import Batch, Candidates, Detections, Pyramid, Sample

# Anchors


class RoundedAnchors(AnchorGenerator):
    """torchvision: corners rounded to whole px, strides inferred from the sizes of the maps."""

    def make_cell(self, sizes: Sequence[float], ratios: Sequence[float]) -> Tensor:
        return super().make_cell(sizes, ratios).round()

    def steps(self, shapes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        canvas = [side * self.strides[0] for side in shapes[0]]
        return [(canvas[0] // height, canvas[1] // width) for height, width in shapes]


class Float64Anchors(AnchorGenerator):
    """detectron2: anchors computed in float64, which decides which of many equally good anchors is the best one."""

    def make_cell(self, sizes: Sequence[float], ratios: Sequence[float]) -> Tensor:
        return boxes_of_sizes(sizes, ratios, torch.float64).float()


# Matching


@dataclass(frozen=True)
class UntouchedMatcher(Matcher):
    """torchvision, detectron2: a box that no anchor touches makes every anchor positive."""

    def is_eligible(self, best_iou: Tensor) -> Tensor:
        return best_iou > -1


@dataclass(frozen=True)
class ReassigningMatcher(Matcher):
    """mmdetection: low-quality matches from IoU 0.3 on, which take the box that they are the best for (the last one)."""

    def is_eligible(self, best_iou: Tensor) -> Tensor:
        return best_iou > 0.2999999

    def reassign(self, matched_idxs: Tensor, is_best: Tensor) -> Tensor:
        order = torch.arange(1, is_best.shape[1] + 1, device=is_best.device)[:, None]
        owner = (is_best * order).amax(dim=1)  # box + 1, 0 for none
        return torch.where(owner > 0, owner - 1, matched_idxs)


# Suppression and selection


def shifted_nms(boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float) -> Tensor:
    """mmdetection: labels are separated by shifting boxes in float32. Returns indices, best first."""
    shifts = labels * (boxes.max() + 1)
    return torchvision.ops.nms(boxes + shifts[:, None], scores, iou_threshold)


Nms = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def suppress_each_image(
    boxes: Tensor, scores: Tensor, valid: Tensor, labels: Tensor, iou_threshold: float, nms: Nms
) -> Tensor:
    """Mask [B, P] of the boxes [B, P, 4] that `nms` keeps, called once per image on its valid boxes."""
    keep = torch.zeros_like(valid)
    for row, mask in enumerate(valid):
        (chosen,) = torch.where(mask)
        if len(chosen):
            kept = nms(boxes[row, chosen], scores[row, chosen], labels[row, chosen], iou_threshold)
            keep[row, chosen[kept]] = True
    return keep


@dataclass(frozen=True)
class BatchedNmsProposals(ProposalFilter):
    """detectron2: `torchvision.ops.batched_nms` over the levels of an image."""

    @property
    def nms(self) -> Nms:
        return torchvision.ops.batched_nms

    def suppress(self, boxes: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # a graph has fixed shapes: the same suppression up to rounding
            return super().suppress(boxes, scores, valid)
        levels = torch.arange(boxes.shape[1], device=boxes.device)[:, None].expand_as(valid).flatten(1)
        keep = suppress_each_image(
            boxes.flatten(1, 2), scores.flatten(1), valid.flatten(1), levels, self.nms_iou, self.nms
        )
        return keep.view_as(valid)


@dataclass(frozen=True)
class ProbabilityAfterTopK(BatchedNmsProposals):
    """torchvision: suppression ranks by probabilities, of which large ones are equal in float32."""

    def top(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        logits, idxs = super().top(logits)
        return torch.where(logits.isfinite(), logits.sigmoid(), -torch.inf), idxs


@dataclass(frozen=True)
class ProbabilityBeforeTopK(BatchedNmsProposals):
    """mmdetection: ranks by probabilities before top-k too; of equal ones the first ranks higher."""

    @property
    def nms(self) -> Nms:
        return shifted_nms

    def top(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.where(logits.isfinite(), logits.sigmoid(), -torch.inf)
        ranked, idxs = scores.sort(dim=1, descending=True, stable=True)
        return ranked[:, : self.pre_nms], idxs[:, : self.pre_nms]


@dataclass(frozen=True)
class BatchedNmsDetections(DetectionFilter):
    """`torchvision.ops.batched_nms` over the classes of an image."""

    @property
    def nms(self) -> Nms:
        return torchvision.ops.batched_nms

    @property
    def suppresses_by_class(self) -> bool:  # type: ignore[override]
        """True in a graph, which has fixed shapes: the same suppression up to rounding."""
        return torch.compiler.is_compiling()

    first_label: ClassVar[int] = 0  # number of the first class, by which boxes are shifted

    def suppress(self, boxes: Tensor, scores: Tensor, valid: Tensor, labels: Tensor, batch: Batch) -> Tensor:
        return suppress_each_image(boxes, scores, valid, labels + self.first_label, self.nms_iou, self.nms)


@dataclass(frozen=True)
class TorchvisionDetections(BatchedNmsDetections):
    """torchvision: classes count from 1."""

    first_label: ClassVar[int] = 1


@dataclass(frozen=True)
class Detectron2Detections(BatchedNmsDetections):
    """detectron2: detections without area are left out after the best were chosen."""

    def __call__(self, candidates: Candidates, batch: Batch) -> Detections:
        found = super().__call__(candidates, batch)
        valid = found.valid & (box_area(found.boxes) > 0)
        boxes = torch.where(valid[..., None], found.boxes, 0.0)
        return replace(found, boxes=boxes, scores=found.scores.masked_fill(~valid, 0.0), valid=valid)


@dataclass(frozen=True)
class MmdetDetections(BatchedNmsDetections):
    """mmdetection: boxes are compared in the original frame."""

    @property
    def nms(self) -> Nms:
        return shifted_nms

    def suppress(self, boxes: Tensor, scores: Tensor, valid: Tensor, labels: Tensor, batch: Batch) -> Tensor:
        original = boxes * (batch.original_sizes / batch.sizes).flip(1).repeat(1, 2)[:, None]
        return super().suppress(original, scores, valid, labels, batch)


# Box coding and pooling


@dataclass(frozen=True)
class BoundedBoxCoder(BoxCoder):
    """mmdetection: log scales are clamped at both ends."""

    min_log_scale: ClassVar[float] = -math.log(1000 / 16)


class TorchvisionLevelAssigner(LevelAssigner):
    """torchvision: epsilon after the logarithm, so that a box just below a limit counts as on it."""

    def level(self, scale: Tensor) -> Tensor:
        return torch.floor(self.canonical_level + torch.log2(scale) + 1e-6)


class MmdetLevelAssigner(LevelAssigner):
    """mmdetection: a larger epsilon."""

    def level(self, scale: Tensor) -> Tensor:
        return torch.floor(self.canonical_level + torch.log2(scale + 1e-6))


class TorchvisionRoIAlign(RoIAlign):
    """RoIAlign with torchvision's assignment of levels."""

    assigner_class = TorchvisionLevelAssigner


class MmdetRoIAlign(RoIAlign):
    """RoIAlign with mmdetection's assignment of levels."""

    assigner_class = MmdetLevelAssigner


# Stages


class SeparateRPNHead(RPNHead):
    """The siblings as two convolutions; one convolution differs in the last bits."""

    def predictors(self, num_levels: int) -> list[Callable[[Tensor], Tensor]]:
        def predict(hidden: Tensor) -> Tensor:
            return torch.cat([self.objectness(hidden), self.deltas(hidden)], dim=1)

        return [predict] * num_levels


class SampledRPN(RPN):
    """torchvision, detectron2: losses divided by the number of samples; anchors in the padding count as all others."""

    divides_by_num_sampled: ClassVar[bool] = True

    def loss_divisor(self, sample: Sample) -> Tensor:
        return sample.valid.sum().clamp(min=1)

    def inside(self, pyramid: Pyramid) -> Tensor:
        num_anchors = sum(height * width for height, width in pyramid.shapes) * self.anchors.num_per_cell
        return pyramid.sizes.new_ones(pyramid.sizes.shape[0], num_anchors, dtype=torch.bool)


class MmdetRPN(RPN):
    """mmdetection: every image counts at least one positive and one negative; anchors in the padding are proposed."""

    coder: ClassVar[BoxCoder] = BoundedBoxCoder()
    divides_by_num_sampled: ClassVar[bool] = True

    def loss_divisor(self, sample: Sample) -> Tensor:
        counts = torch.stack([sample.positive.sum(dim=1), (sample.valid & ~sample.positive).sum(dim=1)])
        return counts.clamp(min=1).sum()

    def proposable(self, output: RPNOutput) -> Tensor:
        return torch.ones_like(output.inside)


class SampledROIHead(ROIHead):
    """Losses divided by the number of samples."""

    divides_by_num_sampled: ClassVar[bool] = True

    def loss_divisor(self, sample: Sample) -> Tensor:
        return sample.valid.sum().clamp(min=1)


class UnfoldedDetector(Detector):
    """Convolutions and norms in the order of the other projects: folding them differs in the last bits."""

    def reset_classifier(self, num_classes: int) -> None:
        super().reset_classifier(num_classes)
        set_foldable(self, False)
