"""Cascade R-CNN: several ROI heads one after the other, each on the boxes that the one before has refined (Cai & Vasconcelos 2018).

A later stage asks for a larger overlap, and gets boxes that have it: it is trained on all boxes that the first stage sampled, refined
and matched anew. So every stage has the same fixed number of boxes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fpn_det.boxes import BoxCoder, box_sides, clip_boxes
from fpn_det.models.box_heads import BoxHead, TwoLayerHead
from fpn_det.models.layers import scale_gradient
from fpn_det.models.losses import BoxLoss, ClassLoss, CrossEntropy, SmoothL1
from fpn_det.models.matching import Matcher, ProposalSampler
from fpn_det.models.roi_align import RoIAlign
from fpn_det.models.roi_head import BoxPredictor, ROIHead, SampledBoxes, predict, with_targets
from fpn_det.models.selection import DetectionFilter
from fpn_det.schema import Share
from fpn_det.structures import Batch, Candidates, Losses, Proposals, Pyramid, Sample, Targets

CLASS_AGNOSTIC = partial(BoxPredictor, class_agnostic=True)


class Stage(nn.Module):
    """Layers of a stage after the first.

    Args:
        box_head: the layers between bins and predictor.
        matcher: finds the object of each refined box.
    """

    def __init__(self, box_head: BoxHead, matcher: Matcher) -> None:
        super().__init__()
        self.box_head = box_head
        self.matcher = matcher
        self.predictor: BoxPredictor

    @torch.no_grad()
    def match(self, boxes: Tensor, valid: Tensor, targets: Targets) -> SampledBoxes:
        """Match boxes [B, S, 4] with the ground truth; all that are `valid` [B, S] are in the loss."""
        match = self.matcher(targets, boxes, valid)
        idxs = torch.arange(boxes.shape[1], device=boxes.device).expand_as(valid)
        return with_targets(boxes, match.matched_idxs, Sample(idxs, match.positive, valid), targets)


class CascadeROIHead(ROIHead):
    """Classifies and refines proposals in several stages.

    The first stage has the parameters of an `ROIHead` under the same names. The gradient of every stage with respect to the features is
    divided by the number of stages, as in detectron2, so that the backbone's learning rate stays that of a single head; the authors'
    configurations weight the losses of the stages by 1, 1/2 and 1/4 instead. Detections have the boxes of the last stage and the mean
    of the scores that all stages give, each to its own input, as in detectron2; in the paper every classifier scores the input of the
    last stage.

    Args:
        channels, strides, pooler, box_head, sampler, cls_loss, box_loss, test_filter: see `ROIHead`. Each stage has a box head and a
            predictor of its own.
        predictor: makes the last layers of a stage. It must be class-agnostic. The weights of its coder are multiplied by 1, 2, 3, ...,
            because the deltas become smaller from stage to stage.
        ious: from which IoU on a box is positive, for each stage.

    Raises:
        ValueError: no stage, or a predictor with deltas for each class.
    """

    def __init__(
        self,
        channels: int,
        strides: Sequence[int],
        pooler: Callable[..., RoIAlign] = RoIAlign,
        box_head: Callable[..., BoxHead] = TwoLayerHead,
        predictor: Callable[..., BoxPredictor] = CLASS_AGNOSTIC,
        sampler: ProposalSampler = ProposalSampler(),
        cls_loss: ClassLoss = CrossEntropy(),
        box_loss: BoxLoss = SmoothL1(),
        test_filter: DetectionFilter = DetectionFilter(),
        ious: tuple[Share, ...] = (0.5, 0.6, 0.7),
    ) -> None:
        if not ious:
            raise ValueError("roi_head.ious: expected an IoU for each stage, got none.")
        matchers = [Matcher(iou, iou) for iou in ious]
        super().__init__(
            channels, strides, pooler, box_head, predictor, matchers[0], sampler, cls_loss, box_loss, test_filter
        )
        self.later = nn.ModuleList(
            Stage(box_head(channels=channels, bins=self.pooler.output_size), matcher) for matcher in matchers[1:]
        )

    @property
    def stages(self) -> list[Any]:
        """All stages with their `box_head` and `predictor`; this module is the first."""
        return [self, *self.later]

    def reset_classifier(self, num_classes: int) -> None:
        """Make new last layers of every stage."""
        super().reset_classifier(num_classes)
        if not self.predictor.class_agnostic:
            raise ValueError(
                "model.roi_head.predictor.class_agnostic: expected true in a cascade, whose next stage takes one box for all classes, "
                "got false."
            )
        coder = self.predictor.coder
        for number, stage in enumerate(self.stages[1:], start=2):
            stage.predictor = self.make_predictor(stage.box_head.width, num_classes)
            stage.predictor.coder = replace(coder, weights=tuple(number * weight for weight in coder.weights))  # type: ignore[arg-type]

    def load_pretrained(self) -> None:
        """Load the pretrained weights that the settings of the box heads name."""
        for stage in self.stages:
            stage.box_head.load_pretrained()

    def losses(self, pyramid: Pyramid, proposals: Proposals, batch: Batch, step: int | Tensor) -> Losses:
        """Losses of every stage: `roi_class` and `roi_box` of the first, `roi_class_2` and `roi_box_2` of the second, ..."""
        sampled = self.sample(proposals, batch, step)
        terms: dict[str, Tensor] = {}
        levels = self.pooler.assigner(sampled.boxes)
        statistics = self._statistics(levels, sampled.sample)
        for number, stage in enumerate(self.stages, start=1):
            suffix = "" if number == 1 else f"_{number}"
            pooled = scale_gradient(self.pooler(pyramid, sampled.boxes, levels), 1 / len(self.stages))
            logits, deltas = predict(pooled, sampled.sample.valid, stage.box_head, stage.predictor)
            cls_loss, box_loss = self.compare(logits, deltas, sampled, stage.predictor)
            terms |= {f"roi_class{suffix}": cls_loss, f"roi_box{suffix}": box_loss}
            statistics[f"positives/stage_{number}"] = sampled.sample.positive.sum() / len(batch)
            if number < len(self.stages):
                boxes, valid = refine(deltas, sampled.boxes, sampled.sample.valid, stage.predictor.coder, batch)
                sampled = self.stages[number].match(boxes, valid, batch.targets)
                levels = self.pooler.assigner(sampled.boxes)
        return Losses(terms, statistics)

    @torch.no_grad()
    def raw(self, pyramid: Pyramid, proposals: Proposals, batch: Batch) -> Candidates:
        """Boxes of the last stage for every proposal, clipped, and the mean of the scores of all stages."""
        boxes, valid, scores = proposals.boxes, proposals.valid, []
        for stage in self.stages:
            logits, deltas = predict(self.pooler(pyramid, boxes), valid, stage.box_head, stage.predictor)
            scores.append(logits.softmax(dim=-1)[..., :-1])
            boxes, valid = refine(deltas, boxes, valid, stage.predictor.coder, batch)
        return Candidates(boxes[:, :, None], torch.stack(scores).mean(dim=0), valid)


@torch.no_grad()
def refine(deltas: Tensor, boxes: Tensor, valid: Tensor, coder: BoxCoder, batch: Batch) -> tuple[Tensor, Tensor]:
    """Decode class-agnostic deltas [B, R, 1, 4] of boxes [B, R, 4].

    Returns:
        Boxes [B, R, 4], clipped to their images, and which of the `valid` [B, R] still have an area; the others are zero.
    """
    boxes = clip_boxes(coder.decode(deltas.squeeze(2), boxes), batch.sizes)
    valid = valid & (torch.minimum(*box_sides(boxes)) > 0)  # NaN fails
    return torch.where(valid[..., None], boxes, 0.0), valid
