"""Dynamic R-CNN: the IoU of positive boxes and the beta of smooth L1 follow the quality of the proposals (Zhang et al. 2020).

The statistics are buffers on the device: they are in checkpoints, undone with a bad step, and cost no host read. As in the authors'
code, the error that beta follows is ranked within a micro-batch of a rank, so beta depends a little on how a step is divided.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fpn_det.boxes import BoxCoder, box_iou
from fpn_det.models.box_heads import BoxHead, TwoLayerHead
from fpn_det.models.layers import RunningStatistics
from fpn_det.models.losses import ClassLoss, CrossEntropy
from fpn_det.models.matching import ProposalSampler
from fpn_det.models.roi_align import RoIAlign
from fpn_det.models.roi_head import BoxPredictor, ROIHead, SampledBoxes
from fpn_det.models.selection import DetectionFilter
from fpn_det.runtime import all_reduce_sum
from fpn_det.schema import Count, Fraction, Positive
from fpn_det.structures import Batch, Losses, Match, Proposals, Pyramid, Targets


class Dynamics(RunningStatistics):
    """The present IoU and beta, and what is gathered for the next ones.

    Args:
        iou, beta: of the first interval; later ones are at least this IoU, and at most this beta.
        interval: steps after which both are set anew.
    """

    def __init__(self, iou: float, beta: float, interval: int) -> None:
        super().__init__()
        self.initial_iou, self.initial_beta, self.interval = iou, beta, interval
        self.register_buffer("iou", torch.tensor(iou))
        self.register_buffer("beta", torch.tensor(beta))
        self.register_buffer("number", torch.tensor(0))  # of the present interval
        self.register_buffer("ious", torch.zeros(2))  # sum and count over micro-batches and ranks
        self.register_buffer("betas", torch.zeros(interval, 2))  # of each step, likewise
        self.iou: Tensor
        self.beta: Tensor
        self.number: Tensor
        self.ious: Tensor
        self.betas: Tensor

    @torch.no_grad()
    def begin(self, step: int | Tensor) -> None:
        """Set IoU and beta anew if `step` is in another interval than the step before (Algorithm 1)."""
        is_new = self.number != step // self.interval
        mean = self.ious[0] / self.ious[1].clamp(min=1)
        self.iou.copy_(torch.where(is_new, mean.clamp(min=self.initial_iou), self.iou))
        sums, counts = self.betas.unbind(1)
        median = torch.where(counts > 0, sums / counts, torch.nan).nanquantile(0.5)
        is_usable = is_new & (median > 1e-6)  # NaN, of an interval without positives, fails
        self.beta.copy_(torch.where(is_usable, median.clamp(max=self.initial_beta), self.beta))
        self.ious.copy_(torch.where(is_new, 0.0, self.ious))
        self.betas.copy_(torch.where(is_new, 0.0, self.betas))
        self.number.copy_(torch.where(is_new, step // self.interval, self.number))

    @torch.no_grad()
    def add(self, iou: Tensor, beta: Tensor, has_beta: Tensor, step: int | Tensor) -> None:
        """Gather the scalars of one micro-batch, over all ranks; `beta` counts if `has_beta`."""
        one = torch.ones_like(iou)
        values = all_reduce_sum(torch.stack([iou, one, torch.where(has_beta, beta, 0.0), has_beta * one]))
        self.ious.add_(values[:2])
        is_slot = torch.arange(self.interval, device=iou.device) == step % self.interval
        self.betas.add_(is_slot[:, None] * values[2:])


class DynamicROIHead(ROIHead):
    """An `ROIHead` whose proposals are positive from a growing IoU on, and whose smooth L1 loss has a falling beta.

    Args:
        channels, strides, pooler, box_head, predictor, sampler, cls_loss, test_filter: see `ROIHead`.
        initial_iou: from which IoU on a box is positive at first, and at least later.
        iou_rank: the IoU follows that of the proposal of this rank in each image.
        initial_beta: of smooth L1 at first, and at most later.
        beta_rank: beta follows the error of the positive of this rank per image, from the smallest on.
        interval: steps after which both are set anew.
    """

    def __init__(
        self,
        channels: int,
        strides: Sequence[int],
        pooler: Callable[..., RoIAlign] = RoIAlign,
        box_head: Callable[..., BoxHead] = TwoLayerHead,
        predictor: Callable[..., BoxPredictor] = BoxPredictor,
        sampler: ProposalSampler = ProposalSampler(),
        cls_loss: ClassLoss = CrossEntropy(),
        test_filter: DetectionFilter = DetectionFilter(),
        initial_iou: Fraction = 0.4,
        iou_rank: Count = 75,
        initial_beta: Positive = 1.0,
        beta_rank: Count = 10,
        interval: Count = 100,
    ) -> None:
        super().__init__(
            channels,
            strides,
            pooler,
            box_head,
            predictor,
            sampler=sampler,
            cls_loss=cls_loss,
            box_loss=self.smooth_l1,
            test_filter=test_filter,
        )
        self.dynamics = Dynamics(initial_iou, initial_beta, interval)
        self.iou_rank = iou_rank
        self.beta_rank = beta_rank

    def losses(self, pyramid: Pyramid, proposals: Proposals, batch: Batch, step: int | Tensor) -> Losses:
        """Losses `roi_class` and `roi_box`; in training the statistics follow."""
        if self.training:
            self.dynamics.begin(step)
        sampled = self.sample(proposals, batch, step)
        if self.training:
            iou = self.iou_of_rank(proposals, batch.targets)
            self.dynamics.add(iou, *self.error_of_rank(sampled), step)
        levels = self.pooler.assigner(sampled.boxes)
        logits, deltas = self._predict(pyramid, sampled.boxes, sampled.sample.valid, levels)
        cls_loss, box_loss = self.compare(logits, deltas, sampled, self.predictor)
        statistics = self._statistics(levels, sampled.sample)
        statistics |= {"dynamic/iou": self.dynamics.iou.clone(), "dynamic/beta": self.dynamics.beta.clone()}
        return Losses({"roi_class": cls_loss, "roi_box": box_loss}, statistics)

    @torch.no_grad()
    def match(self, targets: Targets, boxes: Tensor, valid: Tensor) -> Match:
        """Positive from the present IoU on, else negative."""
        best_iou, matched_idxs = _overlaps(targets, boxes, valid).max(dim=1)
        positive = (best_iou >= self.dynamics.iou) & valid
        return Match(positive, valid & ~positive, matched_idxs)

    @torch.no_grad()
    def iou_of_rank(self, proposals: Proposals, targets: Targets) -> Tensor:
        """The IoU of the `iou_rank`-th best candidate of an image with its object, mean over images."""
        boxes, valid = self.candidates(proposals, targets)
        best_iou = _overlaps(targets, boxes, valid).amax(dim=1).clamp(min=0)
        return best_iou.topk(min(self.iou_rank, best_iou.shape[1])).values[:, -1].mean()

    @torch.no_grad()
    def error_of_rank(self, sampled: SampledBoxes) -> tuple[Tensor, Tensor]:
        """The mean of |dx| and |dy| of the positive that is number `beta_rank` times B of the batch, and whether there is any."""
        positive = sampled.sample.positive
        references = torch.where(positive[..., None], sampled.boxes, sampled.gt_boxes)
        errors = self.predictor.coder.encode(sampled.gt_boxes, references)[..., :2].abs().mean(dim=-1)
        errors = torch.where(positive, errors, torch.inf).flatten().sort().values
        count = positive.sum()
        rank = count.clamp(max=self.beta_rank * len(positive)) - 1
        return errors.gather(0, rank.clamp(min=0)[None])[0], count > 0

    def smooth_l1(self, deltas: Tensor, gt_boxes: Tensor, references: Tensor, coder: BoxCoder) -> Tensor:
        """Smooth L1 losses [...] of deltas [..., 4] with the present beta (eq. 7)."""
        error, beta = (deltas - coder.encode(gt_boxes, references)).abs(), self.dynamics.beta
        return torch.where(error < beta, 0.5 * error.square() / beta, error - 0.5 * beta).sum(-1)


def _overlaps(targets: Targets, boxes: Tensor, valid: Tensor) -> Tensor:
    """IoU [B, G, R] of objects and boxes [B, R, 4]; -1 where one of them is not valid."""
    iou = box_iou(targets.boxes, boxes)
    return torch.where(targets.valid[:, :, None] & valid[:, None, :], iou, -1.0)
