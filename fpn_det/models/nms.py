"""Non-maximum suppression: of boxes that overlap too much, keep the one with the best score.

Its answer depends on the data, so it comes out as a mask, and here alone the host may have to wait for the device.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torchvision
from torch import Tensor

from fpn_det.boxes import box_iou

SUPPRESSION_BYTES = 1 << 30  # bool matrices held at a time by the batched method
IOU_BYTES = 1 << 27  # float32 IoU values held at a time while they are made
Method = Literal["auto", "torchvision", "batched", "shifted", "torchvision_batched"]
METHODS: tuple[Method, ...] = get_args(Method)


def nms_keep(
    boxes: Tensor,
    scores: Tensor,
    valid: Tensor,
    iou_threshold: float,
    labels: Tensor | None = None,
    method: Method = "auto",
) -> Tensor:
    """Which boxes survive greedy suppression, each group for itself.

    Args:
        boxes: [P, K, 4], non-negative coordinates; P groups (an image, or a level of an image).
        scores: [P, K]; of equal scores the first wins.
        valid: [P, K]; what is not valid neither survives nor suppresses.
        iou_threshold: in [0, 1); a box goes if its IoU with a better survivor is greater.
        labels: [P, K]; if given, only boxes of the same label suppress each other.
        method: `torchvision` calls its operator once per group (one host read each), `batched` handles all groups at
            once (a handful of reads in all), `auto` takes the first on CPU and the second elsewhere. The peers' ways
            separate labels by shifting boxes in float32, where rounding decides close calls: `shifted` (mmdetection),
            and `torchvision_batched` (torchvision, detectron2), which shifts up to 1000 boxes only.

    Returns:
        bool [P, K].
    """
    if method not in METHODS:
        raise ValueError(f"nms: expected method {', '.join(METHODS)}, got '{method}'.")
    if method == "auto":
        method = "torchvision" if boxes.device.type == "cpu" else "batched"
    if method in ("shifted", "torchvision_batched"):
        labels = torch.zeros_like(valid, dtype=torch.int64) if labels is None else labels
        return _as_peers(boxes, scores, valid, iou_threshold, labels, method)
    suppress = _per_group if method == "torchvision" else _batched
    return suppress(boxes, scores.masked_fill(~valid, -torch.inf), valid, iou_threshold, labels) & valid


def nms_keep_levels(
    boxes: Tensor, scores: Tensor, valid: Tensor, iou_threshold: float, method: Method = "auto"
) -> Tensor:
    """The same for boxes [B, L, K, 4] of several levels, each level for itself: bool [B, L, K]."""
    if method in ("shifted", "torchvision_batched"):  # one call per image, levels in place of labels
        levels = torch.arange(boxes.shape[1], device=boxes.device)[:, None].expand_as(valid).flatten(1)
        keep = nms_keep(boxes.flatten(1, 2), scores.flatten(1), valid.flatten(1), iou_threshold, levels, method)
    else:
        keep = nms_keep(boxes.flatten(0, 1), scores.flatten(0, 1), valid.flatten(0, 1), iou_threshold, method=method)
    return keep.view_as(valid)


def _per_group(boxes: Tensor, scores: Tensor, valid: Tensor, iou_threshold: float, labels: Tensor | None) -> Tensor:
    if labels is not None:
        # each label on an island of its own; in float64 the shift costs no precision
        boxes = boxes.double()
        boxes = boxes + (labels * (boxes.amax() + 1))[..., None]
    # invalid boxes all lie on one spot outside, where the first of them suppresses the rest at once
    boxes = torch.where(valid[..., None], boxes, boxes.new_tensor([-2.0, -2.0, -1.0, -1.0]))
    keep = torch.zeros_like(valid)
    for group, group_boxes, group_scores in zip(keep, boxes, scores, strict=True):
        group[torchvision.ops.nms(group_boxes, group_scores.to(group_boxes.dtype), iou_threshold)] = True
    return keep


def _as_peers(
    boxes: Tensor, scores: Tensor, valid: Tensor, iou_threshold: float, labels: Tensor, method: Method
) -> Tensor:
    keep = torch.zeros_like(valid)
    for group, mask, *columns in zip(keep, valid, boxes, scores, labels, strict=True):
        (chosen,) = torch.where(mask)
        if not len(chosen):
            continue
        group_boxes, group_scores, group_labels = (column[chosen] for column in columns)
        if method == "torchvision_batched":
            kept = torchvision.ops.batched_nms(group_boxes, group_scores, group_labels, iou_threshold)
        else:
            shifts = group_labels * (group_boxes.max() + 1)
            kept = torchvision.ops.nms(group_boxes + shifts[:, None], group_scores, iou_threshold)
        group[chosen[kept]] = True
    return keep


def _batched(boxes: Tensor, scores: Tensor, valid: Tensor, iou_threshold: float, labels: Tensor | None) -> Tensor:
    """Greedy suppression as the fixed point of keep = valid & ~any(better & overlapping & keep)."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    boxes = boxes.gather(1, order[..., None].expand_as(boxes))
    labels = None if labels is None else labels.gather(1, order)
    sorted_valid = valid.gather(1, order)
    size = boxes.shape[1]
    at_once = max(1, SUPPRESSION_BYTES // max(1, size * size))
    kept = [
        _fixed_point(
            _suppressors(boxes[part], iou_threshold, None if labels is None else labels[part]), sorted_valid[part]
        )
        for part in torch.arange(len(boxes), device="cpu").split(at_once)
    ]
    return torch.zeros_like(valid).scatter(1, order, torch.cat(kept))


def _suppressors(boxes: Tensor, iou_threshold: float, labels: Tensor | None) -> Tensor:
    """Bool [P, K, K]: entry (i, j) says that i, if it stays, removes j. Boxes are sorted, best first."""
    num_groups, size = boxes.shape[:2]
    matrix = torch.empty(num_groups, size, size, dtype=torch.bool, device=boxes.device)
    at_once = max(1, IOU_BYTES // max(1, 4 * size * size))
    for start in range(0, num_groups, at_once):
        part = slice(start, start + at_once)
        matrix[part] = box_iou(boxes[part], boxes[part]) > iou_threshold
        if labels is not None:
            matrix[part] &= labels[part, :, None] == labels[part, None, :]
    return matrix.triu_(diagonal=1)


def _fixed_point(suppressors: Tensor, valid: Tensor) -> Tensor:
    keep, rounds = valid, 8
    while True:
        for _ in range(rounds):
            previous = keep
            keep = valid & ~(suppressors & previous[:, :, None]).any(dim=1)
        if not (keep != previous).any():  # the host read
            return keep
        rounds *= 2
