"""Horizontal flip and resize, the last transforms of an image: of its boxes and of its pixels.

Both are drawn when an image is transformed (`transforms.Pipeline`). The boxes are moved at once; the pixels are moved when
the batch is made, so that a worker writes the resized image straight into its batch, or sends the decoded pixels and
leaves flip and resize to the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Backend = Literal["cv2", "pil", "torch_float"]
Rounding = Literal["round", "floor"]
Size = tuple[int, int]  # (h, w)
OPENCV_CHANNELS = 4  # that OpenCV resizes at a time in every way; of a single one it drops the axis


@dataclass(frozen=True)
class FlipResize:
    """A flip and a resize to `size`, the step that brings an image into the input frame."""

    size: Size  # in the input frame
    flip: bool = False  # horizontally
    backend: Backend = "cv2"
    antialias: bool = False

    @property
    def returns_float(self) -> bool:
        """True if the output is float32 whatever the dtype of the input."""
        return self.backend == "torch_float"

    def apply_to_boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Map boxes to the input frame.

        Args:
            boxes: f64 [G, 4] xyxy, in units of the image's width and height, 0..1.

        Returns:
            f32 [G, 4] xyxy, px of the input frame.
        """
        if self.flip:
            boxes = np.column_stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]])
        height, width = self.size
        return (boxes * (width, height, width, height)).astype(np.float32)

    def apply(self, pixels: np.ndarray, out: np.ndarray) -> None:
        """Write the flipped and resized `pixels` [h, w, C] to `out` [*size, C], which may be a view into a canvas."""
        enlarges = out.size >= pixels.size
        if self.flip and enlarges:  # flip the smaller of the two
            pixels = cv2.flip(pixels, 1) if pixels.shape[2] == 3 else np.ascontiguousarray(pixels[:, ::-1])
        if out.shape == pixels.shape and not self.returns_float:
            out[:] = pixels
        else:
            resize(pixels, self.size, self.backend, self.antialias, out)
        if self.flip and not enlarges:
            if out.shape[2] == 3:
                cv2.flip(out, 1, out)
            else:
                out[:] = out[:, ::-1].copy()

    def apply_on_device(self, pixels: Tensor, out: Tensor) -> None:
        """Do what `apply` does on any device; the result may differ from it by one grey level, due to interpolation."""
        planes = pixels.permute(2, 0, 1)[None].float()  # [h, w, C] -> [1, C, h, w]
        planes = planes.flip(3) if self.flip else planes
        if self.backend == "cv2" and self.antialias and _shrinks(pixels.shape, self.size):
            rows, columns = (_areas(*sides, pixels.device) for sides in zip(pixels.shape[:2], self.size, strict=True))
            planes = rows @ planes @ columns.T
        elif planes.shape[2:] != self.size:
            antialias = self.antialias and self.backend != "cv2"
            planes = F.interpolate(planes, self.size, mode="bilinear", antialias=antialias)
        planes = planes if out.is_floating_point() else planes.round()
        out.copy_(planes[0].permute(1, 2, 0))


def resized_size(size: Size, side: int, max_side: int, rounding: Rounding) -> Size:
    """Return the (h, w) whose shorter side is `side`, or less if the longer side would exceed `max_side`.

    The aspect ratio is kept. `floor` rounds down even a value that misses an integer by the last bit, as torchvision
    does: 161 * (800 / 161) gives 799.
    """
    scale = min(side / min(size), max_side / max(size))
    extra = 0.5 if rounding == "round" else 0.0
    return max(int(size[0] * scale + extra), 1), max(int(size[1] * scale + extra), 1)


def resize(
    pixels: np.ndarray, size: Size, backend: Backend, antialias: bool, out: np.ndarray | None = None
) -> np.ndarray:
    """Resize `pixels` [h, w, C] bilinearly to `size`.

    Args:
        antialias: average over the source pixels of each output pixel when shrinking.
        out: array to write to; None allocates one.
    """
    height, width = size
    if backend == "cv2":
        if pixels.shape[:2] == size and out is None:
            return pixels
        interpolation = cv2.INTER_AREA if antialias and _shrinks(pixels.shape, size) else cv2.INTER_LINEAR
        if 1 < pixels.shape[2] <= OPENCV_CHANNELS:
            return cv2.resize(pixels, (width, height), out, interpolation=interpolation)
        out = np.empty((height, width, pixels.shape[2]), pixels.dtype) if out is None else out
        for start in range(0, pixels.shape[2], OPENCV_CHANNELS):
            some = np.ascontiguousarray(pixels[..., start : start + OPENCV_CHANNELS])
            resized = cv2.resize(some, (width, height), interpolation=interpolation)
            out[..., start : start + OPENCV_CHANNELS] = resized.reshape(height, width, -1)
        return out
    if backend == "pil":
        resized = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
    else:
        planes = torch.tensor(pixels).permute(2, 0, 1)[None].float()  # copies, because PIL's pixels are read-only
        resized = F.interpolate(planes, size, mode="bilinear", antialias=antialias)[0].permute(1, 2, 0).numpy()
    if out is None:
        return np.ascontiguousarray(resized)
    out[:] = resized
    return out


def _shrinks(shape: Sequence[int], size: Size) -> bool:
    """True if both sides of an image [h, w, ...] shrink: OpenCV averages areas then."""
    return size[0] < shape[0] and size[1] < shape[1]


def _areas(source: int, target: int, device: torch.device) -> Tensor:
    """Weights [target, source] of the pixels of an axis: the share of an output pixel that each of them covers."""
    step = source / target
    starts = torch.arange(target, device=device)[:, None] * step
    pixels = torch.arange(source, device=device)
    overlaps = torch.minimum(starts + step, pixels + 1) - torch.maximum(starts, pixels)
    return overlaps.clamp(min=0) / step
