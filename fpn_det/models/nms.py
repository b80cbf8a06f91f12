"""Greedy non-maximum suppression of several groups of boxes, with a mask of fixed shape as its result."""

from __future__ import annotations

import importlib.util
from typing import Literal, get_args

import torch
import torchvision
from torch import Tensor

from fpn_det.boxes import box_iou

PAIR_BYTES = 1 << 27  # float32 IoU values in memory at a time; temporaries take about three times as much
MIN_BLOCK = 32  # boxes of a group that are decided together at least
MAX_TRITON_BOXES = 1 << 18  # per group
HAS_TRITON = importlib.util.find_spec("triton") is not None
NmsMethod = Literal["auto", "torchvision", "batched"]
METHODS: tuple[NmsMethod, ...] = get_args(NmsMethod)


def nms_keep(
    boxes: Tensor,
    scores: Tensor,
    valid: Tensor,
    iou_threshold: float,
    labels: Tensor | None = None,
    method: NmsMethod = "auto",
) -> Tensor:
    """Suppress overlapping boxes within each group.

    Args:
        boxes: [P, K, 4], xyxy with non-negative coordinates; a group is an image, or a level or class of an image.
        scores: [P, K]; of equal scores the first one ranks higher.
        valid: [P, K]; a box that is not valid is not kept and suppresses nothing.
        iou_threshold: in [0, 1); a box is suppressed if its IoU with a kept box of higher score is greater.
        labels: [P, K]; if given, boxes suppress only boxes with the same label.
        method: `torchvision` calls torchvision's operator for each group, with one host read each. `batched` processes
            all groups at once, on a GPU with Triton without a host read. `auto` chooses the first on the CPU and the
            second elsewhere.

    Returns:
        Mask [P, K] of the boxes that are kept.

    Raises:
        ValueError: unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"nms: expected method {', '.join(METHODS)}, got '{method}'.")
    if method == "auto":
        method = "torchvision" if boxes.device.type == "cpu" else "batched"
    arguments = boxes, scores, valid, labels, iou_threshold, method == "batched"
    if torch.compiler.is_compiling() or (method == "batched" and _uses_triton(boxes)):
        return _suppress_operator(*arguments)
    return _suppress(*arguments)


def _suppress(
    boxes: Tensor, scores: Tensor, valid: Tensor, labels: Tensor | None, iou_threshold: float, batched: bool
) -> Tensor:
    if not valid.numel():
        return torch.zeros_like(valid)
    suppress = _batched if batched else _per_group
    return suppress(boxes, torch.where(valid, scores, -torch.inf), valid, iou_threshold, labels) & valid


# As one operator, which a compiled graph contains without a break, and which has a fake implementation for tracing.
_suppress_operator = torch.library.custom_op("fpn_det::suppress", _suppress, mutates_args=())


@_suppress_operator.register_fake
def _(boxes, scores, valid, labels, iou_threshold, batched):
    return torch.empty_like(valid)


def _uses_triton(boxes: Tensor) -> bool:
    return boxes.device.type == "cuda" and HAS_TRITON and boxes.shape[1] <= MAX_TRITON_BOXES


def _per_group(boxes: Tensor, scores: Tensor, valid: Tensor, iou_threshold: float, labels: Tensor | None) -> Tensor:
    """Greedy suppression by torchvision's operator, group by group."""
    if labels is not None:
        # Shift every label beyond the boxes of the label before; in float64 the shift costs no precision. A box that is
        # not finite must not set the distance: it overlaps nothing, and the others still suppress each other.
        boxes = boxes.double()
        extent = torch.where(boxes.isfinite(), boxes, 0.0).amax() + 1
        boxes = boxes + (labels * extent)[..., None]
    # move boxes that are not valid to one place outside the image, where the first of them suppresses the others at once
    unused = torch.tensor([-2.0, -2.0, -1.0, -1.0], dtype=boxes.dtype)
    boxes = torch.where(valid[..., None], boxes, unused.to(boxes.device))
    keep = torch.zeros_like(valid)
    for group, group_boxes, group_scores in zip(keep, boxes, scores, strict=True):
        group[torchvision.ops.nms(group_boxes, group_scores.to(group_boxes.dtype), iou_threshold)] = True
    return keep


def _batched(boxes: Tensor, scores: Tensor, valid: Tensor, iou_threshold: float, labels: Tensor | None) -> Tensor:
    """Greedy suppression of all groups at once: on a GPU with Triton without a host read, otherwise in plain torch."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    boxes = boxes.gather(1, order[..., None].expand_as(boxes))
    labels = None if labels is None else labels.gather(1, order)
    sorted_valid = valid.gather(1, order)
    if _uses_triton(boxes):
        from fpn_det.models.nms_triton import greedy_mask

        keep = greedy_mask(boxes, sorted_valid, iou_threshold, labels)
    else:
        groups_at_once = max(1, PAIR_BYTES // (4 * MIN_BLOCK * boxes.shape[1]))
        keep = torch.empty_like(sorted_valid)
        for start in range(0, len(boxes), groups_at_once):
            part = slice(start, start + groups_at_once)
            part_labels = None if labels is None else labels[part]
            keep[part] = _greedy_mask(boxes[part], sorted_valid[part], part_labels, iou_threshold)
    return torch.zeros_like(valid).scatter(1, order, keep)


def _greedy_mask(boxes: Tensor, valid: Tensor, labels: Tensor | None, iou_threshold: float) -> Tensor:
    """Mask [P, K] of the boxes [P, K, 4], sorted from the best on, that survive.

    Boxes are decided block by block. A block is compared with itself and with all later boxes, so memory is proportional
    to its size times K, and the block is as large as PAIR_BYTES allow.
    """
    num_groups, num_boxes = valid.shape
    size = max(MIN_BLOCK, PAIR_BYTES // (4 * num_groups * num_boxes))
    remaining = valid.clone()  # valid boxes that no better box has suppressed so far
    for start in range(0, num_boxes, size):
        stop = min(start + size, num_boxes)
        suppresses = box_iou(boxes[:, start:stop], boxes[:, start:]) > iou_threshold  # [P, stop - start, K - start]
        if labels is not None:
            suppresses &= labels[:, start:stop, None] == labels[:, None, start:]
        within = suppresses[:, :, : stop - start].triu(diagonal=1)
        kept = _fixed_point(within, remaining[:, start:stop])
        remaining[:, start:stop] = kept
        if stop < num_boxes:
            remaining[:, stop:] &= ~(suppresses[:, :, stop - start :] & kept[:, :, None]).any(dim=1)
    return remaining


def _fixed_point(suppresses: Tensor, valid: Tensor) -> Tensor:
    """The mask keep [P, N] with keep = valid & ~any(suppresses & keep), for [P, N, N] strictly upper triangular.

    Each round decides at least one more box for good, and usually all of them are decided after a few.
    """
    keep, rounds = valid, 8
    while True:
        for _ in range(rounds):
            previous = keep
            keep = valid & ~(suppresses & previous[:, :, None]).any(dim=1)
        if not (keep != previous).any():  # the host read
            return keep
        rounds *= 2
