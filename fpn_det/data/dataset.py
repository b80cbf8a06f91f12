"""One image after its transforms, and many of them as a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fpn_det.data.images import read_image
from fpn_det.data.transforms import Pipeline
from fpn_det.structures import Annotations, Batch, Targets

Canvas = Literal["batch"] | tuple[int, int]  # as large as the batch needs, or (H, W) px
Key = tuple[int, int]  # (row of Annotations, epoch)


@dataclass(frozen=True)
class Example:
    """One image as the model gets it, before padding, and what is drawn on it; crowd regions are not."""

    pixels: np.ndarray  # u8 [h, w, 3] RGB, input frame
    boxes: np.ndarray  # f32 [G, 4], input frame
    labels: np.ndarray  # i64 [G]
    original_size: tuple[int, int]  # (h, w) in the original frame
    index: int  # row of Annotations


class DetectionDataset:
    """Reads and transforms images. What comes out depends on (seed, epoch, index) only, wherever and whenever it is made."""

    def __init__(self, annotations: Annotations, transform: Pipeline, seed: int) -> None:
        self.annotations = annotations
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, key: Key) -> Example:
        """The image of row `key[0]` as epoch `key[1]` sees it.

        Raises:
            ValueError: it cannot be read, has not the size that the annotations give, or a transform fails on it.
        """
        index, epoch = key
        path = self.annotations.path(index)
        pixels = read_image(path)
        height, width = self.annotations.sizes[index].tolist()
        if pixels.shape[:2] != (height, width):
            found = f"{pixels.shape[1]} x {pixels.shape[0]}"
            turned = " The picture is turned: its boxes were drawn without its EXIF orientation." if pixels.shape[:2] == (width, height) else ""
            raise ValueError(f"{path}: expected {width} x {height} px as annotated, got {found}.{turned} Correct the annotations or the file.")
        rows = self.annotations.rows(index)
        drawn = ~self.annotations.iscrowd[rows]
        boxes, labels = self.annotations.boxes[rows][drawn].numpy(), self.annotations.labels[rows][drawn].numpy()
        try:
            pixels, boxes, labels = self.transform(pixels, boxes, labels, (self.seed, epoch, index))
        except Exception as error:  # whatever a transform raises, it has to say at which image
            image_id = self.annotations.image_ids[index].item()
            raise ValueError(f"{path} (image {image_id}): a transform failed: {type(error).__name__}: {error}") from error
        return Example(pixels, boxes, labels, (height, width), index)


def canvas_size(sizes: Tensor, stride: int, canvas: Canvas) -> tuple[int, int]:
    """The (H, W) on which images of `sizes` [B, 2] are laid: the canvas given, or the least that the stride divides.

    Raises:
        ValueError: an image is larger than the canvas given.
    """
    height, width = sizes.amax(dim=0).tolist()
    if canvas == "batch":
        return -(-height // stride) * stride, -(-width // stride) * stride
    if height > canvas[0] or width > canvas[1]:
        raise ValueError(
            f"data.canvas: expected images of at most {canvas[0]} x {canvas[1]} px (h x w), got {height} x {width}. "
            f"Enlarge the canvas, or resize to less."
        )
    return canvas


def collate(examples: list[Example], stride: int, canvas: Canvas) -> Batch:
    """Lay the images on one canvas, padded with zeros right and bottom.

    Pixels stay as the files have them, channels last in memory: [B, 3, H, W] is a view.
    """
    sizes = torch.tensor([example.pixels.shape[:2] for example in examples])
    buffer = torch.empty(len(examples), *canvas_size(sizes, stride, canvas), 3, dtype=torch.uint8)
    for image, example in zip(buffer.numpy(), examples, strict=True):
        height, width = example.pixels.shape[:2]
        image[:height, :width] = example.pixels
        image[:height, width:] = 0
        image[height:] = 0
    return Batch(
        pixels=buffer.permute(0, 3, 1, 2),  # [B, H, W, 3] -> [B, 3, H, W]
        sizes=sizes,
        original_sizes=torch.tensor([example.original_size for example in examples]),
        targets=Targets.pad(
            [torch.from_numpy(example.boxes) for example in examples],
            [torch.from_numpy(example.labels) for example in examples],
        ),
        indices=torch.tensor([example.index for example in examples]),
    )
