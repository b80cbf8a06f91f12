"""One image after its transforms."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from functools import partial

import numpy as np

from fpn_det.data.image_cache import PictureCache
from fpn_det.data.proposals import SavedProposals
from fpn_det.data.resizing import Plan, Size
from fpn_det.data.transforms import Original, Pipeline
from fpn_det.image_io import BadImage, read_image, reduction_to
from fpn_det.structures import Annotations

Key = tuple[int, int]  # (row of Annotations, epoch); see GlobalBatches.showings

SHOWN_IDS = 8  # of annotations in a message
MOST_IN_A_ROW = 10  # images that one image is replaced by, one after another


@dataclass(frozen=True)
class Example:
    """One image on its way to the model, and what is drawn on it; crowd regions are not."""

    pixels: np.ndarray  # u8 (or f32) [h, w, 3] RGB, to which `plan` is still to be done
    plan: Plan
    boxes: np.ndarray  # f32 [G, 4], input frame
    labels: np.ndarray  # i64 [G]
    original_size: Size  # in the original frame
    index: int  # row of Annotations
    replaced: tuple[BadImage, ...] = ()  # images that were to be here and cannot be used
    proposals: np.ndarray | None = None  # f32 [R, 4], input frame, best first; rows of zeros where there are no more


class DetectionDataset:
    """Reads and transforms images. What comes out follows from (seed, epoch, index), wherever and whenever it is made.

    Args:
        reduce: decode JPEG files at a fraction of their size where the transforms are only a flip and a resize to less.
        replace: let another image, drawn by (seed, epoch, index) too, take the place of one that cannot be used.
        proposals: of these images, to go with them.
        cache: keeps decoded pictures.
    """

    def __init__(
        self,
        annotations: Annotations,
        transform: Pipeline,
        seed: int,
        reduce: bool = False,
        replace: bool = False,
        proposals: SavedProposals | None = None,
        cache: PictureCache | None = None,
    ) -> None:
        self.annotations = annotations
        self.transform = transform
        self.seed = seed
        self.reduce = reduce
        self.replace = replace
        self.proposals = proposals
        self.cache = cache

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, key: Key) -> Example:
        """The image of row `key[0]` as epoch `key[1]` sees it.

        Raises:
            BadImage: it cannot be read, or has not the size that the annotations give.
            ValueError: a box or label of it is none, or a transform fails on it.
        """
        index, epoch = key
        if not self.replace:
            return self._example(index, epoch)
        bad: list[BadImage] = []
        while True:
            try:
                return dataclasses.replace(self._example(index, epoch), replaced=tuple(bad))
            except BadImage as error:
                bad.append(error)
                if len(bad) > MOST_IN_A_ROW:
                    raise ValueError(
                        f"{error} It is the last of {len(bad)} images, drawn at random, none of which can be used."
                    ) from None
                index = int(np.random.default_rng((self.seed, epoch, key[0], len(bad))).integers(len(self)))

    def _example(self, index: int, epoch: int) -> Example:
        original = self.original(index)
        try:
            prepared = self.transform.prepare(original, (self.seed, epoch, index))
        except BadImage:
            raise
        except Exception as error:  # whatever a transform raises, it has to say at which image
            place = f"{self.annotations.path(index)} ({self._describe(index)})"
            raise ValueError(f"{place}: a transform failed: {type(error).__name__}: {error}") from error
        boxes, labels, proposals = prepared.boxes, prepared.labels, None
        if self.proposals is not None:
            boxes, labels, proposals = self.proposals.part(boxes, labels)
        return Example(prepared.pixels, prepared.plan, boxes, labels, original.size, index, proposals=proposals)

    def original(self, index: int) -> Original:
        """The image of a row, not read yet, with all that is drawn on it but crowd regions, and its proposals, if there are some."""
        height, width = self.annotations.sizes[index].tolist()
        rows = self.annotations.rows(index)
        drawn = ~self.annotations.iscrowd[rows].numpy()
        boxes, labels = self.annotations.boxes[rows].numpy()[drawn], self.annotations.labels[rows].numpy()[drawn]
        self._check(index, boxes, labels)
        if self.proposals is not None:
            boxes, labels = self.proposals.join(index, boxes, labels)
        return Original((height, width), boxes, labels, partial(self._read, index, (height, width)), self._other)

    def _other(self, draw: random.Random) -> Original:
        return self.original(draw.randrange(len(self)))

    def _read(self, index: int, size: Size, least: Size | None) -> np.ndarray:
        path = self.annotations.path(index)
        reduction = reduction_to(size, least) if self.reduce and least else 1
        try:
            pixels = read_image(path, reduction) if self.cache is None else self.cache.read(path, reduction)
        except BadImage as error:
            raise BadImage(path, f"{error} It is {self._describe(index)}.") from None
        found = pixels.shape[:2]
        if found != size and found != (size[0] // reduction, size[1] // reduction):
            turned = (
                " It is turned by its EXIF orientation, which the annotations left out." if found == size[::-1] else ""
            )
            raise BadImage(
                path,
                f"{path}: expected {size[1]} x {size[0]} px as annotated, got {found[1]} x {found[0]}.{turned} "
                f"Correct the annotations or the file. It is {self._describe(index)}.",
            )
        return pixels

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

    def _describe(self, index: int) -> str:
        """Image and annotations of a row, for messages."""
        ids = self.annotations.annotation_ids[self.annotations.rows(index)].tolist()
        more = ", ..." if len(ids) > SHOWN_IDS else ""
        drawn = f", annotations {', '.join(map(str, ids[:SHOWN_IDS]))}{more}" if ids else ""
        return f"image {self.annotations.image_ids[index].item()}{drawn}"
