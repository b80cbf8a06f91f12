"""Views of a batch at several scales: test-time augmentation, and the featurized image pyramid (FPN, Figure 1 a).

A view shows every image at another scale, mirrored or not. Resizing and mirroring are linear in an image's rows and in
its columns, so a batch of images of any sizes becomes a view by two matrix products on its device. A view has an input
frame of its own, with images of `round(scale * side)` px; boxes go there and back by the actual ratio of the sides, and
a mirrored x is `width - x`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fpn_det.boxes import clip_boxes
from fpn_det.schema import Positive
from fpn_det.structures import Batch, Candidates


@dataclass(frozen=True)
class Views:
    """Scales at which a detector processes a batch, each also mirrored if `flip`.

    Raises:
        ValueError: there is no scale, or one that is not positive.
    """

    scales: tuple[Positive, ...] = (1.0,)  # of the input frame; 1 = unscaled
    flip: bool = False  # every scale also mirrored, left to right

    def __post_init__(self) -> None:
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(
                f"views: expected at least one scale above 0, got {list(self.scales)}. [1.0] is the unscaled image."
            )

    def of(self, batch: Batch, stride: int) -> Iterator[tuple[Batch, bool]]:
        """Yield each view, and whether it is mirrored. `stride` divides their canvases. An unscaled view is the batch itself."""
        for scale in self.scales:
            for mirrored in (False, True) if self.flip else (False,):
                yield make_view(batch, scale, mirrored, stride), mirrored

    def merge(self, raw: Callable[[Batch], Candidates], batch: Batch, stride: int) -> Candidates:
        """Collect the candidates that `raw` gives for all views, in the frame of the batch, for one selection."""
        parts = []
        for view, mirrored in self.of(batch, stride):
            found = raw(view)
            parts.append(
                found
                if view is batch
                else replace(found, boxes=resize_boxes(found.boxes, view.sizes, batch.sizes, mirrored))
            )
        return parts[0] if len(parts) == 1 else Candidates.join(parts)


def make_view(batch: Batch, scale: float, mirrored: bool, stride: int) -> Batch:
    """Resize a batch with its boxes; if `mirrored`, flip each image within its own size."""
    if scale == 1 and not mirrored:
        return batch
    sizes = (batch.sizes.double() * scale).round().long().clamp(min=1)
    height, width = (-(-max(round(side * scale), 1) // stride) * stride for side in batch.pixels.shape[2:])
    rows = _resampling(batch.sizes[:, 0], sizes[:, 0], batch.pixels.shape[2], height, mirrored=False)
    columns = _resampling(batch.sizes[:, 1], sizes[:, 1], batch.pixels.shape[3], width, mirrored)
    with torch.autocast(batch.pixels.device.type, enabled=False):  # gray levels need more than 8 bits
        pixels = rows @ batch.pixels.float() @ columns.transpose(2, 3)  # [B, 3, H, W] -> [B, 3, H', W']
    boxed = {}
    for name in ("targets", "proposals"):
        if (record := getattr(batch, name)) is not None:
            boxed[name] = replace(record, boxes=resize_boxes(record.boxes, batch.sizes, sizes, mirrored))
    return replace(batch, pixels=pixels, sizes=sizes, **boxed)


def resize_boxes(boxes: Tensor, source: Tensor, target: Tensor, mirrored: bool) -> Tensor:
    """Map boxes [B, ..., 4] from images of `source` sizes [B, 2] to the same images of `target` sizes, and clip them."""
    ratio = (target.float() / source.float()).flip(1).repeat(1, 2)[:, None]  # [B, 1, 4] (w, h, w, h)
    carried = boxes.flatten(1, -2) * ratio
    if mirrored:
        x1, y1, x2, y2 = carried.unbind(-1)
        width = target[:, 1:].to(carried.dtype)
        carried = torch.stack([width - x2, y1, width - x1, y2], dim=-1)
    return clip_boxes(carried, target).view_as(boxes)


def _resampling(source: Tensor, target: Tensor, length: int, canvas: int, mirrored: bool) -> Tensor:
    """Interpolation matrices [B, 1, canvas, length] of an axis, bilinear and antialiased. Rows outside the image are zero.

    Args:
        source, target: px of the image before and after [B].
        length, canvas: px of the batch before and after.
    """
    source, target = source[:, None, None, None].float(), target[:, None, None, None].float()
    here = torch.arange(canvas, device=source.device)[:, None]
    here = target - 1 - here if mirrored else here
    there = torch.arange(length, device=source.device) + 0.5
    step = source / target
    weights = (1 - (there - (here + 0.5) * step).abs() / step.clamp(min=1)).clamp(min=0)
    weights = torch.where((there < source) & (here >= 0) & (here < target), weights, 0.0)
    total = weights.sum(dim=3, keepdim=True)
    return weights / torch.where(total > 0, total, 1.0)
