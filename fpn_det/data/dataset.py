"""One image after its transforms."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fpn_det.data.images import read_image
from fpn_det.data.transforms import Pipeline
from fpn_det.structures import Annotations

Key = tuple[int, int]  # (row of Annotations, epoch)


@dataclass(frozen=True)
class Example:
    """One image as the model gets it, before padding, and what is drawn on it; crowd regions are not."""

    pixels: np.ndarray  # u8 (or f32) [h, w, 3] RGB, input frame
    boxes: np.ndarray  # f32 [G, 4], input frame
    labels: np.ndarray  # i64 [G]
    original_size: tuple[int, int]  # (h, w) in the original frame
    index: int  # row of Annotations


class DetectionDataset:
    """Reads and transforms images. What comes out follows from (seed, epoch, index), wherever and whenever it is made."""

    def __init__(self, annotations: Annotations, transform: Pipeline, seed: int) -> None:
        self.annotations = annotations
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, key: Key) -> Example:
        """The image of row `key[0]` as epoch `key[1]` sees it.

        Raises:
            ValueError: it cannot be read, has not the size that the annotations give, a box or label of it is none, or a
                transform fails on it.
        """
        index, epoch = key
        path = self.annotations.path(index)
        pixels = read_image(path)
        height, width = self.annotations.sizes[index].tolist()
        if pixels.shape[:2] != (height, width):
            turned = " It is turned by its EXIF orientation, which the annotations left out." if pixels.shape[:2] == (width, height) else ""
            raise ValueError(
                f"{path}: expected {width} x {height} px as annotated, got {pixels.shape[1]} x {pixels.shape[0]}.{turned} "
                f"Correct the annotations or the file."
            )
        rows = self.annotations.rows(index)
        drawn = ~self.annotations.iscrowd[rows]
        boxes, labels = self.annotations.boxes[rows][drawn].numpy(), self.annotations.labels[rows][drawn].numpy()
        self._check(index, boxes, labels)
        try:
            pixels, boxes, labels = self.transform(pixels, boxes, labels, (self.seed, epoch, index))
        except Exception as error:  # whatever a transform raises, it has to say at which image
            image_id = self.annotations.image_ids[index].item()
            raise ValueError(f"{path} (image {image_id}): a transform failed: {type(error).__name__}: {error}") from error
        return Example(pixels, boxes, labels, (height, width), index)

    def _check(self, index: int, boxes: np.ndarray, labels: np.ndarray) -> None:
        """What would be an error without a place on the device, or none at all, is one with a place here."""
        wrong = ~np.isfinite(boxes).all(axis=1) | (labels < 0) | (labels >= self.annotations.num_classes)
        if wrong.any():
            row = int(wrong.argmax())
            rows = self.annotations.rows(index)
            annotation_id = self.annotations.annotation_ids[rows][~self.annotations.iscrowd[rows]][row].item()
            raise ValueError(
                f"{self.annotations.path(index)} (image {self.annotations.image_ids[index].item()}): annotation {annotation_id}: expected "
                f"a finite box and a label below {self.annotations.num_classes}, got {boxes[row].tolist()} and {labels[row]}."
            )
