"""Many images as one batch, and how it travels from a worker to the main process.

A batch is packed in a worker and unpacked where it is used. Its pixels travel in a few buffers that the worker shares
with the main process and uses in turn: fresh shared memory for each batch, which is what torch's loader does, takes
longer than decoding the images, because the system has to provide and clear every page. The rest is small and pickled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fpn_det.data.dataset import Example
from fpn_det.structures import Batch, Targets

Canvas = Literal["batch"] | tuple[int, int]  # as large as the batch needs, or (H, W) px
Size = tuple[int, int]


@dataclass(frozen=True)
class Parcel:
    """A batch before it is put together. `slot` names the shared buffer of its pixels, if they lie in one."""

    pixels: Tensor  # u8 or f32 [B, H, W, 3]
    sizes: list[Size]
    original_sizes: list[Size]
    boxes: list[np.ndarray]
    labels: list[np.ndarray]
    indices: list[int]
    slot: tuple[int, int] | None = None  # (worker, number)

    def unpack(self) -> Batch:
        """The batch. Its pixels are these, seen as [B, 3, H, W]: channels stay last in memory, as files have them."""
        return Batch(
            pixels=self.pixels.permute(0, 3, 1, 2),  # [B, H, W, 3] -> [B, 3, H, W]
            sizes=torch.tensor(self.sizes),
            original_sizes=torch.tensor(self.original_sizes),
            targets=Targets.pad(list(map(torch.from_numpy, self.boxes)), list(map(torch.from_numpy, self.labels))),
            indices=torch.tensor(self.indices),
        )


class SharedBuffers:
    """A worker's buffers for pixels, used in turn; each grows to the largest batch that it has to hold."""

    def __init__(self, count: int) -> None:
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * count
        self.slot = count - 1  # the one handed out last

    def __call__(self, *shape: int) -> Tensor:
        """The next buffer, as u8 of this shape. What was in it is overwritten."""
        self.slot = (self.slot + 1) % len(self._buffers)
        size = int(np.prod(shape))
        if len(self._buffers[self.slot]) < size:
            self._buffers[self.slot] = torch.empty(size, dtype=torch.uint8).share_memory_()
        return self._buffers[self.slot][:size].view(shape)


def _private_memory(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.uint8)


def canvas_size(sizes: Sequence[Size], stride: int, canvas: Canvas) -> Size:
    """The (H, W) on which images of `sizes` are laid: the canvas given, or the least that the stride divides.

    Raises:
        ValueError: an image is larger than the canvas given.
    """
    height, width = (max(sides) for sides in zip(*sizes, strict=True))
    if canvas == "batch":
        return -(-height // stride) * stride, -(-width // stride) * stride
    if height > canvas[0] or width > canvas[1]:
        raise ValueError(
            f"data.canvas: expected images of at most {canvas[0]} x {canvas[1]} px (h x w), got {height} x {width}. "
            f"Enlarge the canvas, or resize to less."
        )
    return canvas


def pack(
    examples: Sequence[Example], stride: int, canvas: Canvas, memory: Callable[..., Tensor] = _private_memory
) -> Parcel:
    """Lay the images on one canvas, padded with zeros right and bottom, in bytes from `memory(B, H, W, bytes per pixel)`."""
    sizes = [example.pixels.shape[:2] for example in examples]
    kind = torch.from_numpy(examples[0].pixels).dtype
    pixels = memory(len(examples), *canvas_size(sizes, stride, canvas), 3 * kind.itemsize).view(kind)
    for image, example, (height, width) in zip(pixels.numpy(), examples, sizes, strict=True):
        image[:height, :width] = example.pixels
        image[:height, width:] = 0
        image[height:] = 0
    return Parcel(
        pixels,
        sizes,
        [example.original_size for example in examples],
        [example.boxes for example in examples],
        [example.labels for example in examples],
        [example.index for example in examples],
    )


def collate(examples: Sequence[Example], stride: int, canvas: Canvas) -> Batch:
    """The images as a batch, here and now."""
    return pack(examples, stride, canvas).unpack()
