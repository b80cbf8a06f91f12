"""The region proposal network, on every level of a pyramid (Faster R-CNN 3.1, FPN 4.1).

The loss reads a few hundred of some hundred thousand anchors. So the head first runs densely without gradient, for
the proposals, and then with gradient at the sampled cells only: same numbers, a sixth of the training step saved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpn_det.boxes import MAX_LOG_SCALE, box_sides, clip_boxes, decode_deltas, encode_deltas
from fpn_det.models.anchors import AnchorGenerator
from fpn_det.models.losses import box_distance, check_normalizer, masked_sum, normalizer
from fpn_det.models.matching import Matcher, Sampler
from fpn_det.models.nms import Method, nms_keep, nms_keep_levels
from fpn_det.models.roi_align import gather_neighborhoods
from fpn_det.schema import Amount, Count, Fraction
from fpn_det.structures import Batch, Candidates, Detections, Losses, Proposals, Pyramid, Sample

DELTA_WEIGHTS = (1.0, 1.0, 1.0, 1.0)
RANKINGS = ("logits", "logits_then_probabilities", "probabilities")
PADDING_ANCHORS = ("exclude", "exclude_from_loss", "keep")


class RPNHead(nn.Module):
    """3x3 convolutions with ReLU, then two sibling 1x1: one objectness logit and four deltas for each anchor.

    Args:
        channels: of the pyramid.
        num_anchors: per cell.
        num_convs: how many 3x3 convolutions.
        join_siblings: evaluate the last two as one convolution. Faster, and equal but for rounding; the peers do not.
    """

    def __init__(self, channels: int, num_anchors: int, num_convs: Count = 1, join_siblings: bool = True) -> None:
        super().__init__()
        self.num_anchors = num_anchors
        self.join_siblings = join_siblings
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(num_convs))
        self.objectness = nn.Conv2d(channels, num_anchors, 1)
        self.deltas = nn.Conv2d(channels, num_anchors * 4, 1)
        for layer in [*self.convs, self.objectness, self.deltas]:
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits [B, M] and deltas [B, M, 4] of every anchor."""
        siblings = (self.objectness, self.deltas)
        weight = torch.cat([layer.weight for layer in siblings])
        bias = torch.cat([layer.bias for layer in siblings])  # type: ignore[misc]
        outputs = []
        for level in levels:
            for conv in self.convs:
                level = conv(level).relu_()
            if self.join_siblings:
                output = F.conv2d(level, weight, bias)
            else:
                output = torch.cat([layer(level) for layer in siblings], dim=1)
            # [B, A*5, H, W] -> [B, H*W, A*5]
            outputs.append(output.flatten(2).transpose(1, 2).float())
        logits, deltas = torch.cat(outputs, dim=1).split([self.num_anchors, self.num_anchors * 4], dim=2)
        return logits.flatten(1), deltas.reshape(len(deltas), -1, 4)

    @property
    def is_local(self) -> bool:
        """Whether a cell's answer follows from its 3x3 neighborhood."""
        return len(self.convs) == 1

    def at(self, neighborhoods: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """The same at single places: neighborhoods [B, S, 9 * C], anchor numbers [B, S] -> [B, S], [B, S, 4]."""
        conv = self.convs[0]
        assert isinstance(conv, nn.Conv2d)
        # [C_out, C_in, 3, 3] -> [C_out, 9 * C_in], in the order of gather_neighborhoods
        hidden = F.linear(neighborhoods, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias).relu()
        logits = F.linear(hidden, self.objectness.weight.flatten(1), self.objectness.bias).float()
        deltas = F.linear(hidden, self.deltas.weight.flatten(1), self.deltas.bias).float()
        deltas = deltas.unflatten(2, (self.num_anchors, 4))
        return (
            logits.gather(2, anchors[..., None]).squeeze(2),
            deltas.gather(2, anchors[..., None, None].expand(-1, -1, 1, 4)).squeeze(2),
        )


class ProposalFilter:
    """How many of the RPN's boxes go on, and which.

    Args:
        pre_nms: best boxes per level that enter suppression.
        post_nms: best boxes per image that leave it.
        nms_iou: suppression threshold, within a level.
        min_side: a box whose clipped width or height is smaller goes, px; one without area always goes.
        nms_method: see `nms_keep`.
        ranking: what boxes are ordered by. Of `probabilities` (mmdetection) large ones are equal in float32, and then the
            first wins; `logits_then_probabilities` (torchvision) takes them only after `pre_nms`.
    """

    def __init__(
        self,
        pre_nms: Count,
        post_nms: Count,
        nms_iou: Fraction = 0.7,
        min_side: Amount = 0.0,
        nms_method: Method = "auto",
        ranking: str = "logits",
    ) -> None:
        if pre_nms < 1 or post_nms < 1:
            raise ValueError(f"proposals: expected pre_nms and post_nms of at least 1, got {pre_nms} and {post_nms}.")
        if ranking not in RANKINGS:
            raise ValueError(f"proposals.ranking: expected {', '.join(RANKINGS)}, got '{ranking}'.")
        self.pre_nms = pre_nms
        self.post_nms = post_nms
        self.nms_iou = nms_iou
        self.min_side = min_side
        self.nms_method = nms_method
        self.ranking = ranking

    def best(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The best `pre_nms` of one level's scores [B, M_l], best first, and where they are."""
        if self.ranking == "probabilities":  # of equal ones the first, which topk does not promise
            ranked, idxs = scores.sort(dim=1, descending=True, stable=True)
            return ranked[:, : self.pre_nms], idxs[:, : self.pre_nms]
        return scores.topk(min(self.pre_nms, scores.shape[1]))


@dataclass(frozen=True)
class RPNOutput:
    """The head's answer at every anchor."""

    logits: Tensor  # f32 [B, M]
    deltas: Tensor  # f32 [B, M, 4]
    anchors: Tensor  # f32 [M, 4]
    allowed: Tensor  # bool [B, M], anchors that stand for something in their image
    level_sizes: list[int]  # anchors per level


class RPN(nn.Module):
    """Propose boxes.

    Args:
        channels, strides: of the pyramid.
        canvas_stride: what image sizes are rounded up to.
        anchors: makes the anchors, from strides.
        head: makes the head, from channels and anchors per cell.
        matcher, sampler: choose what the loss looks at.
        train_filter, test_filter: choose what goes on.
        box_beta: smooth L1's; 0 = L1.
        normalizer: see `losses.normalizer`.
        padding_anchors: `exclude` anchors centered outside the image's own size, rounded up to `canvas_stride`;
            `exclude_from_loss` still proposes from them (mmdetection), `keep` treats them like all others (the rest).
        sampled_loss: evaluate the loss at the sampled anchors only, where the head allows it.
        min_log_scale: lower clamp of predicted log scales.
    """

    def __init__(
        self,
        channels: int,
        strides: Sequence[int],
        canvas_stride: int,
        anchors: Callable[..., AnchorGenerator] = AnchorGenerator,
        head: Callable[..., RPNHead] = RPNHead,
        matcher: Matcher | None = None,
        sampler: Sampler | None = None,
        train_filter: ProposalFilter | None = None,
        test_filter: ProposalFilter | None = None,
        box_beta: Amount = 0.0,
        normalizer: str = "constant",
        padding_anchors: str = "exclude",
        sampled_loss: bool = True,
        min_log_scale: float = -float("inf"),
    ) -> None:
        super().__init__()
        if padding_anchors not in PADDING_ANCHORS:
            raise ValueError(f"rpn.padding_anchors: expected {', '.join(PADDING_ANCHORS)}, got '{padding_anchors}'.")
        self.anchors = anchors(strides=strides)
        self.head = head(channels=channels, num_anchors=self.anchors.num_per_cell)
        self.matcher = matcher or Matcher(0.7, 0.3, rescue=True)
        self.sampler = sampler or Sampler(256, 0.5)
        self.train_filter = train_filter or ProposalFilter(2000, 1000)
        self.test_filter = test_filter or ProposalFilter(1000, 1000)
        self.canvas_stride = canvas_stride
        self.box_beta = box_beta
        self.normalizer = check_normalizer(normalizer)
        self.padding_anchors = padding_anchors
        self.samples_loss = sampled_loss and self.head.is_local
        self.log_scales = {"min_log_scale": min_log_scale, "max_log_scale": MAX_LOG_SCALE}

    def forward(self, pyramid: Pyramid) -> RPNOutput:
        """The head at every anchor; without gradient where the loss does not read it from here."""
        device = pyramid.levels[0].device.type
        # a cached cast of the weights made here would have no gradient
        casting = torch.autocast(device, enabled=torch.is_autocast_enabled(device), cache_enabled=not self.samples_loss)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.samples_loss), casting:
            logits, deltas = self.head(pyramid.levels)
        per_cell = self.anchors.num_per_cell
        level_sizes = [height * width * per_cell for height, width in pyramid.shapes]
        return RPNOutput(logits, deltas, self.anchors(pyramid.shapes), self.allowed(pyramid), level_sizes)

    def losses(self, output: RPNOutput, pyramid: Pyramid, batch: Batch, step: int) -> Losses:
        """`rpn_objectness` (binary cross-entropy) and `rpn_box` (smooth L1), at the sampled anchors (eq. 1)."""
        match = self.matcher(batch.targets, output.anchors, output.allowed)
        sample = self.sampler(match, batch.indices, step)
        logits, deltas = self._at(output, pyramid, sample)
        objects = match.matched_idxs.gather(1, sample.idxs)
        gt_boxes = batch.targets.boxes.gather(1, objects[..., None].expand(-1, -1, 4))
        goals = encode_deltas(gt_boxes, output.anchors[sample.idxs], DELTA_WEIGHTS)
        errors = F.binary_cross_entropy_with_logits(logits, sample.positive.float(), reduction="none")
        distances = box_distance(deltas, goals, self.box_beta)
        count = normalizer(self.normalizer, self.sampler.num_samples, sample)
        return Losses(
            {
                "rpn_objectness": masked_sum(errors, sample.valid) / count,
                "rpn_box": masked_sum(distances, sample.positive) / count,
            },
            {"rpn/positive_anchors": sample.positive.sum() / len(batch)},
        )

    @torch.no_grad()
    def propose(self, output: RPNOutput, batch: Batch, keep: ProposalFilter) -> Proposals:
        """The best boxes of each image, after suppression within each level."""
        logits = output.logits.detach()
        eligible = logits.isfinite()  # a non-finite logit is never proposed
        if self.padding_anchors == "exclude":
            eligible = eligible & output.allowed
        scores = logits.sigmoid() if keep.ranking == "probabilities" else logits
        scores = scores.masked_fill(~eligible, -torch.inf)
        start, widest = 0, min(keep.pre_nms, max(output.level_sizes))
        level_scores, level_idxs = [], []
        for size in output.level_sizes:
            best, idxs = keep.best(scores[:, start : start + size])
            level_scores.append(F.pad(best, (0, widest - best.shape[1]), value=-torch.inf))
            level_idxs.append(F.pad(idxs + start, (0, widest - idxs.shape[1])))
            start += size
        scores, idxs = (
            torch.stack(level_scores, dim=1),
            torch.stack(level_idxs, dim=1).flatten(1),
        )  # [B, L, K], [B, L*K]
        valid = scores.isfinite()
        if keep.ranking == "logits_then_probabilities":
            scores = scores.sigmoid()
        deltas = output.deltas.detach().gather(1, idxs[..., None].expand(-1, -1, 4))
        boxes = clip_boxes(decode_deltas(deltas, output.anchors[idxs], DELTA_WEIGHTS, **self.log_scales), batch.sizes)
        sides = torch.stack(box_sides(boxes)).amin(dim=0).view_as(valid)
        valid = valid & (sides >= keep.min_side) & (sides > 0)  # NaN fails too
        valid = nms_keep_levels(boxes.view(*valid.shape, 4), scores, valid, keep.nms_iou, keep.nms_method)
        scores = scores.masked_fill(~valid, -torch.inf).flatten(1)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        valid, order = scores[:, : keep.post_nms].isfinite(), order[:, : keep.post_nms]
        boxes = torch.where(valid[..., None], boxes.gather(1, order[..., None].expand(-1, -1, 4)), 0.0)
        logits = torch.where(valid, logits.gather(1, idxs.gather(1, order)), 0.0)
        return Proposals(boxes, logits, valid)

    @torch.no_grad()
    def select(self, candidates: Candidates) -> Detections:
        """The best proposals as detections of label 0; if several views brought theirs, after one more suppression."""
        keep = self.test_filter
        boxes, scores, valid = candidates.boxes[:, :, 0], candidates.scores[..., 0], candidates.valid
        if valid.shape[1] > keep.post_nms:
            valid = nms_keep(boxes, scores, valid, keep.nms_iou, method=keep.nms_method)
        scores, order = scores.masked_fill(~valid, -1.0).sort(dim=1, descending=True, stable=True)
        scores, order = scores[:, : keep.post_nms], order[:, : keep.post_nms]
        valid = scores >= 0
        boxes = torch.where(valid[..., None], boxes.gather(1, order[..., None].expand(-1, -1, 4)), 0.0)
        return Detections(boxes, scores.clamp(min=0), torch.zeros_like(order), valid)

    def _at(self, output: RPNOutput, pyramid: Pyramid, sample: Sample) -> tuple[Tensor, Tensor]:
        if not self.samples_loss:
            return output.logits.gather(1, sample.idxs), output.deltas.gather(
                1, sample.idxs[..., None].expand(-1, -1, 4)
            )
        per_cell = self.anchors.num_per_cell
        return self.head.at(gather_neighborhoods(pyramid, sample.idxs // per_cell), sample.idxs % per_cell)

    def allowed(self, pyramid: Pyramid) -> Tensor:
        """Anchors [B, M] centered within their image's own size, rounded up to the canvas stride."""
        if self.padding_anchors == "keep":
            num_anchors = sum(height * width for height, width in pyramid.shapes) * self.anchors.num_per_cell
            return pyramid.sizes.new_ones(len(pyramid.sizes), num_anchors, dtype=torch.bool)
        centers = torch.cat(self.anchors.centers(pyramid.shapes))  # [N, 2] (x, y)
        limits = (pyramid.sizes + self.canvas_stride - 1) // self.canvas_stride * self.canvas_stride
        inside = (centers < limits.flip(1)[:, None]).all(dim=2)
        return inside.repeat_interleave(self.anchors.num_per_cell, dim=1)
