"""Selection of boxes by score: proposals of the RPN and detections of the ROI head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fpn_det.boxes import box_iou, box_sides
from fpn_det.models.nms import NmsMethod, nms_keep
from fpn_det.schema import Amount, Count, Fraction, Positive
from fpn_det.structures import Batch, Candidates, Detections


@dataclass(frozen=True)
class ProposalFilter:
    """Selects the RPN's boxes that become proposals.

    Args:
        pre_nms: best boxes per level that enter suppression.
        post_nms: best boxes per image that are kept after it.
        nms_iou: suppression threshold, within a level.
        min_side: smallest width and height of a clipped box, px; boxes without area are always left out.
        nms_method: implementation of suppression, all with the same result; `auto` takes the faster one on the device.
    """

    pre_nms: Count
    post_nms: Count
    nms_iou: Fraction = 0.7
    min_side: Amount = 0.0
    nms_method: NmsMethod = "auto"

    def __post_init__(self) -> None:
        if self.pre_nms < 1 or self.post_nms < 1:
            raise ValueError(
                f"proposals: expected pre_nms and post_nms of at least 1, got {self.pre_nms} and {self.post_nms}."
            )

    def top(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and indices [B, up to pre_nms] of the best boxes of a level, best first.

        Args:
            logits: of all boxes of the level [B, M_l]; -inf excludes a box.
        """
        return logits.topk(min(self.pre_nms, logits.shape[1]))

    def suppress(self, boxes: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
        """Mask [B, L, K] of the boxes [B, L, K, 4] that survive suppression within their level."""
        keep = nms_keep(
            boxes.flatten(0, 1), scores.flatten(0, 1), valid.flatten(0, 1), self.nms_iou, method=self.nms_method
        )
        return keep.view_as(valid)


@dataclass(frozen=True)
class DetectionFilter:
    """Selects detections: a threshold, suppression within each class, and the best of what is left.

    Args:
        score_threshold: a detection's score must exceed it.
        nms_iou: suppression threshold, within a class.
        max_detections: D, per image.
        min_side: smallest width and height of a clipped box, px.
        nms_method: implementation of suppression, all with the same result; `auto` takes the faster one on the device.
    """

    score_threshold: Fraction = 0.05
    nms_iou: Fraction = 0.5
    max_detections: Count = 100
    min_side: Amount = 0.0
    nms_method: NmsMethod = "auto"
    suppresses_by_class: ClassVar[bool] = True  # False: `suppress` depends on all classes of an image

    @torch.no_grad()
    def __call__(self, candidates: Candidates, batch: Batch) -> Detections:
        """The detections of each image, best first."""
        num_classes = candidates.scores.shape[2]
        passes = self.passes(candidates)
        scores = torch.where(passes, candidates.scores, -1.0)
        if self.suppresses_by_class and (scores.is_cuda or torch.compiler.is_compiling()):
            keep, order = self._suppress_by_class(candidates.boxes, scores).flatten(1), None
            scores = scores.flatten(1)
            labels = torch.arange(num_classes, device=scores.device).repeat(candidates.scores.shape[1])[None]
            labels = labels.expand_as(scores)
        else:
            # few candidates pass, and suppression of few is fast; the number is a host read
            most = passes.flatten(1).sum(dim=1).max().clamp(min=1)
            _, order = scores.flatten(1).topk(int(most), sorted=False)
            order = order.sort(dim=1).values  # of equal scores the first proposal wins
            scores, labels = scores.flatten(1).gather(1, order), order % num_classes
            keep = self.suppress(_boxes_at(candidates, order), scores, scores > 0, labels, batch)
        scores, best = torch.where(keep, scores, -1.0).sort(dim=1, descending=True, stable=True)
        scores, best = scores[:, : self.max_detections], best[:, : self.max_detections]
        valid = scores > 0
        chosen = best if order is None else order.gather(1, best)
        boxes = _boxes_at(candidates, chosen)
        boxes = torch.where(valid[..., None], boxes, 0.0)
        return Detections(
            boxes, torch.where(valid, scores, 0.0), labels.gather(1, best), valid, _levels_at(candidates, chosen)
        )

    def passes(self, candidates: Candidates) -> Tensor:
        """True for the candidates [B, R, K] of sufficient score and size."""
        passes = (candidates.scores > self.score_threshold) & candidates.valid[..., None]  # NaN fails
        return passes & (torch.minimum(*box_sides(candidates.boxes)) >= self.min_side)

    def suppress(self, boxes: Tensor, scores: Tensor, valid: Tensor, labels: Tensor, batch: Batch) -> Tensor:
        """Mask [B, P] of the boxes [B, P, 4] that survive suppression within their class."""
        return nms_keep(boxes, scores, valid, self.nms_iou, labels, self.nms_method)

    def _suppress_by_class(self, boxes: Tensor, scores: Tensor) -> Tensor:
        """Mask [B, R, K] of what survives; each class of an image is a group. Shapes do not depend on the data."""
        num_images, num_proposals, num_classes = scores.shape
        boxes = boxes.expand(-1, -1, num_classes, -1).transpose(1, 2).flatten(0, 1)  # [B * K, R, 4]
        scores = scores.transpose(1, 2).flatten(0, 1)
        keep = nms_keep(boxes, scores, scores > 0, self.nms_iou, method=self.nms_method)
        return keep.view(num_images, num_classes, num_proposals).transpose(1, 2)


def _boxes_at(candidates: Candidates, idxs: Tensor) -> Tensor:
    """Boxes [B, P, 4] of candidates `idxs` [B, P], which are numbered by proposal, then by class."""
    if candidates.boxes.shape[2] == 1:  # one box for all classes
        idxs = idxs // candidates.scores.shape[2]
    return candidates.boxes.flatten(1, 2).gather(1, idxs[..., None].expand(-1, -1, 4))


def _levels_at(candidates: Candidates, idxs: Tensor) -> Tensor | None:
    """Anchor levels [B, P] of candidates `idxs` [B, P], which are numbered by proposal, then by class."""
    levels, num_classes = candidates.anchor_levels, candidates.scores.shape[2]
    return None if levels is None else levels.gather(1, idxs // num_classes)


@dataclass(frozen=True)
class SoftDetectionFilter(DetectionFilter):
    """Selects detections with Soft-NMS (Bodla et al. 2017, Figure 2): overlap with a better box of the class lowers a score.

    The best box of an image is taken, the scores of the others of its class are lowered, and again, `max_detections` times. So no shape
    depends on the data. A detection whose lowered score does not exceed `score_threshold` is left out.

    Args:
        decay: `linear` multiplies by 1 - IoU from `nms_iou` on, `gaussian` by exp(-IoU^2 / sigma) always.
        sigma: of the Gaussian.
    """

    decay: Literal["linear", "gaussian"] = "gaussian"
    sigma: Positive = 0.5

    @torch.no_grad()
    def __call__(self, candidates: Candidates, batch: Batch) -> Detections:
        """The detections of each image, best first."""
        _, num_proposals, num_classes = candidates.scores.shape
        passes = self.passes(candidates)
        # [B, R, K] -> [B, R * K], by proposal, then by class
        # and an empty slot, so that there is always something to take
        scores = F.pad(torch.where(passes, candidates.scores, 0.0).flatten(1), (0, 1))
        boxes = F.pad(candidates.boxes.expand(-1, -1, num_classes, -1).flatten(1, 2), (0, 0, 0, 1))
        labels = F.pad(torch.arange(num_classes, device=scores.device).repeat(num_proposals), (0, 1))
        order, found = [], []
        for _ in range(self.max_detections):
            best, idxs = scores.max(dim=1, keepdim=True)
            iou = box_iou(boxes.gather(1, idxs[..., None].expand(-1, -1, 4)), boxes).squeeze(1)
            scores = torch.where(labels == labels[idxs], scores * self.factor(iou), scores).scatter(1, idxs, 0.0)
            scores = torch.where(scores > self.score_threshold, scores, 0.0)
            order.append(idxs)
            found.append(best)
        idxs, scores = torch.cat(order, dim=1), torch.cat(found, dim=1)
        valid = scores > 0
        boxes = torch.where(valid[..., None], boxes.gather(1, idxs[..., None].expand(-1, -1, 4)), 0.0)
        levels = candidates.anchor_levels
        if levels is not None:
            levels = F.pad(levels, (0, 1)).gather(1, idxs // num_classes)
        return Detections(boxes, scores, labels[idxs], valid, levels)

    def factor(self, iou: Tensor) -> Tensor:
        """Factor of a score, given the IoU with a better box."""
        if self.decay == "gaussian":
            return torch.exp(-iou.square() / self.sigma)
        return torch.where(iou > self.nms_iou, 1 - iou, 1.0)
