"""The last moves of an image, flip and resize: planned where it is read, made where it is laid on its canvas.

A plan needs the image's size only. So a worker writes the resized image straight into its batch, or leaves that to the
device and sends the pixels as they are.
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class Plan:
    """What is still to be done to an image to bring it into the input frame."""

    size: Size  # in the input frame
    flip: bool = False  # left to right
    backend: Backend = "cv2"
    antialias: bool = False

    @property
    def gives_float(self) -> bool:
        """Whether the finished image is float32, whatever it was."""
        return self.backend == "torch_float"

    def lay(self, pixels: np.ndarray, out: np.ndarray) -> None:
        """Bring `pixels` [h, w, 3] into the input frame, as `out` [*size, 3]: often a part of something larger."""
        enlarges = out.size >= pixels.size
        if self.flip and enlarges:  # where there are fewer pixels
            pixels = cv2.flip(pixels, 1)
        if out.shape == pixels.shape and not self.gives_float:
            out[:] = pixels
        else:
            resize(pixels, self.size, self.backend, self.antialias, out)
        if self.flip and not enlarges:
            cv2.flip(out, 1, out)

    def lay_on_device(self, pixels: Tensor, out: Tensor) -> None:
        """The same on any device; equal up to interpolation."""
        planes = pixels.permute(2, 0, 1)[None].float()  # [h, w, 3] -> [1, 3, h, w]
        planes = planes.flip(3) if self.flip else planes
        if planes.shape[2:] != self.size:
            area = self.antialias and self.backend == "cv2" and out.numel() < pixels.numel()
            mode = "area" if area else "bilinear"
            planes = F.interpolate(planes, self.size, mode=mode, antialias=self.antialias and not area)
        planes = planes if out.is_floating_point() else planes.round()
        out.copy_(planes[0].permute(1, 2, 0))


def resized_size(size: Size, side: int, max_side: int, rounding: Rounding) -> Size:
    """The (h, w) whose shorter side is `side`, or less where the longer would pass `max_side`; the aspect ratio stays.

    `floor` also floors what is `side` but for the last bit, as torchvision does: 161 * (800 / 161) gives 799.
    """
    scale = min(side / min(size), max_side / max(size))
    extra = 0.5 if rounding == "round" else 0.0
    return max(int(size[0] * scale + extra), 1), max(int(size[1] * scale + extra), 1)


def resize(
    pixels: np.ndarray, size: Size, backend: Backend, antialias: bool, out: np.ndarray | None = None
) -> np.ndarray:
    """Bilinear resizing to (h, w), into `out` if there is one. With `antialias`, a smaller image averages the pixels it stands for."""
    height, width = size
    if backend == "cv2":
        if pixels.shape[:2] == size and out is None:
            return pixels
        shrinks = height < pixels.shape[0] and width < pixels.shape[1]
        return cv2.resize(
            pixels, (width, height), out, interpolation=cv2.INTER_AREA if antialias and shrinks else cv2.INTER_LINEAR
        )
    if backend == "pil":
        resized = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
    else:
        planes = torch.tensor(pixels).permute(2, 0, 1)[None].float()  # copies, because PIL's pixels are read-only
        resized = F.interpolate(planes, size, mode="bilinear", antialias=antialias)[0].permute(1, 2, 0).numpy()
    if out is None:
        return np.ascontiguousarray(resized)
    out[:] = resized
    return out
