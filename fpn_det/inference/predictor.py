"""Detection on single images, with the preprocessing of evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fpn_det.data.collation import Collator
from fpn_det.data.dataset import Example
from fpn_det.data.flip_resize import Size
from fpn_det.data.sampling import evaluation_batches
from fpn_det.data.transforms import Pipeline
from fpn_det.image_io import MAX_PIXELS, array_to_rgb, image_size, image_to_rgb, read_image, reduction_to
from fpn_det.models.detector import Detector
from fpn_det.models.views import Views
from fpn_det.runtime import Ranks
from fpn_det.structures import Batch

ImageInput = str | Path | Image.Image | np.ndarray


@dataclass(frozen=True)
class Prediction:
    """The detections of one image, best first; on the CPU."""

    boxes: Tensor  # f32 [D, 4] xyxy, original frame
    scores: Tensor  # f32 [D] in [0, 1]
    labels: Tensor  # i64 [D] in [0, K)
    names: tuple[str, ...]  # of the labels


class Predictor:
    """A trained detector with the preprocessing of its evaluation.

    Args:
        model: on `device`; switched to evaluation mode.
        class_names: of its labels.
        transform: from the original frame to the input frame.
        batch_size: images per batch; images of similar aspect ratio are batched together.
        collator: makes the batches.
        device: of the model.
        dtype: of autocast; None disables it.
        tta: test-time augmentation; None uses the image as it is.
        reduced_decoding: decode JPEG files at 1/2, 1/4 or 1/8 of their size if that is large enough.
        max_pixels: largest width * height of an image file.
    """

    def __init__(
        self,
        model: Detector,
        class_names: Sequence[str],
        transform: Pipeline,
        batch_size: int,
        collator: Collator,
        device: torch.device,
        dtype: torch.dtype | None = None,
        tta: Views | None = None,
        reduced_decoding: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.model = model.eval()
        self.class_names = tuple(class_names)
        self.transform = transform
        self.batch_size = batch_size
        self.collator = collator
        self.device = device
        self.dtype = dtype
        self.tta = tta
        self.reduced_decoding = reduced_decoding
        self.max_pixels = max_pixels

    def predict(self, images: Sequence[ImageInput]) -> list[Prediction]:
        """Detect objects in images.

        Args:
            images: paths, PIL images, or uint8 or uint16 arrays [h, w, 3] RGB or [h, w] grey.

        Returns:
            A prediction for each image, in their order.

        Raises:
            ValueError: an image is of another type, or cannot be read.
        """
        if not isinstance(images, list | tuple):
            raise ValueError(
                f"predict: expected a list of images, got a {type(images).__name__}. Put a single image in a list."
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

    def batch_of(self, images: Sequence[ImageInput]) -> Batch:
        """Preprocess images to a batch without objects."""
        examples = [self._example(image, index) for index, image in enumerate(images)]
        return self.collator.collate(examples, self.device)

    def _example(self, image: ImageInput, index: int) -> Example:
        size = _size(image)

        def read(least: Size | None) -> np.ndarray:
            reduction = reduction_to(size, least) if self.reduced_decoding and least else 1
            return _pixels(image, reduction, self.max_pixels)

        no_boxes, no_labels = np.zeros((0, 4)), np.zeros(0, np.int64)
        pixels, boxes, labels, flip_resize = self.transform.prepare(size, no_boxes, no_labels, read, (0, 0, index))
        return Example(pixels, flip_resize, boxes, labels, size, index)


def _size(image: ImageInput) -> Size:
    """Return the (h, w) of the upright image; of a file, from its header."""
    if isinstance(image, str | Path):
        return image_size(Path(image)) or (1, 1)  # reading the pixels raises the error
    return _pixels(image).shape[:2]


def _pixels(image: ImageInput, reduction: int = 1, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return an image as u8 [h, w, 3] RGB."""
    if isinstance(image, str | Path):
        return read_image(Path(image), reduction, max_pixels)
    if isinstance(image, Image.Image):
        return image_to_rgb(image)
    pixels = array_to_rgb(image) if isinstance(image, np.ndarray) else None
    if pixels is None:
        found = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else f"a {type(image).__name__}"
        raise ValueError(
            f"predict: expected paths, PIL images, or uint8 or uint16 arrays [h, w, 3] RGB or [h, w] grey, got {found}."
        )
    return pixels
