"""Detect on pictures that nobody has annotated, through the same preprocessing as evaluation: one pipeline, one collation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fpn_det.data.collation import Canvas, Collator, ResizeOn
from fpn_det.data.dataset import Example
from fpn_det.data.flip_resize import Size
from fpn_det.data.sampling import evaluation_batches
from fpn_det.data.transforms import Pipeline
from fpn_det.image_io import image_size, read_image, reduction_to
from fpn_det.models.detector import Detector
from fpn_det.models.views import Views
from fpn_det.runtime import Ranks
from fpn_det.structures import Batch

Picture = str | Path | Image.Image | np.ndarray


@dataclass(frozen=True)
class Prediction:
    """What was found on one picture, best first; on the CPU."""

    boxes: Tensor  # f32 [D, 4] xyxy, original frame
    scores: Tensor  # f32 [D] in [0, 1]
    labels: Tensor  # i64 [D] in [0, K)
    names: tuple[str, ...]  # of the labels


class Predictor:
    """A trained detector and all that turns pictures into its input.

    Args:
        model: on `device`; goes to evaluation mode.
        class_names: of its labels.
        transform: from the original frame to the input frame.
        batch_size: pictures at a time; those of like shape go together.
        canvas: `batch` or a fixed (H, W).
        dtype: that of autocast; None computes as the model is.
        tta: test-time augmentation; None looks once.
        resize_on: whether pictures are resized on the host or on the device.
        reduce: decode JPEG files at a fraction of their size where that is enough.
    """

    def __init__(
        self,
        model: Detector,
        class_names: Sequence[str],
        transform: Pipeline,
        batch_size: int,
        canvas: Canvas,
        device: torch.device,
        dtype: torch.dtype | None = None,
        tta: Views | None = None,
        resize_on: ResizeOn = "worker",
        reduce: bool = False,
    ) -> None:
        self.model = model.eval()
        self.class_names = tuple(class_names)
        self.transform = transform
        self.batch_size = batch_size
        self.canvas = canvas
        self.device = device
        self.dtype = dtype
        self.tta = tta
        self.resize_on: ResizeOn = resize_on
        self.reduce = reduce

    def predict(self, images: Sequence[Picture]) -> list[Prediction]:
        """Detect on each picture: a path, a PIL image, or u8 RGB [h, w, 3].

        Raises:
            ValueError: a picture is none of these, or cannot be read.
        """
        if not isinstance(images, list | tuple):
            raise ValueError(
                f"predict: expected a list of pictures, got a {type(images).__name__}. Put a single one in a list."
            )
        sizes = torch.tensor([_size(image) for image in images]).view(-1, 2)
        predictions: dict[int, Prediction] = {}
        for indices in evaluation_batches(sizes, self.batch_size, Ranks()):
            batch = self.batch_of([images[index] for index in indices.tolist()])
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                detections = self.model.detect(batch, self.tta)
            for index, (boxes, scores, labels) in zip(
                indices.tolist(), detections.to_original(batch).cpu().images(), strict=True
            ):
                names = tuple(self.class_names[label] for label in labels.tolist())
                predictions[index] = Prediction(boxes, scores, labels, names)
        return [predictions[index] for index in range(len(images))]

    def batch_of(self, images: Sequence[Picture]) -> Batch:
        """Pictures as the model gets them, without objects."""
        examples = [self._example(image, index) for index, image in enumerate(images)]
        return Collator(self.model.stride, self.canvas, self.resize_on).collate(examples, self.device)

    def _example(self, image: Picture, index: int) -> Example:
        size = _size(image)

        def read(least: Size | None) -> np.ndarray:
            return _pixels(image, reduction_to(size, least) if self.reduce and least else 1)

        no_boxes, no_labels = np.zeros((0, 4)), np.zeros(0, np.int64)
        pixels, boxes, labels, flip_resize = self.transform.prepare(size, no_boxes, no_labels, read, (0, 0, index))
        return Example(pixels, flip_resize, boxes, labels, size, index)


def _size(image: Picture) -> tuple[int, int]:
    """(h, w), without reading more of a file than it takes."""
    if isinstance(image, str | Path):
        return image_size(Path(image)) or (1, 1)  # what is wrong with it, reading it will tell
    return _pixels(image).shape[:2]


def _pixels(image: Picture, reduction: int = 1) -> np.ndarray:
    """U8 RGB [h, w, 3]; of a file, perhaps reduced."""
    if isinstance(image, str | Path):
        return read_image(Path(image), reduction)
    if isinstance(image, Image.Image):
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return image
    found = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else f"a {type(image).__name__}"
    raise ValueError(f"predict: expected paths, PIL images or uint8 RGB arrays [h, w, 3], got {found}.")
