"""Many images as one batch, and how it travels from a worker to the main process.

A batch is packed in a worker and unpacked where it is used. Either the worker lays the images on their canvas, or it
sends them as they are and the device does. Pixels travel in a few buffers that the worker shares with the main process
and uses in turn: fresh shared memory for each batch, which is what torch's loader does, takes longer than decoding the
images, because the system has to provide and clear every page. The rest is small and pickled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fpn_det.data.dataset import Example
from fpn_det.data.resizing import Plan, Size
from fpn_det.image_io import BadImage
from fpn_det.structures import Batch, Proposals, Targets

Canvas = Literal["batch"] | tuple[int, int]  # as large as the batch needs, or (H, W) px
ResizeOn = Literal["worker", "device"]


@dataclass(frozen=True)
class Parcel:
    """A batch before it is put together. `slot` names the shared buffer of its pixels, if they lie in one."""

    pixels: Tensor  # u8 or f32 [B, H, W, 3]; with plans still to be done, all images one after another [values]
    canvas: Size
    plans: list[Plan]
    given_sizes: list[Size]  # of the images that plans are still to be done to; else empty
    original_sizes: list[Size]
    boxes: list[np.ndarray]
    labels: list[np.ndarray]
    indices: list[int]
    bad: list[BadImage]  # images that were to be here and cannot be used
    proposals: list[np.ndarray]  # empty if there are none
    slot: tuple[int, int] | None = None  # (worker, number)

    def unpack(self) -> Batch:
        """The batch, with its pixels as they travel."""
        return Batch(
            pixels=self.pixels,
            sizes=torch.tensor([plan.size for plan in self.plans]),
            original_sizes=torch.tensor(self.original_sizes),
            targets=Targets.pad(list(map(torch.from_numpy, self.boxes)), list(map(torch.from_numpy, self.labels))),
            indices=torch.tensor(self.indices),
            proposals=Proposals.stack(list(map(torch.from_numpy, self.proposals))) if self.proposals else None,
        )

    def finish(self, batch: Batch) -> Batch:
        """The unpacked batch with pixels [B, 3, H, W], on the device that it is on: channels stay last in memory, as files have them."""
        pixels = self._lay(batch.pixels) if self.given_sizes else batch.pixels
        return replace(batch, pixels=pixels.permute(0, 3, 1, 2))  # [B, H, W, 3] -> [B, 3, H, W]

    def _lay(self, values: Tensor) -> Tensor:
        """The canvas [B, H, W, 3]. On a CPU this is what a worker would have done, to the bit."""
        on_cpu = values.device.type == "cpu"
        kind = torch.float32 if self.plans[0].gives_float else values.dtype
        canvas = torch.zeros(len(self.plans), *self.canvas, 3, dtype=kind, device=values.device)
        images = values.split([3 * height * width for height, width in self.given_sizes])
        for out, plan, image, size in zip(canvas, self.plans, images, self.given_sizes, strict=True):
            given, place = image.view(*size, 3), out[: plan.size[0], : plan.size[1]]
            if on_cpu:
                plan.lay(given.numpy(), place.numpy())
            else:
                plan.lay_on_device(given, place)
        return canvas


def _private_memory(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.uint8)


def check_canvas(canvas: Canvas, stride: int) -> None:
    """Refuse a fixed canvas whose sides the model's stride does not divide."""
    if canvas != "batch" and (canvas[0] % stride or canvas[1] % stride):
        raise ValueError(f"data.canvas: expected sides that the model's stride {stride} divides, got {list(canvas)}.")


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
    examples: Sequence[Example],
    stride: int,
    canvas: Canvas,
    resize_on: ResizeOn = "worker",
    bad: Sequence[BadImage] = (),
    memory: Callable[..., Tensor] = _private_memory,
) -> Parcel:
    """Lay the images on one canvas, padded with zeros right and bottom, or one after another for the device to do so.

    The pixels are put in bytes from `memory(*shape)`. A batch without images tells of the `bad` ones only.
    """
    if not examples:
        return Parcel(memory(0), (0, 0), [], [], [], [], [], [], list(bad), [])
    plans = [example.plan for example in examples]
    height, width = canvas_size([plan.size for plan in plans], stride, canvas)
    kind = getattr(torch, examples[0].pixels.dtype.name)
    if resize_on == "worker":
        kind = torch.float32 if plans[0].gives_float else kind
        pixels = memory(len(examples), height, width, 3 * kind.itemsize).view(kind)
        for image, example, plan in zip(pixels.numpy(), examples, plans, strict=True):
            h, w = plan.size
            plan.lay(example.pixels, image[:h, :w])
            image[:h, w:] = 0
            image[h:] = 0
    else:
        counts = [example.pixels.size for example in examples]
        pixels = memory(sum(counts) * kind.itemsize).view(kind)
        for place, example in zip(pixels.split(counts), examples, strict=True):
            place.numpy().reshape(example.pixels.shape)[:] = example.pixels
    return Parcel(
        pixels,
        (height, width),
        plans,
        [example.pixels.shape[:2] for example in examples] if resize_on == "device" else [],
        [example.original_size for example in examples],
        [example.boxes for example in examples],
        [example.labels for example in examples],
        [example.index for example in examples],
        [*bad, *(row for example in examples for row in example.replaced)],
        [example.proposals for example in examples if example.proposals is not None],
    )


def collate(
    examples: Sequence[Example],
    stride: int,
    canvas: Canvas,
    resize_on: ResizeOn = "worker",
    device: torch.device | str = "cpu",
) -> Batch:
    """The images as a batch, here and now."""
    parcel = pack(examples, stride, canvas, resize_on)
    return parcel.finish(parcel.unpack().to(device))
