"""Matching of candidates with ground-truth boxes, and sampling of candidates for a loss (Faster R-CNN 3.1.2).

Everything here has a fixed shape and asks the device nothing: no candidate is picked by a data-dependent index list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from fpn_det.boxes import box_iou
from fpn_det.schema import Count, CountOrZero, Fraction
from fpn_det.structures import Match, Sample, Targets

IntOrTensor = TypeVar("IntOrTensor", int, Tensor)

PAIRS_AT_ONCE = 1 << 24  # IoU values in memory at a time: 64 MiB for any number of boxes


@dataclass(frozen=True)
class Matcher:
    """Matches candidates with ground-truth boxes by IoU.

    A candidate is positive for the box it overlaps most if that IoU reaches `positive_iou`, negative if it is below
    `negative_iou`, and ignored in between.

    Args:
        positive_iou, negative_iou: thresholds in [0, 1].
        allow_low_quality_matches: also make the best candidates of every box positive, whatever their IoU above 0
            (they keep the box that they overlap most).
    """

    positive_iou: Fraction = 0.7
    negative_iou: Fraction = 0.3
    allow_low_quality_matches: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.negative_iou <= self.positive_iou <= 1:
            raise ValueError(
                f"matcher: expected 0 <= negative_iou <= positive_iou <= 1, got {self.negative_iou} and {self.positive_iou}."
            )

    @torch.no_grad()
    def __call__(self, targets: Targets, candidates: Tensor, allowed: Tensor) -> Match:
        """Match candidates [M, 4] or [B, M, 4], of which only those `allowed` [B, M] take part."""
        candidates = candidates.expand(len(targets.boxes), -1, -1) if candidates.dim() == 2 else candidates
        chunk = max(1, PAIRS_AT_ONCE // targets.labels.numel())
        parts = list(zip(candidates.split(chunk, dim=1), allowed.split(chunk, dim=1), strict=True))
        ious = [self._iou(targets, *parts[0])] if len(parts) == 1 else None  # kept if it is the only one

        def iou_of(part: int) -> Tensor:
            return ious[part] if ious else self._iou(targets, *parts[part])

        best = [iou_of(part).max(dim=1) for part in range(len(parts))]
        best_iou = torch.cat([values for values, _ in best], dim=1)  # [B, M], -1 without boxes
        matched_idxs = torch.cat([idxs for _, idxs in best], dim=1)
        positive = best_iou >= self.positive_iou
        if self.allow_low_quality_matches:
            box_best = torch.stack([iou_of(part).amax(dim=2) for part in range(len(parts))]).amax(dim=0)  # [B, G]
            eligible = targets.valid & self.is_eligible(box_best)
            low_quality, reassigned = [], []
            for part, (_, part_idxs) in enumerate(best):
                is_best = (iou_of(part) == box_best[..., None]) & eligible[..., None]  # [B, G, M']
                low_quality.append(is_best.any(dim=1))
                reassigned.append(self.reassign(part_idxs, is_best))
            positive = positive | torch.cat(low_quality, dim=1)
            matched_idxs = torch.cat(reassigned, dim=1)
        positive = positive & allowed
        negative = (best_iou < self.negative_iou) & allowed & ~positive
        return Match(positive, negative, matched_idxs)

    def is_eligible(self, best_iou: Tensor) -> Tensor:
        """Mask [B, G] of the boxes that get low-quality matches, given their best IoU: those that a candidate touches."""
        return best_iou > 0

    def reassign(self, matched_idxs: Tensor, is_best: Tensor) -> Tensor:
        """Matched boxes [B, M'] after low-quality matches: unchanged, each candidate keeps the box it overlaps most.

        Args:
            is_best: whether each candidate is a best one of each box [B, G, M'].
        """
        return matched_idxs

    @staticmethod
    def _iou(targets: Targets, candidates: Tensor, allowed: Tensor) -> Tensor:
        """IoU [B, G, M'], -1 for padding rows and candidates that do not take part."""
        iou = box_iou(targets.boxes, candidates)
        return iou.masked_fill_(~(targets.valid[:, :, None] & allowed[:, None, :]), -1.0)


@dataclass(frozen=True)
class Sampler:
    """Samples at most `num_samples` candidates per image, at most `positive_fraction` of them positive.

    The sample is a function of (seed, step, image, candidate) alone, so it does not depend on workers, ranks or the order
    of a batch, and a resumed run samples what the uninterrupted one would have.
    """

    num_samples: Count  # per image
    positive_fraction: Fraction  # upper bound
    seed: CountOrZero = 0

    def __post_init__(self) -> None:
        if self.num_samples < 1 or not 0 <= self.positive_fraction <= 1:
            raise ValueError(
                f"sampler: expected num_samples >= 1 and positive_fraction in 0..1, got {self.num_samples} and {self.positive_fraction}."
            )

    @torch.no_grad()
    def __call__(self, match: Match, indices: Tensor, step: int) -> Sample:
        """Sample for images with these data set `indices` [B] at this optimizer step."""
        keys = random_keys(self.seed, step, indices, match.positive.shape[1])
        num_slots = min(self.num_samples, keys.shape[1])
        max_positives = min(int(self.num_samples * self.positive_fraction), keys.shape[1])
        positive_keys, positive_idxs = torch.where(match.positive, keys, -1).topk(max_positives)
        negative_keys, negative_idxs = torch.where(match.negative, keys, -1).topk(num_slots)
        num_positives = (positive_keys >= 0).sum(dim=1, keepdim=True)
        num_negatives = (negative_keys >= 0).sum(dim=1, keepdim=True)
        slots = torch.arange(num_slots, device=keys.device).expand(len(keys), -1)
        positive = slots < num_positives
        # slot s holds the s-th positive, then negative number s - num_positives
        source = torch.where(positive, slots, max_positives + slots - num_positives)
        idxs = torch.cat([positive_idxs, negative_idxs], dim=1).gather(1, source)
        return Sample(idxs, positive, slots < num_positives + num_negatives)


@dataclass(frozen=True)
class ProposalSampler(Sampler):
    """Samples proposals for the losses of the ROI head."""

    num_samples: Count = 512
    positive_fraction: Fraction = 0.25
    add_gt: bool = True  # the ground-truth boxes join the proposals


def random_keys(seed: int, step: int, indices: Tensor, num_candidates: int) -> Tensor:
    """Distinct non-negative random integers [B, M], i64: a hash of (seed, step, data set index, candidate)."""
    start = _mix((_mix((_mix(seed & 0xFFFFFFFF) + step) & 0xFFFFFFFF) + indices) & 0xFFFFFFFF)
    candidates = torch.arange(num_candidates, device=indices.device)
    return (_mix(start[:, None] ^ _mix(candidates)) << 30) | candidates  # the index in the low bits breaks ties


def _mix(value: IntOrTensor) -> IntOrTensor:
    """Scramble 32-bit integers, Python's or held in i64; a bijection (multiply and xor-shift rounds)."""
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    value = ((value ^ (value >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return value ^ (value >> 16)
