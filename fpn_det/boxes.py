"""Boxes as numbers, and the one statement of what the numbers mean.

Coordinates are continuous, in px, xyxy: pixel i covers [i, i + 1), so a box over the whole image is (0, 0, w, h), its
width is x2 - x1, and nowhere is one added or taken away. Cell j of a map of stride s covers [j * s, (j + 1) * s).
A horizontal flip is x -> w - x.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_LOG_SCALE = math.log(1000 / 16)  # a predicted box is at most 62.5 times as wide or high as its anchor


def xywh_to_xyxy(boxes: Tensor) -> Tensor:
    """From COCO's (x, y, width, height) [..., 4] to corners."""
    return torch.cat([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], dim=-1)


def xyxy_to_xywh(boxes: Tensor) -> Tensor:
    """From corners [..., 4] to COCO's (x, y, width, height)."""
    return torch.cat([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], dim=-1)


def box_sides(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Widths and heights [...] of boxes [..., 4]."""
    return boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]


def box_area(boxes: Tensor) -> Tensor:
    """Areas [...] of boxes [..., 4]."""
    width, height = box_sides(boxes)
    return width * height


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of every pair: [..., P, 4] and [..., Q, 4] give [..., P, Q].

    A pair without area has IoU 0, never NaN.
    """
    # one axis after the other, in place: the pair table is the only large temporary
    width = torch.minimum(boxes[..., :, None, 2], others[..., None, :, 2])
    width = width.sub_(torch.maximum(boxes[..., :, None, 0], others[..., None, :, 0])).clamp_(min=0)
    height = torch.minimum(boxes[..., :, None, 3], others[..., None, :, 3])
    height = height.sub_(torch.maximum(boxes[..., :, None, 1], others[..., None, :, 1])).clamp_(min=0)
    intersection = width.mul_(height)
    union = box_area(boxes)[..., :, None] + box_area(others)[..., None, :] - intersection
    return intersection.div_(union.clamp_(min=torch.finfo(union.dtype).tiny))


def clip_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Cut boxes [B, P, 4] to their images, `sizes` [B, 2] as (h, w)."""
    limit = sizes.to(boxes.dtype).flip(-1).repeat(1, 2)[:, None]  # [B, 1, 4] (w, h, w, h)
    return torch.minimum(boxes.clamp(min=0), limit)


def encode_deltas(boxes: Tensor, anchors: Tensor, weights: tuple[float, float, float, float]) -> Tensor:
    """Express each box [..., 4] as a shift and a stretch of its anchor [..., 4] (Faster R-CNN, eq. 2).

    Exact inverse of `decode_deltas` while dw and dh stay below MAX_LOG_SCALE.

    Args:
        boxes: where to arrive; px, positive sides.
        anchors: where to start; row i belongs to boxes[i].
        weights: multipliers of (dx, dy, dw, dh); (10, 10, 5, 5) brings ROI deltas near unit variance.

    Returns:
        (dx, dy) in anchor widths and heights, (dw, dh) as natural logs of the side ratios, times `weights`.
    """
    anchor_width, anchor_height = box_sides(anchors)
    box_width, box_height = box_sides(boxes)
    dx = (boxes[..., 0] + 0.5 * box_width - anchors[..., 0] - 0.5 * anchor_width) / anchor_width
    dy = (boxes[..., 1] + 0.5 * box_height - anchors[..., 1] - 0.5 * anchor_height) / anchor_height
    deltas = torch.stack([dx, dy, torch.log(box_width / anchor_width), torch.log(box_height / anchor_height)], dim=-1)
    return deltas * deltas.new_tensor(weights)


def decode_deltas(
    deltas: Tensor,
    anchors: Tensor,
    weights: tuple[float, float, float, float],
    max_log_scale: float = MAX_LOG_SCALE,
    min_log_scale: float = -math.inf,
) -> Tensor:
    """Move and stretch anchors [..., 4] by deltas [..., 4]; the inverse of `encode_deltas`, in float32."""
    anchor_width, anchor_height = box_sides(anchors)
    dx, dy, dw, dh = (
        deltas.float() / torch.tensor(weights, dtype=torch.float32).to(deltas.device, non_blocking=True)
    ).unbind(-1)
    center_x = anchors[..., 0] + 0.5 * anchor_width + dx * anchor_width
    center_y = anchors[..., 1] + 0.5 * anchor_height + dy * anchor_height
    half_width = 0.5 * torch.exp(dw.clamp(min_log_scale, max_log_scale)) * anchor_width
    half_height = 0.5 * torch.exp(dh.clamp(min_log_scale, max_log_scale)) * anchor_height
    return torch.stack(
        [center_x - half_width, center_y - half_height, center_x + half_width, center_y + half_height], dim=-1
    )
