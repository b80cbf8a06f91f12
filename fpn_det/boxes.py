"""Boxes, and the convention of their coordinates.

Coordinates are continuous, in px, xyxy: pixel i covers [i, i + 1), so a box over the whole image is (0, 0, w, h) and its
width is x2 - x1, without the +1 of integer conventions. Cell j of a map of stride s covers [j * s, (j + 1) * s).
A horizontal flip is x -> w - x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fpn_det.caching import LastResults, filled

MAX_LOG_SCALE = math.log(1000 / 16)  # a predicted box is at most 62.5 times as wide or high as its anchor


def xywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert COCO's (x, y, width, height) [..., 4] to corners."""
    return torch.cat([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], dim=-1)


def xyxy_to_xywh(boxes: Tensor) -> Tensor:
    """Convert corners [..., 4] to COCO's (x, y, width, height)."""
    return torch.cat([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], dim=-1)


def box_sides(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Widths and heights [...] of boxes [..., 4]."""
    return boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]


def box_area(boxes: Tensor) -> Tensor:
    """Areas [...] of boxes [..., 4]."""
    width, height = box_sides(boxes)
    return width * height


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union [..., P, Q] of every pair of boxes [..., P, 4] and others [..., Q, 4].

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
    """Clip boxes [B, P, 4] to their images of `sizes` [B, 2], (h, w)."""
    limit = sizes.flip(-1).repeat(1, 2)[:, None]  # [B, 1, 4] (w, h, w, h)
    return torch.minimum(boxes.clamp(min=0), limit)


@dataclass(frozen=True)
class BoxCoder:
    """Encodes boxes as shifts and log scales of reference boxes (Faster R-CNN, eq. 2), and decodes them.

    `decode` is the exact inverse of `encode` while dw and dh stay below MAX_LOG_SCALE.

    Attributes:
        weights: multipliers of (dx, dy, dw, dh); (10, 10, 5, 5) brings ROI deltas near unit variance.
    """

    weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    min_log_scale: ClassVar[float] = -math.inf  # lower bound of decoded log scales

    def __post_init__(self) -> None:
        if len(self.weights) != 4 or min(self.weights) <= 0:
            raise ValueError(f"coder.weights: expected four positive numbers, got {list(self.weights)}.")
        object.__setattr__(self, "_weights", LastResults())  # no field, because it is no setting

    def encode(self, boxes: Tensor, references: Tensor) -> Tensor:
        """Encode boxes [..., 4] as deltas [..., 4] of reference boxes.

        Args:
            boxes: xyxy, px, with positive sides.
            references: anchors or proposals; row i belongs to boxes[i].

        Returns:
            (dx, dy) in reference widths and heights, (dw, dh) as natural logs of the side ratios, times `weights`.
        """
        size, reference_size = boxes[..., 2:] - boxes[..., :2], references[..., 2:] - references[..., :2]
        shift = torch.add(boxes[..., :2], size, alpha=0.5) - references[..., :2]
        shift = torch.sub(shift, reference_size, alpha=0.5) / reference_size
        deltas = torch.cat([shift, torch.log(size / reference_size)], dim=-1)
        return deltas if self._is_unit else deltas * self._weights_on(deltas.device)

    def decode(self, deltas: Tensor, references: Tensor) -> Tensor:
        """Decode deltas [..., 4] of reference boxes [..., 4] to boxes [..., 4], float32."""
        deltas = deltas.float() if self._is_unit else deltas.float() / self._weights_on(deltas.device)
        shift, log_scale = deltas.split(2, dim=-1)
        size = references[..., 2:] - references[..., :2]
        center = torch.add(references[..., :2], size, alpha=0.5) + shift * size
        size = torch.exp(log_scale.clamp(self.min_log_scale, MAX_LOG_SCALE)) * size
        return torch.cat([torch.sub(center, size, alpha=0.5), torch.add(center, size, alpha=0.5)], dim=-1)

    @property
    def _is_unit(self) -> bool:
        return all(weight == 1 for weight in self.weights)

    def _weights_on(self, device: torch.device) -> Tensor:
        return self._weights.get(device, lambda: filled(map(float, self.weights), device))  # type: ignore[attr-defined]
