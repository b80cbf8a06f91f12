"""The batch that asks for the most memory, as far as a look at some images tells."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from fpn_det.data.collation import Canvas, canvas_size
from fpn_det.data.dataset import DetectionDataset, Example
from fpn_det.image_io import BadImage
from fpn_det.structures import Batch, Targets

EXTREMES = 4  # images looked at for each way of being extreme
EPOCHS = 6  # in which they are looked at: transforms draw


def largest_batch(dataset: DetectionDataset, num_images: int, stride: int, canvas: Canvas) -> Batch:
    """Black images on the largest canvas that a batch could have, each with the objects of the image that has the most."""
    examples = list(_extremes(dataset))
    if not examples:
        raise ValueError(
            "training set: expected an image that can be read, got none among the largest. Run tools/check_data.py."
        )
    height, width = canvas_size([example.plan.size for example in examples], stride, canvas)
    busiest = max(examples, key=lambda example: len(example.boxes))
    kind = np.float32 if busiest.plan.gives_float else busiest.pixels.dtype
    pixels = torch.from_numpy(np.zeros((num_images, height, width, 3), kind)).permute(0, 3, 1, 2)
    boxes, labels = torch.from_numpy(busiest.boxes), torch.from_numpy(busiest.labels)
    sizes = torch.tensor([[height, width]] * num_images)
    targets = Targets.pad([boxes] * num_images, [labels] * num_images)
    return Batch(pixels, sizes, sizes, targets, torch.full((num_images,), busiest.index))


def _extremes(dataset: DetectionDataset) -> Iterator[Example]:
    """The largest, widest, tallest and busiest images, as several epochs see them."""
    heights, widths = dataset.annotations.sizes.double().unbind(1)
    measures = (heights * widths, widths / heights, heights / widths, dataset.annotations.boxes_per_image.double())
    rows = torch.cat([measure.topk(min(EXTREMES, len(dataset))).indices for measure in measures]).unique()
    for row in rows.tolist():
        for epoch in range(EPOCHS):
            try:
                yield dataset[(row, epoch)]
            except BadImage:  # whether that is an error is decided when its turn comes
                break
