"""Matching of candidates with ground-truth boxes, and sampling of candidates for a loss (Faster R-CNN 3.1.2).

Everything here has a fixed shape and asks the device nothing: no candidate is picked by a data-dependent index list.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fpn_det.boxes import box_iou
from fpn_det.caching import LastResults
from fpn_det.schema import Count, CountOrZero, Fraction
from fpn_det.structures import Match, Sample, Targets

PAIRS_AT_ONCE = 1 << 24  # IoU values in memory at a time, 64 MiB


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
        num_images, num_boxes = targets.labels.shape
        images_at_once = min(max(1, PAIRS_AT_ONCE // (num_boxes * max(1, candidates.shape[1]))), num_images)
        candidates_at_once = max(1, PAIRS_AT_ONCE // (num_boxes * images_at_once))
        matches = []
        for start in range(0, num_images, images_at_once):
            images = slice(start, start + images_at_once)
            boxes, valid = targets.boxes[images], targets.valid[images]
            matches.append(self._match(boxes, valid, candidates[images], allowed[images], candidates_at_once))
        return Match(*(_joined(parts, dim=0) for parts in zip(*matches, strict=True)))

    def _match(
        self, gt_boxes: Tensor, gt_valid: Tensor, candidates: Tensor, allowed: Tensor, candidates_at_once: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Positive, negative and matched_idxs [B, M] of some images. The IoU of each pair is computed once."""
        best, box_bests, masks = [], [], []
        for part, part_allowed in zip(
            candidates.split(candidates_at_once, dim=1), allowed.split(candidates_at_once, dim=1), strict=True
        ):
            iou = box_iou(gt_boxes, part)  # [B, G, M'], -1 for padding and candidates that do not take part
            iou = torch.where(gt_valid[:, :, None] & part_allowed[:, None, :], iou, -1.0)
            best.append(iou.max(dim=1))
            if self.allow_low_quality_matches:
                box_bests.append(iou.amax(dim=2))
                masks.append(iou == box_bests[-1][..., None])
        best_iou = _joined([values for values, _ in best], dim=1)  # -1 for images without boxes
        matched_idxs = _joined([idxs for _, idxs in best], dim=1)
        positive = best_iou >= self.positive_iou
        negative = (best_iou < self.negative_iou) & allowed
        if self.allow_low_quality_matches:
            box_best = functools.reduce(torch.maximum, box_bests)  # [B, G]
            eligible = gt_valid & self.is_eligible(box_best)
            low_quality, reassigned = [], []
            for (_, part_idxs), part_best, is_best in zip(best, box_bests, masks, strict=True):
                is_best &= (eligible & (part_best == box_best))[..., None]
                low_quality.append(is_best.any(dim=1))
                reassigned.append(self.reassign(part_idxs, is_best))
            positive = (positive | _joined(low_quality, dim=1)) & allowed
            negative = negative & ~positive
            matched_idxs = _joined(reassigned, dim=1)
        return positive, negative, matched_idxs

    def is_eligible(self, best_iou: Tensor) -> Tensor:
        """Mask [B, G] of the boxes that get low-quality matches, given their best IoU: those that a candidate touches."""
        return best_iou > 0

    def reassign(self, matched_idxs: Tensor, is_best: Tensor) -> Tensor:
        """Matched boxes [B, M'] after low-quality matches: unchanged, each candidate keeps the box it overlaps most.

        Args:
            is_best: whether each candidate is a best one of each box [B, G, M'].
        """
        return matched_idxs


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


@dataclass(frozen=True)
class Sampler:
    """Samples at most `num_samples` candidates per image, at most `positive_fraction` of them positive.

    The sample is a function of (seed, step, image, candidate) alone, so it does not depend on workers, ranks or the order
    of a batch, and a resumed run samples what the uninterrupted one would have.
    """

    num_samples: Count  # per image
    positive_fraction: Fraction  # upper bound
    seed: CountOrZero = 0  # of the random draws

    def __post_init__(self) -> None:
        if self.num_samples < 1 or not 0 <= self.positive_fraction <= 1:
            raise ValueError(
                f"sampler: expected num_samples >= 1 and positive_fraction in 0..1, got {self.num_samples} and {self.positive_fraction}."
            )
        object.__setattr__(self, "_hashes", LastResults())  # no field, because it is no setting

    @torch.no_grad()
    def __call__(self, match: Match, indices: Tensor, step: int | Tensor) -> Sample:
        """Sample for images with these data set `indices` [B] at an optimizer step.

        Args:
            step: a number, or an i64 scalar on the device, with which a compiled graph serves all steps.
        """
        num_candidates = match.positive.shape[1]
        key = (num_candidates, indices.device)
        candidates, hashes = self._hashes.get(key, lambda: candidate_hashes(*key))  # type: ignore[attr-defined]
        keys = random_keys(self.seed, step, indices, candidates, hashes)
        num_slots = min(self.num_samples, keys.shape[1])
        max_positives = min(int(self.num_samples * self.positive_fraction), keys.shape[1])
        kinds = torch.stack([match.positive, match.negative], dim=1)  # [B, 2, M]
        best, idxs = torch.where(kinds, keys[:, None], -1).topk(num_slots)
        num_positives, num_negatives = (best >= 0).sum(dim=2, keepdim=True).unbind(1)
        num_positives = num_positives.clamp(max=max_positives)
        slots = candidates[:num_slots].expand(len(keys), -1)
        positive = slots < num_positives
        # slot s holds the s-th positive, then negative number s - num_positives
        source = torch.where(positive, slots, slots + (num_slots - num_positives))
        idxs = idxs.flatten(1).gather(1, source)
        return Sample(idxs, positive, slots < num_positives + num_negatives)


@dataclass(frozen=True)
class ProposalSampler(Sampler):
    """Samples proposals for the losses of the ROI head."""

    num_samples: Count = 512
    positive_fraction: Fraction = 0.25
    add_gt: bool = True  # the ground-truth boxes join the proposals


def candidate_hashes(num_candidates: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Numbers [M] of candidates and their hashes [M], i64."""
    candidates = torch.arange(num_candidates, device=device)
    return candidates, _mix(candidates)


def random_keys(seed: int, step: int | Tensor, indices: Tensor, candidates: Tensor, hashes: Tensor) -> Tensor:
    """Distinct non-negative random integers [B, M], i64: a hash of (seed, step, data set index, candidate).

    Args:
        candidates, hashes: see `candidate_hashes`.
    """
    start = _mix((_mix((_mix(seed & 0xFFFFFFFF) + step) & 0xFFFFFFFF) + indices) & 0xFFFFFFFF)
    return (_mix(start[:, None] ^ hashes) << 30) | candidates  # the index in the low bits breaks ties


def _mix(value: Any) -> Any:
    """Hash 32-bit integers, given as Python numbers or i64; bijective (multiply and xor-shift rounds)."""
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    value = ((value ^ (value >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return value ^ (value >> 16)
