"""Masked sums over constants: losses whose normaliser does not depend on what was sampled.

A constant is known in advance on every rank, so accumulation and more ranks change nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fpn_det.structures import Sample

NORMALIZERS = ("constant", "sampled", "sampled_both_kinds")


def check_normalizer(name: str) -> str:
    """`name`, if it is a normalizer.

    Raises:
        ValueError: it is not.
    """
    if name not in NORMALIZERS:
        raise ValueError(f"normalizer: expected one of {', '.join(NORMALIZERS)}, got '{name}'.")
    return name


def normalizer(name: str, num_samples: int, sample: Sample) -> Tensor | int:
    """What a sum over samples is divided by.

    `constant`: `num_samples` per image. `sampled`: the samples actually drawn, all images of the batch together, as
    torchvision does; it depends on how a batch is cut, so it does not go with accumulation or more ranks.
    `sampled_both_kinds`: the same, but every image counts at least one positive and one negative (mmdetection).
    """
    if name == "constant":
        return num_samples * len(sample.valid)
    if name == "sampled":
        return sample.valid.sum().clamp(min=1)
    counts = torch.stack([sample.positive.sum(dim=1), (sample.valid & ~sample.positive).sum(dim=1)])
    return counts.clamp(min=1).sum()


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of `values` where `mask`; NaN or infinity elsewhere does not count."""
    return torch.where(mask, values, 0.0).sum()


def box_distance(deltas: Tensor, goals: Tensor, beta: float) -> Tensor:
    """Smooth L1 of box deltas [..., 4], summed over the four [...]; `beta` 0 is plain L1 (Fast R-CNN, eq. 3)."""
    return F.smooth_l1_loss(deltas, goals, reduction="none", beta=beta).sum(-1)
