"""The second stage: pool each proposal from its level, name it and move it (Fast R-CNN, FPN 4.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpn_det.boxes import MAX_LOG_SCALE, box_area, box_sides, clip_boxes, decode_deltas, encode_deltas
from fpn_det.models.layers import ConvBlock, Norm
from fpn_det.models.losses import box_distance, check_normalizer, masked_sum, normalizer
from fpn_det.models.matching import Matcher, Sampler
from fpn_det.models.nms import Method, nms_keep
from fpn_det.models.roi_align import RoIAlign
from fpn_det.schema import Amount, Count, CountOrZero, Fraction, Positive
from fpn_det.structures import Batch, Candidates, Detections, Losses, Proposals, Pyramid, Sample


class TwoLayerHead(nn.Module):
    """Two hidden layers on the flattened bins.

    Args:
        channels: of the pyramid.
        bins: per side.
        width: of both layers, and of the output.

    Attributes:
        mixes_boxes: whether a box's answer depends on the other boxes, as batch norm makes it.
    """

    mixes_boxes = False

    def __init__(self, channels: int, bins: int, width: Count = 1024) -> None:
        super().__init__()
        self.width = width
        self.fc1 = nn.Linear(channels * bins * bins, width)
        self.fc2 = nn.Linear(width, width)
        for layer in (self.fc1, self.fc2):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """[P, C, bins, bins] to [P, width]."""
        return self.fc2(self.fc1(pooled.flatten(1)).relu_()).relu_()


class ConvHead(nn.Module):
    """3x3 convolutions on the bins, then one hidden layer (Group Normalization, 4.2).

    Args:
        channels: of the pyramid.
        bins: per side.
        num_convs, conv_channels: how many convolutions, and of what width.
        width: of the hidden layer, and of the output.
        norm: after each convolution, one of `layers.NORMS`; None = none, with bias.
    """

    def __init__(
        self,
        channels: int,
        bins: int,
        num_convs: Count = 4,
        conv_channels: Count = 256,
        width: Count = 1024,
        norm: Norm | None = "batch",
    ) -> None:
        super().__init__()
        if num_convs < 1:
            raise ValueError(f"box_head.num_convs: expected at least 1, got {num_convs}.")
        self.width = width
        self.mixes_boxes = norm in ("batch", "sync")
        widths = [channels] + [conv_channels] * num_convs
        self.convs = nn.Sequential(*(ConvBlock(*pair, 3, norm, relu=True) for pair in pairwise(widths)))
        self.fc1 = nn.Linear(conv_channels * bins * bins, width)
        for conv in (module for module in self.convs.modules() if isinstance(module, nn.Conv2d)):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        nn.init.kaiming_uniform_(self.fc1.weight, a=1)
        nn.init.zeros_(self.fc1.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """[P, C, bins, bins] to [P, width]."""
        return self.fc1(self.convs(pooled).flatten(1)).relu_()


class Predictor(nn.Module):
    """Class logits over K classes and background (the last one), and box deltas per class, or one set for all."""

    def __init__(self, width: int, num_classes: int, class_agnostic: bool) -> None:
        super().__init__()
        self.class_logits = nn.Linear(width, num_classes + 1)
        self.box_deltas = nn.Linear(width, 4 if class_agnostic else num_classes * 4)
        nn.init.normal_(self.class_logits.weight, std=0.01)
        nn.init.normal_(self.box_deltas.weight, std=0.001)
        nn.init.zeros_(self.class_logits.bias)
        nn.init.zeros_(self.box_deltas.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[P, width] to logits [P, K + 1] and deltas [P, K or 1, 4], float32."""
        return self.class_logits(features).float(), self.box_deltas(features).float().unflatten(1, (-1, 4))


class ROIHead(nn.Module):
    """Classify and refine proposals.

    Args:
        channels, strides: of the levels that boxes are pooled from.
        num_classes: K.
        pooler: makes the RoIAlign, from strides.
        box_head: makes the layers between bins and predictor, from channels and bins.
        matcher, sampler: choose what the loss looks at.
        class_agnostic: one set of deltas for all classes.
        add_gt: let the objects themselves join the proposals in training.
        box_beta: smooth L1's; 0 = L1.
        delta_weights: multipliers of (dx, dy, dw, dh).
        normalizer: see `losses.normalizer`.
        score_threshold: a detection's score must exceed it.
        nms_iou: suppression threshold, within a class.
        max_detections: D, per image.
        min_side: a detection whose clipped width or height is smaller goes, px.
        drop_empty: of the detections chosen, leave out those without area, as detectron2 does; they had taken a place.
        nms_frame: boxes are compared in the `input` or the `original` frame.
        nms_method: see `nms_keep`.
        nms_first_label: number of the first class, in methods that shift boxes by their label; torchvision's is 1.
        min_log_scale: lower clamp of predicted log scales.
    """

    def __init__(
        self,
        channels: int,
        strides: Sequence[int],
        num_classes: int | None,
        pooler: Callable[..., RoIAlign] = RoIAlign,
        box_head: Callable[..., nn.Module] = TwoLayerHead,
        matcher: Matcher | None = None,
        sampler: Sampler | None = None,
        class_agnostic: bool = False,
        add_gt: bool = True,
        box_beta: Amount = 0.0,
        delta_weights: tuple[Positive, Positive, Positive, Positive] = (10.0, 10.0, 5.0, 5.0),
        normalizer: str = "constant",
        score_threshold: Fraction = 0.05,
        nms_iou: Fraction = 0.5,
        max_detections: Count = 100,
        min_side: Amount = 0.0,
        drop_empty: bool = False,
        nms_frame: str = "input",
        nms_method: Method = "auto",
        nms_first_label: CountOrZero = 0,
        min_log_scale: float = -float("inf"),
    ) -> None:
        super().__init__()
        if nms_frame not in ("input", "original"):
            raise ValueError(f"roi_head.nms_frame: expected input or original, got '{nms_frame}'.")
        self.pooler = pooler(strides=strides)
        self.box_head = box_head(channels=channels, bins=self.pooler.output_size)
        self.class_agnostic = class_agnostic
        if num_classes is not None:
            self.reset_classifier(num_classes)
        self.matcher = matcher or Matcher(0.5, 0.5)
        self.sampler = sampler or Sampler(512, 0.25)
        self.add_gt = add_gt
        self.box_beta = box_beta
        self.delta_weights = delta_weights
        self.normalizer = check_normalizer(normalizer)
        self.score_threshold = score_threshold
        self.nms_iou = nms_iou
        self.max_detections = max_detections
        self.min_side = min_side
        self.drop_empty = drop_empty
        self.nms_frame = nms_frame
        self.nms_method = nms_method
        self.nms_first_label = nms_first_label
        self.log_scales = {"min_log_scale": min_log_scale, "max_log_scale": MAX_LOG_SCALE}

    def reset_classifier(self, num_classes: int) -> None:
        """Give the last layers new random weights for `num_classes` foreground classes."""
        self.num_classes = num_classes
        self.predictor = Predictor(self.box_head.width, num_classes, self.class_agnostic)  # type: ignore[arg-type]

    def losses(self, pyramid: Pyramid, proposals: Proposals, batch: Batch, step: int) -> Losses:
        """`roi_class` (cross-entropy) and `roi_box` (smooth L1 of the positives), at the sampled boxes."""
        targets = batch.targets
        boxes, allowed = proposals.boxes, proposals.valid
        if self.add_gt:
            boxes = torch.cat([boxes, targets.boxes], dim=1)
            allowed = torch.cat([allowed, targets.valid], dim=1)
        match = self.matcher(targets, boxes, allowed)
        sample = self.sampler(match, batch.indices, step)
        boxes = boxes.gather(1, sample.idxs[..., None].expand(-1, -1, 4))
        objects = match.matched_idxs.gather(1, sample.idxs)
        gt_boxes = targets.boxes.gather(1, objects[..., None].expand(-1, -1, 4))
        gt_labels = targets.labels.gather(1, objects)

        logits, deltas = self._predict(pyramid, boxes, sample.valid)  # [B, S, K + 1], [B, S, K or 1, 4]
        labels = torch.where(sample.positive, gt_labels, self.num_classes)
        errors = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
        column = torch.zeros_like(gt_labels) if self.class_agnostic else gt_labels
        deltas = deltas.gather(2, column[..., None, None].expand(-1, -1, 1, 4)).squeeze(2)
        # an unused slot holds a box of no area; encode a unit box instead
        anchors = torch.where(sample.positive[..., None], boxes, boxes.new_tensor([0.0, 0.0, 1.0, 1.0]))
        distances = box_distance(deltas, encode_deltas(gt_boxes, anchors, self.delta_weights), self.box_beta)
        count = normalizer(self.normalizer, self.sampler.num_samples, sample)
        return Losses(
            {
                "roi_class": masked_sum(errors, sample.valid) / count,
                "roi_box": masked_sum(distances, sample.positive) / count,
            },
            self._statistics(boxes, sample),
        )

    def detect(self, pyramid: Pyramid, proposals: Proposals, batch: Batch) -> Detections:
        """Name and move every proposal, then keep the best."""
        return self.select(self.raw(pyramid, proposals, batch), batch)

    @torch.no_grad()
    def raw(self, pyramid: Pyramid, proposals: Proposals, batch: Batch) -> Candidates:
        """Every proposal's scores and clipped boxes, before any selection."""
        logits, deltas = self._predict(pyramid, proposals.boxes, proposals.valid)
        boxes = decode_deltas(deltas, proposals.boxes[:, :, None], self.delta_weights, **self.log_scales)
        boxes = clip_boxes(boxes.flatten(1, 2), batch.sizes).view_as(boxes)
        return Candidates(boxes, logits.softmax(dim=-1)[..., :-1], proposals.valid)

    @torch.no_grad()
    def select(self, candidates: Candidates, batch: Batch) -> Detections:
        """Threshold, suppress within each class, keep the best `max_detections`."""
        scores = candidates.scores
        width, height = box_sides(candidates.boxes)
        passes = (scores > self.score_threshold) & candidates.valid[..., None]  # NaN fails
        passes = passes & (width >= self.min_side) & (height >= self.min_side)
        ranked = torch.where(passes, scores, -1.0).flatten(1)
        most = passes.flatten(1).sum(dim=1).max().clamp(min=1)
        _, order = ranked.topk(int(most), sorted=False)  # the host read of detection, besides suppression's
        order = order.sort(dim=1).values  # so that of equal scores the first proposal wins
        ranked = ranked.gather(1, order)
        valid = ranked > 0
        proposal, labels = order // self.num_classes, order % self.num_classes
        column = proposal if self.class_agnostic else order
        boxes = candidates.boxes.flatten(1, 2).gather(1, column[..., None].expand(-1, -1, 4))
        compared = boxes
        if self.nms_frame == "original":
            compared = boxes * (batch.original_sizes / batch.sizes).flip(1).repeat(1, 2)[:, None]
        keep = nms_keep(compared, ranked, valid, self.nms_iou, labels + self.nms_first_label, self.nms_method)
        scores, best = ranked.masked_fill(~keep, -1.0).sort(dim=1, descending=True, stable=True)
        scores, best = scores[:, : self.max_detections], best[:, : self.max_detections]
        boxes = boxes.gather(1, best[..., None].expand(-1, -1, 4))
        valid = scores > 0
        if self.drop_empty:
            valid = valid & (box_area(boxes) > 0)
        boxes = torch.where(valid[..., None], boxes, 0.0)
        return Detections(boxes, scores.masked_fill(~valid, 0.0), labels.gather(1, best), valid)

    def _predict(self, pyramid: Pyramid, boxes: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits [B, R, K + 1] and deltas [B, R, K or 1, 4] of boxes [B, R, 4]; at least those `valid` [B, R]."""
        pooled = self.pooler(pyramid, boxes)
        if self.box_head.mixes_boxes:  # batch statistics must not see unused slots: one more host read
            (used,) = torch.where(valid.flatten())
            features = pooled.new_zeros(len(pooled), self.predictor.class_logits.in_features)
            features = features.index_put((used,), self.box_head(pooled[used]).to(features.dtype))
        else:
            features = self.box_head(pooled)
        logits, deltas = self.predictor(features)
        shape = boxes.shape[:2]
        return logits.unflatten(0, shape), deltas.unflatten(0, shape)

    @torch.no_grad()
    def _statistics(self, boxes: Tensor, sample: Sample) -> dict[str, Tensor]:
        """How many sampled boxes and positives each level got, per image."""
        levels = self.pooler.assigner(boxes)
        statistics = {}
        for index in range(self.pooler.assigner.num_levels):
            here, name = levels == index, f"P{self.pooler.assigner.first + index}"
            statistics[f"rois/{name}"] = (here & sample.valid).sum() / len(boxes)
            statistics[f"positives/{name}"] = (here & sample.positive).sum() / len(boxes)
        return statistics
