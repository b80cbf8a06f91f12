"""The second stage: pool each proposal from its level, classify and refine it (Fast R-CNN, FPN 4.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fpn_det.boxes import BoxCoder, clip_boxes
from fpn_det.models.box_heads import BoxHead, TwoLayerHead
from fpn_det.models.losses import BoxLoss, ClassLoss, CrossEntropy, SmoothL1, masked_sum
from fpn_det.models.matching import Matcher, ProposalSampler
from fpn_det.models.roi_align import RoIAlign
from fpn_det.models.selection import DetectionFilter
from fpn_det.structures import Batch, Candidates, Detections, Losses, Match, Proposals, Pyramid, Sample, Targets


class BoxPredictor(nn.Module):
    """Class logits over K classes and background (the last one), and box deltas for each class, or one set for all.

    Args:
        width: of the box head's output.
        num_classes: K.
        class_agnostic: one set of deltas for all classes.
        coder: encodes the deltas.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        class_agnostic: bool = False,
        coder: BoxCoder = BoxCoder((10.0, 10.0, 5.0, 5.0)),
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.class_agnostic = class_agnostic
        self.coder = coder
        self.class_logits = nn.Linear(width, num_classes + 1)
        self.box_deltas = nn.Linear(width, 4 if class_agnostic else num_classes * 4)
        nn.init.normal_(self.class_logits.weight, std=0.01)
        nn.init.normal_(self.box_deltas.weight, std=0.001)
        nn.init.zeros_(self.class_logits.bias)
        nn.init.zeros_(self.box_deltas.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features [P, width] to logits [P, K + 1] and deltas [P, K or 1, 4], float32."""
        return self.class_logits(features).float(), self.box_deltas(features).float().unflatten(1, (-1, 4))


@dataclass(frozen=True)
class SampledBoxes:
    """Boxes of a loss and what they should become."""

    boxes: Tensor  # f32 [B, S, 4]
    gt_boxes: Tensor  # f32 [B, S, 4], of the object that each overlaps most; meaningful where positive
    gt_labels: Tensor  # i64 [B, S]
    sample: Sample


class ROIHead(nn.Module):
    """Classifies and refines proposals.

    Its last layers are made by `reset_classifier`, when the number of classes is known.

    Args:
        channels, strides: of the levels that boxes are pooled from.
        pooler: makes the RoIAlign, from strides.
        box_head: makes the layers between bins and predictor, from channels and bins.
        predictor: makes the last layers, from the box head's width and the number of classes.
        matcher, sampler: choose the proposals of the loss.
        cls_loss: of class logits.
        box_loss: of box deltas.
        test_filter: selects the detections.
    """

    divides_by_num_sampled: ClassVar[bool] = False

    def __init__(
        self,
        channels: int,
        strides: Sequence[int],
        pooler: Callable[..., RoIAlign] = RoIAlign,
        box_head: Callable[..., BoxHead] = TwoLayerHead,
        predictor: Callable[..., BoxPredictor] = BoxPredictor,
        matcher: Matcher = Matcher(0.5, 0.5),
        sampler: ProposalSampler = ProposalSampler(),
        cls_loss: ClassLoss = CrossEntropy(),
        box_loss: BoxLoss = SmoothL1(),
        test_filter: DetectionFilter = DetectionFilter(),
    ) -> None:
        super().__init__()
        self.pooler = pooler(strides=strides)
        self.box_head = box_head(channels=channels, bins=self.pooler.output_size)
        self.make_predictor = predictor
        self.predictor: BoxPredictor
        self.matcher = matcher
        self.sampler = sampler
        self.cls_loss = cls_loss
        self.box_loss = box_loss
        self.test_filter = test_filter

    def reset_classifier(self, num_classes: int) -> None:
        """Make new last layers with random weights for `num_classes` foreground classes.

        Raises:
            ValueError: the loss has settings for another number of classes.
        """
        self.predictor = self.make_predictor(self.box_head.width, num_classes)
        self.cls_loss(torch.zeros(1, num_classes + 1), torch.zeros(1, dtype=torch.int64))

    def load_pretrained(self) -> None:
        """Load the pretrained weights that the settings of the box head name."""
        self.box_head.load_pretrained()

    def losses(self, pyramid: Pyramid, proposals: Proposals, batch: Batch, step: int | Tensor) -> Losses:
        """Losses `roi_class` of the sampled boxes and `roi_box` of the positive ones."""
        sampled = self.sample(proposals, batch, step)
        levels = self.pooler.assigner(sampled.boxes)
        logits, deltas = self._predict(pyramid, sampled.boxes, sampled.sample.valid, levels)
        cls_loss, box_loss = self.compare(logits, deltas, sampled, self.predictor)
        return Losses({"roi_class": cls_loss, "roi_box": box_loss}, self._statistics(levels, sampled.sample))

    def sample(self, proposals: Proposals, batch: Batch, step: int | Tensor) -> SampledBoxes:
        """The boxes of the loss: a sample of the proposals and, with `sampler.add_gt`, of the ground truth."""
        targets = batch.targets
        boxes, valid = self.candidates(proposals, targets)
        match = self.match(targets, boxes, valid)
        sample = self.sampler(match, batch.indices, step)
        boxes = boxes.gather(1, sample.idxs[..., None].expand(-1, -1, 4))
        return with_targets(boxes, match.matched_idxs.gather(1, sample.idxs), sample, targets)

    def candidates(self, proposals: Proposals, targets: Targets) -> tuple[Tensor, Tensor]:
        """Boxes [B, R, 4] that are sampled from, and which of them are valid."""
        if not self.sampler.add_gt:
            return proposals.boxes, proposals.valid
        boxes = torch.cat([proposals.boxes, targets.boxes], dim=1)
        return boxes, torch.cat([proposals.valid, targets.valid], dim=1)

    def match(self, targets: Targets, boxes: Tensor, valid: Tensor) -> Match:
        """Match boxes [B, R, 4], of which only those `valid` [B, R] take part, with the ground truth."""
        return self.matcher(targets, boxes, valid)

    def compare(
        self, logits: Tensor, deltas: Tensor, sampled: SampledBoxes, predictor: BoxPredictor
    ) -> tuple[Tensor, Tensor]:
        """The classification and the box loss of logits [B, S, K + 1] and deltas [B, S, K or 1, 4] of `predictor`."""
        sample, gt_labels = sampled.sample, sampled.gt_labels
        labels = torch.where(sample.positive, gt_labels, predictor.num_classes)
        cls_losses = self.cls_loss(logits.flatten(0, 1), labels.flatten()).view_as(labels)
        column = torch.zeros_like(gt_labels) if predictor.class_agnostic else gt_labels
        deltas = deltas.gather(2, column[..., None, None].expand(-1, -1, 1, 4)).squeeze(2)
        # an unused slot holds a box without area, which cannot be a reference: the ground truth takes its place
        references = torch.where(sample.positive[..., None], sampled.boxes, sampled.gt_boxes)
        box_losses = self.box_loss(deltas, sampled.gt_boxes, references, predictor.coder)
        count = self.loss_divisor(sample)
        return masked_sum(cls_losses, sample.valid) / count, masked_sum(box_losses, sample.positive) / count

    def loss_divisor(self, sample: Sample) -> int | Tensor:
        """The number that loss sums are divided by: all samples that a batch could have."""
        return self.sampler.num_samples * len(sample.valid)

    def detect(self, pyramid: Pyramid, proposals: Proposals, batch: Batch) -> Detections:
        """Classify and refine every proposal, then select the detections."""
        return self.select(self.raw(pyramid, proposals, batch), batch)

    @torch.no_grad()
    def raw(self, pyramid: Pyramid, proposals: Proposals, batch: Batch) -> Candidates:
        """Scores and clipped boxes of every proposal, before any selection."""
        logits, deltas = self._predict(pyramid, proposals.boxes, proposals.valid)
        boxes = self.predictor.coder.decode(deltas, proposals.boxes[:, :, None])
        boxes = clip_boxes(boxes.flatten(1, 2), batch.sizes).view_as(boxes)
        return Candidates(boxes, logits.softmax(dim=-1)[..., :-1], proposals.valid)

    def select(self, candidates: Candidates, batch: Batch) -> Detections:
        """The detections among all candidates; see `DetectionFilter`."""
        return self.test_filter(candidates, batch)

    def _predict(
        self, pyramid: Pyramid, boxes: Tensor, valid: Tensor, levels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Class logits [B, R, K + 1] and deltas [B, R, K or 1, 4] of boxes [B, R, 4]; at least those `valid` [B, R]."""
        return predict(self.pooler(pyramid, boxes, levels), valid, self.box_head, self.predictor)

    @torch.no_grad()
    def _statistics(self, levels: Tensor, sample: Sample) -> dict[str, Tensor]:
        """Sampled boxes, which are pooled from `levels` [B, S], and positives of each level, per image."""
        assigner = self.pooler.assigner
        here = levels[..., None] == torch.arange(assigner.num_levels, device=levels.device)  # [B, S, L]
        kinds = torch.stack([sample.valid, sample.positive])  # [2, B, S]
        counts = (here & kinds[..., None]).sum((1, 2)) / len(levels)  # [2, L]
        return {
            f"{name}/P{assigner.first + index}": count
            for name, per_level in zip(("rois", "positives"), counts, strict=True)
            for index, count in enumerate(per_level)
        }


def with_targets(boxes: Tensor, matched_idxs: Tensor, sample: Sample, targets: Targets) -> SampledBoxes:
    """Boxes [B, S, 4] with the objects of `targets` that they are matched with, `matched_idxs` [B, S]."""
    gt_boxes = targets.boxes.gather(1, matched_idxs[..., None].expand(-1, -1, 4))
    return SampledBoxes(boxes, gt_boxes, targets.labels.gather(1, matched_idxs), sample)


def predict(pooled: Tensor, valid: Tensor, box_head: BoxHead, predictor: BoxPredictor) -> tuple[Tensor, Tensor]:
    """Class logits [B, R, K + 1] and deltas [B, R, K or 1, 4] of pooled boxes [B * R, C, bins, bins].

    Args:
        valid: [B, R]; the others may have any prediction.
    """
    if box_head.mixes_boxes and box_head.training:
        # batch statistics must not include unused slots; selecting the others is a host read
        (used,) = torch.where(valid.flatten())
        features = pooled.new_zeros(len(pooled), box_head.width)
        features = features.index_put((used,), box_head(pooled[used]).to(features.dtype))
    else:
        features = box_head(pooled)
    logits, deltas = predictor(features)
    return logits.unflatten(0, valid.shape), deltas.unflatten(0, valid.shape)
