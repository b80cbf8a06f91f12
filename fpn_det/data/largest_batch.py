"""An estimate of the batch that needs the most memory, to try it before training starts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np
import torch

from fpn_det.data.collation import Collator
from fpn_det.data.dataset import DetectionDataset, Example
from fpn_det.data.sampling import Key
from fpn_det.image_io import BadImage
from fpn_det.structures import Batch, Proposals, Targets

IMAGES_PER_MEASURE = 4
EPOCHS = 6  # random transforms tried per image, each as in a step of its own


def largest_batch(dataset: DetectionDataset, num_images: int, collator: Collator) -> Batch:
    """Make a batch of black images on the largest canvas, each with the objects of the image that has the most.

    Canvas and objects are those of the largest, widest and tallest images and tiles, and of the images with the most
    objects. Saved proposals are those of the image with the most objects.

    Args:
        num_images: in the batch.

    Raises:
        ValueError: none of these images can be read.
    """
    examples = list(_extreme_examples(dataset))
    if not examples:
        raise ValueError(
            "training set: expected an image that can be read, got none among the largest. Run fpn-det check-data."
        )
    height, width = collator.canvas_size([example.flip_resize.size for example in examples])
    most_objects = max(examples, key=lambda example: len(example.boxes))
    dtype = np.float32 if most_objects.flip_resize.returns_float else most_objects.pixels.dtype
    channels = most_objects.pixels.shape[2]
    pixels = torch.from_numpy(np.zeros((num_images, height, width, channels), dtype)).permute(0, 3, 1, 2)
    boxes, labels = torch.from_numpy(most_objects.boxes), torch.from_numpy(most_objects.labels)
    sizes = torch.tensor([[height, width]] * num_images)
    targets = Targets.pad([boxes] * num_images, [labels] * num_images)
    saved = most_objects.proposals
    proposals = None if saved is None else Proposals.stack([torch.from_numpy(saved)] * num_images)
    return Batch(pixels, sizes, sizes, targets, torch.full((num_images,), most_objects.index), proposals)


def _extreme_examples(dataset: DetectionDataset) -> Iterator[Example]:
    """Yield the examples of the most extreme images and tiles in several epochs."""
    heights, widths = dataset.sizes.double().unbind(1)
    measures = (heights * widths, widths / heights, heights / widths, dataset.annotations.boxes_per_image.double())
    extremes = [measure.topk(min(IMAGES_PER_MEASURE, len(measure))).indices for measure in measures]
    steps = count()
    for row in torch.cat(extremes).unique().tolist():
        for epoch in range(EPOCHS):
            try:
                yield dataset[Key(row, epoch, next(steps))]
            except BadImage:  # decided when the image is loaded for training
                break
