"""The region proposal network on every level of a pyramid (Faster R-CNN 3.1, FPN 4.1).

The loss uses a few hundred of several hundred thousand anchors. So the head runs at every cell without gradient, for the
proposals, and with gradient at the sampled cells only. Losses are the same, and a training step takes 5/6 of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpn_det.boxes import BoxCoder, box_sides, clip_boxes
from fpn_det.models.anchors import AnchorGenerator
from fpn_det.models.losses import BinaryCrossEntropy, BinaryLoss, BoxLoss, SmoothL1, masked_sum
from fpn_det.models.matching import Matcher, Sampler
from fpn_det.models.nms import nms_keep
from fpn_det.models.roi_align import Geometry, Neighborhoods
from fpn_det.models.selection import ProposalFilter
from fpn_det.schema import Count
from fpn_det.structures import Batch, Candidates, Detections, Losses, Proposals, Pyramid, Sample


class RPNHead(nn.Module):
    """3x3 convolutions with ReLU, then two sibling 1x1: one objectness logit and four deltas for each anchor.

    Args:
        channels: of the pyramid.
        num_anchors: per cell.
        num_convs: 3x3 convolutions.
        sampled_loss: evaluate the loss at the sampled anchors only; possible with one 3x3 convolution.
    """

    def __init__(self, channels: int, num_anchors: int, num_convs: Count = 1, sampled_loss: bool = True) -> None:
        super().__init__()
        self.num_anchors = num_anchors
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(num_convs))
        self.objectness = nn.Conv2d(channels, num_anchors, 1)
        self.deltas = nn.Conv2d(channels, num_anchors * 4, 1)
        self.samples_loss = sampled_loss and num_convs == 1  # then an output depends on a 3x3 neighborhood alone
        for layer in [*self.convs, self.objectness, self.deltas]:
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits [B, M] and deltas [B, M, 4] of every anchor, float32."""
        outputs = []
        for level, predict in zip(levels, self.predictors(len(levels)), strict=True):
            for conv in self.convs:
                level = conv(level).relu_()
            # [B, A*5, H, W] -> [B, H*W, A*5]
            outputs.append(predict(level).flatten(2).transpose(1, 2).float())
        logits, deltas = torch.cat(outputs, dim=1).split([self.num_anchors, self.num_anchors * 4], dim=2)
        return logits.flatten(1), deltas.reshape(deltas.shape[0], -1, 4)

    def predictors(self, num_levels: int) -> list[Callable[[Tensor], Tensor]]:
        """Functions of each level that map [B, C, H, W] to [B, A*5, H, W]: both siblings as one convolution."""
        siblings = (self.objectness, self.deltas)
        weight = torch.cat([layer.weight for layer in siblings])
        bias = torch.cat([layer.bias for layer in siblings])  # type: ignore[misc]
        return [lambda hidden: F.conv2d(hidden, weight, bias)] * num_levels

    def at(self, neighborhoods: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, S] and deltas [B, S, 4] at single cells; see `samples_loss`.

        Args:
            neighborhoods: 3x3 cells around each [B, S, 9 * C], see `Neighborhoods`.
            anchors: number of the anchor within each cell [B, S].
        """
        conv = self.convs[0]
        assert isinstance(conv, nn.Conv2d)
        # [C_out, C_in, 3, 3] -> [C_out, 9 * C_in], in the order of Neighborhoods
        hidden = F.linear(neighborhoods, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias).relu()
        logits = F.linear(hidden, self.objectness.weight.flatten(1), self.objectness.bias).float()
        deltas = F.linear(hidden, self.deltas.weight.flatten(1), self.deltas.bias).float()
        deltas = deltas.unflatten(2, (self.num_anchors, 4))
        return (
            logits.gather(2, anchors[..., None]).squeeze(2),
            deltas.gather(2, anchors[..., None, None].expand(-1, -1, 1, 4)).squeeze(2),
        )


@dataclass(frozen=True)
class RPNOutput:
    """The head's output at every anchor."""

    logits: Tensor  # f32 [B, M]
    deltas: Tensor  # f32 [B, M, 4]
    anchors: Tensor  # f32 [M, 4]
    inside: Tensor  # bool [B, M], anchors within their image, which are sampled and proposed
    level_sizes: list[int]  # anchors per level


class RPN(nn.Module):
    """Proposes boxes that may contain an object.

    Args:
        channels, strides: of the pyramid.
        anchors: makes the anchors, from strides.
        head: makes the head, from channels and anchors per cell.
        matcher, sampler: choose the anchors of the loss.
        train_filter, test_filter: select the proposals.
        cls_loss: of objectness logits.
        box_loss: of box deltas.
    """

    coder: ClassVar[BoxCoder] = BoxCoder()
    divides_by_num_sampled: ClassVar[bool] = False

    def __init__(
        self,
        channels: int,
        strides: Sequence[int],
        anchors: Callable[..., AnchorGenerator] = AnchorGenerator,
        head: Callable[..., RPNHead] = RPNHead,
        matcher: Matcher = Matcher(0.7, 0.3, allow_low_quality_matches=True),
        sampler: Sampler = Sampler(256, 0.5),
        train_filter: ProposalFilter = ProposalFilter(2000, 1000),
        test_filter: ProposalFilter = ProposalFilter(1000, 1000),
        cls_loss: BinaryLoss = BinaryCrossEntropy(),
        box_loss: BoxLoss = SmoothL1(),
    ) -> None:
        super().__init__()
        self.anchors = anchors(strides=strides)
        self.head = head(channels=channels, num_anchors=self.anchors.num_per_cell)
        self.matcher = matcher
        self.sampler = sampler
        self.train_filter = train_filter
        self.test_filter = test_filter
        self.cls_loss = cls_loss
        self.box_loss = box_loss
        self._geometry = Geometry()
        self._neighborhoods = Neighborhoods()

    def forward(self, pyramid: Pyramid) -> RPNOutput:
        """Run the head at every anchor; without gradient where the loss is evaluated at the sampled anchors."""
        device = pyramid.levels[0].device.type
        samples_loss = self.head.samples_loss
        # a cached cast of the weights made here would have no gradient
        casting = torch.autocast(device, enabled=torch.is_autocast_enabled(device), cache_enabled=not samples_loss)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not samples_loss), casting:
            logits, deltas = self.head(pyramid.levels)
        per_cell = self.anchors.num_per_cell
        level_sizes = [height * width * per_cell for height, width in pyramid.shapes]
        return RPNOutput(logits, deltas, self.anchors(pyramid.shapes), self.inside(pyramid), level_sizes)

    def losses(self, output: RPNOutput, pyramid: Pyramid, batch: Batch, step: int | Tensor) -> Losses:
        """`rpn_objectness` and `rpn_box` at the sampled anchors (eq. 1)."""
        match = self.matcher(batch.targets, output.anchors, output.inside)
        sample = self.sampler(match, batch.indices, step)
        logits, deltas = self._at(output, pyramid, sample)
        matched = match.matched_idxs.gather(1, sample.idxs)
        gt_boxes = batch.targets.boxes.gather(1, matched[..., None].expand(-1, -1, 4))
        cls_losses = self.cls_loss(logits, sample.positive)
        box_losses = self.box_loss(deltas, gt_boxes, output.anchors[sample.idxs], self.coder)
        count = self.loss_divisor(sample)
        return Losses(
            {
                "rpn_objectness": masked_sum(cls_losses, sample.valid) / count,
                "rpn_box": masked_sum(box_losses, sample.positive) / count,
            },
            {"rpn/positive_anchors": sample.positive.sum() / len(batch)},
        )

    def loss_divisor(self, sample: Sample) -> int | Tensor:
        """The number that loss sums are divided by: all samples that a batch could have."""
        return self.sampler.num_samples * len(sample.valid)

    @torch.no_grad()
    def propose(self, output: RPNOutput, batch: Batch, select: ProposalFilter) -> Proposals:
        """The best boxes of each image, after suppression within each level."""
        logits = output.logits.detach()
        # a logit that is not finite is never proposed
        logits = torch.where((logits.abs() < torch.inf) & self.proposable(output), logits, -torch.inf)
        start, widest = 0, min(select.pre_nms, max(output.level_sizes))
        level_scores, level_idxs = [], []
        for size in output.level_sizes:
            scores, idxs = select.top(logits[:, start : start + size])
            padding = widest - scores.shape[1]
            if not isinstance(padding, int) or padding:  # in a traced graph it is symbolic, and 0 on some canvases only
                scores, idxs = F.pad(scores, (0, padding), value=-torch.inf), F.pad(idxs, (0, padding))
            level_scores.append(scores)
            level_idxs.append(idxs + start)
            start += size
        scores, idxs = torch.stack(level_scores, dim=1), torch.cat(level_idxs, dim=1)  # [B, L, K], [B, L*K]
        valid = scores > -torch.inf
        deltas = output.deltas.detach().gather(1, idxs[..., None].expand(-1, -1, 4))
        boxes = clip_boxes(self.coder.decode(deltas, output.anchors[idxs]), batch.sizes)
        sides = torch.minimum(*box_sides(boxes)).view_as(valid)
        valid = valid & (sides >= select.min_side) & (sides > 0)  # NaN fails
        valid = select.suppress(boxes.view(*valid.shape, 4), scores, valid)
        scores = torch.where(valid, scores, -torch.inf).flatten(1)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        valid, order = scores[:, : select.post_nms] > -torch.inf, order[:, : select.post_nms]
        boxes = torch.where(valid[..., None], boxes.gather(1, order[..., None].expand(-1, -1, 4)), 0.0)
        anchor_idxs = idxs.gather(1, order)
        logits = torch.where(valid, logits.gather(1, anchor_idxs), 0.0)
        return Proposals(boxes, logits, valid, anchor_idxs)

    def levels_of(self, anchor_idxs: Tensor, pyramid: Pyramid) -> Tensor:
        """Levels [B, R] of anchors [B, R]."""
        starts = self._geometry(pyramid, len(pyramid.levels))[:, 0] * self.anchors.num_per_cell
        return (anchor_idxs[..., None] >= starts[1:]).sum(dim=2)

    def proposable(self, output: RPNOutput) -> Tensor:
        """Anchors [B, M] that may become proposals."""
        return output.inside

    @torch.no_grad()
    def select(self, candidates: Candidates) -> Detections:
        """The best proposals as detections of label 0; those of several views after one more suppression."""
        keep = self.test_filter
        boxes, scores, valid = candidates.boxes[:, :, 0], candidates.scores[..., 0], candidates.valid
        if valid.shape[1] > keep.post_nms:
            valid = nms_keep(boxes, scores, valid, keep.nms_iou, method=keep.nms_method)
        scores, order = torch.where(valid, scores, -1.0).sort(dim=1, descending=True, stable=True)
        scores, order = scores[:, : keep.post_nms], order[:, : keep.post_nms]
        valid = scores >= 0
        boxes = torch.where(valid[..., None], boxes.gather(1, order[..., None].expand(-1, -1, 4)), 0.0)
        levels = None if candidates.anchor_levels is None else candidates.anchor_levels.gather(1, order)
        return Detections(boxes, scores.clamp(min=0), torch.zeros_like(order), valid, levels)

    def _at(self, output: RPNOutput, pyramid: Pyramid, sample: Sample) -> tuple[Tensor, Tensor]:
        if not self.head.samples_loss:
            return output.logits.gather(1, sample.idxs), output.deltas.gather(
                1, sample.idxs[..., None].expand(-1, -1, 4)
            )
        per_cell = self.anchors.num_per_cell
        neighborhoods = self._neighborhoods(pyramid, sample.idxs // per_cell)
        return self.head.at(neighborhoods, sample.idxs % per_cell)

    def inside(self, pyramid: Pyramid) -> Tensor:
        """Anchors [B, M] centered within their image's own size, rounded up to the canvas stride."""
        centers = self.anchors.centers(pyramid.shapes)  # [N, 2] (x, y)
        stride = pyramid.canvas_stride
        limits = (pyramid.sizes + (stride - 1)) // stride * stride
        inside = (centers < limits.flip(1)[:, None]).all(dim=2)
        return inside[..., None].expand(-1, -1, self.anchors.num_per_cell).flatten(1)
