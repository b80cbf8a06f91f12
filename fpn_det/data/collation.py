"""Collation: examples become a batch, on a common canvas and in shared memory.

A worker packs a batch and the main process unpacks it. Either the worker applies the deferred flip and resize and writes
the images into the canvas, or it sends the decoded pixels and the device does so. Pixels are sent in a few buffers that
each worker shares with the main process and uses in turn. Fresh shared memory for every batch, as torch's loader uses
it, takes longer than decoding the images, because the system has to provide and clear every page. The other fields are
small and pickled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fpn_det.data.dataset import Example
from fpn_det.data.flip_resize import FlipResize, Size
from fpn_det.data.tiles import Window
from fpn_det.image_io import BadImage
from fpn_det.schema import Count
from fpn_det.structures import Batch, Proposals, Targets

# As large as the batch needs; that, rounded up to multiples of BUCKET, for few distinct shapes; or (H, W) px.
Canvas = Literal["batch", "bucket"] | tuple[Count, Count]
BUCKET = 128  # px
ResizeOn = Literal["worker", "device"]


@dataclass(frozen=True)
class PackedBatch:
    """A batch as a worker sends it to the main process."""

    pixels: Tensor  # [B, H, W, C] of the examples' dtype; if flip and resize are left to the device, all decoded images flattened
    canvas: Size
    flip_resizes: list[FlipResize]
    decoded_shapes: list[tuple[int, ...]]  # [h, w, C] each, if flip and resize are left to the device; else empty
    original_sizes: list[Size]
    boxes: list[np.ndarray]
    labels: list[np.ndarray]
    indices: list[int]
    bad_images: list[BadImage]  # images that were replaced or left out
    proposals: list[np.ndarray]  # empty without precomputed proposals
    buffer: tuple[int, int] | None = None  # (worker, number) of the shared buffer that holds `pixels`
    windows: list[Window] = field(default_factory=list)  # of tiles; empty for whole images

    def unpack(self) -> Batch:
        """Return the batch with pixels as they were sent."""
        return Batch(
            pixels=self.pixels,
            sizes=torch.tensor([step.size for step in self.flip_resizes]),
            original_sizes=torch.tensor(self.original_sizes),
            targets=Targets.pad(
                [torch.from_numpy(each) for each in self.boxes], list(map(torch.from_numpy, self.labels))
            ),
            indices=torch.tensor(self.indices),
            proposals=Proposals.stack(list(map(torch.from_numpy, self.proposals))) if self.proposals else None,
            windows=torch.tensor(self.windows) if self.windows else None,
        )

    def finish(self, batch: Batch) -> Batch:
        """Turn the pixels of the unpacked batch into [B, C, H, W] on the device they are on.

        Channels stay last in memory, as files have them.
        """
        pixels = self._flip_and_resize(batch.pixels) if self.decoded_shapes else batch.pixels
        return replace(batch, pixels=pixels.permute(0, 3, 1, 2))  # [B, H, W, C] -> [B, C, H, W]

    def _flip_and_resize(self, values: Tensor) -> Tensor:
        """Return the canvas [B, H, W, C]. On a CPU it is bit-identical to that of a worker."""
        dtype = torch.float32 if self.flip_resizes[0].returns_float else values.dtype
        channels = self.decoded_shapes[0][2]
        canvas = torch.zeros(len(self.flip_resizes), *self.canvas, channels, dtype=dtype, device=values.device)
        images = values.split([math.prod(shape) for shape in self.decoded_shapes])
        for out, step, image, shape in zip(canvas, self.flip_resizes, images, self.decoded_shapes, strict=True):
            decoded, target = image.view(shape), out[: step.size[0], : step.size[1]]
            if values.device.type == "cpu":
                step.apply(decoded.numpy(), target.numpy())
            else:
                step.apply_on_device(decoded, target)
        return canvas


def _allocate(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.uint8)


@dataclass(frozen=True)
class Collator:
    """Makes batches of examples.

    Raises:
        ValueError: the stride does not divide the sides of a fixed canvas.
    """

    stride: int  # the sides of the canvas are multiples of it
    canvas: Canvas = "batch"
    resize_on: ResizeOn = "worker"  # or device: send decoded pixels

    def __post_init__(self) -> None:
        if isinstance(self.canvas, tuple) and (self.canvas[0] % self.stride or self.canvas[1] % self.stride):
            raise ValueError(
                f"data.canvas: expected sides that the model's stride {self.stride} divides, got {list(self.canvas)}."
            )

    def canvas_size(self, sizes: Sequence[Size]) -> Size:
        """Return the (H, W) of the canvas for images of these (h, w).

        Raises:
            ValueError: an image exceeds the fixed canvas.
        """
        height, width = max(size[0] for size in sizes), max(size[1] for size in sizes)
        if not isinstance(self.canvas, tuple):
            multiple = self.stride if self.canvas == "batch" else math.lcm(self.stride, BUCKET)
            return -(-height // multiple) * multiple, -(-width // multiple) * multiple
        if height > self.canvas[0] or width > self.canvas[1]:
            raise ValueError(
                f"data.canvas: expected images of at most {self.canvas[0]} x {self.canvas[1]} px (h x w), got {height} x {width}. "
                f"Enlarge the canvas or resize the images to a smaller size."
            )
        return self.canvas

    def pack(
        self,
        examples: Sequence[Example],
        bad_images: Sequence[BadImage] = (),
        allocate: Callable[..., Tensor] = _allocate,
    ) -> PackedBatch:
        """Write the pixels of the examples to one tensor: on a canvas padded with zeros, or flattened for the device.

        Args:
            examples: may be empty; the batch then only reports `bad_images`.
            bad_images: images that were left out.
            allocate: returns a u8 tensor of a given shape for the pixels.
        """
        if not examples:
            return PackedBatch(allocate(0), (0, 0), [], [], [], [], [], [], list(bad_images), [])
        steps = [example.flip_resize for example in examples]
        height, width = self.canvas_size([step.size for step in steps])
        dtype = getattr(torch, examples[0].pixels.dtype.name)
        if self.resize_on == "worker":
            dtype = torch.float32 if steps[0].returns_float else dtype
            channels = examples[0].pixels.shape[2]
            pixels = allocate(len(examples), height, width, channels * dtype.itemsize).view(dtype)
            for image, example, step in zip(pixels.numpy(), examples, steps, strict=True):
                h, w = step.size
                step.apply(example.pixels, image[:h, :w])
                image[:h, w:] = 0
                image[h:] = 0
        else:
            counts = [example.pixels.size for example in examples]
            pixels = allocate(sum(counts) * dtype.itemsize).view(dtype)
            for target, example in zip(pixels.split(counts), examples, strict=True):
                target.numpy().reshape(example.pixels.shape)[:] = example.pixels
        return PackedBatch(
            pixels,
            (height, width),
            steps,
            [example.pixels.shape for example in examples] if self.resize_on == "device" else [],
            [example.original_size for example in examples],
            [example.boxes for example in examples],
            [example.labels for example in examples],
            [example.index for example in examples],
            [*bad_images, *(bad for example in examples for bad in example.replaced)],
            [example.proposals for example in examples if example.proposals is not None],
        )

    def collate(self, examples: Sequence[Example], device: torch.device | str = "cpu") -> Batch:
        """Return the examples as a batch on `device`, without a worker."""
        packed = self.pack(examples)
        return packed.finish(packed.unpack().to(device))
