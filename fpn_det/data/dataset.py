"""The data set: reads the image and objects of a row, and transforms them into an `Example`."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fpn_det.data.bad_images import load_or_replace
from fpn_det.data.flip_resize import FlipResize, Size
from fpn_det.data.mixing import Scene
from fpn_det.data.proposals import SavedProposals
from fpn_det.data.sampling import Key
from fpn_det.data.tiles import Tiles, TrainTiles, Window, clip_to_windows, is_shown
from fpn_det.data.transforms import Pipeline, ReadPixels
from fpn_det.image_io import BadImage, read_image, reduction_to
from fpn_det.structures import Annotations

MAX_IDS_IN_MESSAGE = 8


@dataclass(frozen=True)
class Example:
    """One transformed image and its objects, without crowd regions."""

    pixels: np.ndarray  # [h, w, C], u8 RGB or another format, or f32 after some transforms; before `flip_resize`
    flip_resize: FlipResize  # still to be applied to the pixels; the boxes are already moved
    boxes: np.ndarray  # f32 [G, 4] xyxy, input frame
    labels: np.ndarray  # i64 [G]
    original_size: Size  # (h, w) in the original frame, of the image or tile
    index: int  # row of Annotations
    replaced: tuple[BadImage, ...] = ()  # bad images in whose place this one is
    proposals: np.ndarray | None = None  # f32 [R, 4], input frame, best first, padded with rows of zeros
    window: Window | None = None  # of a tile


class DetectionDataset:
    """Reads and transforms images. An example is a pure function of the seed and its key.

    Args:
        annotations: images and their objects.
        transform: from the original frame to the input frame.
        seed: of the random transforms.
        reduced_decoding: decode JPEG files at 1/2, 1/4 or 1/8 of their size if the transforms only flip and shrink.
        replace_bad: replace bad images by others instead of raising BadImage, see `bad_images`.
        proposals: precomputed proposals, which become part of the examples.
        read: decodes the image file of a path at a reduction, as `image_io.read_image` does.
        tiles: of the images. Each is one more row. Its image is decoded in full, once for tiles in succession.
    """

    def __init__(
        self,
        annotations: Annotations,
        transform: Pipeline,
        seed: int,
        reduced_decoding: bool = False,
        replace_bad: bool = False,
        proposals: SavedProposals | None = None,
        read: Callable[[Path, int], np.ndarray] = read_image,
        tiles: Tiles | None = None,
    ) -> None:
        self.annotations = annotations
        self.transform = transform
        self.seed = seed
        self.reduced_decoding = reduced_decoding
        self.replace_bad = replace_bad
        self.proposals = proposals
        self.tiles = tiles
        self._read_file = read
        self._scene_rows: Sequence[int] = range(len(annotations))  # that `Mixing` transforms draw from
        if isinstance(tiles, TrainTiles) and transform.mixing:
            self._scene_rows = array(
                "q", [*self._scene_rows, *(len(annotations) + tiles.shows_objects.nonzero()[:, 0]).tolist()]
            )
        self._last: tuple[int, np.ndarray] | None = None  # the image that a tile was cut from last, and its row

    def __len__(self) -> int:
        return len(self.annotations) + (len(self.tiles) if self.tiles else 0)

    @property
    def sizes(self) -> Tensor:
        """(h, w) of each row in the original frame, i64 [N, 2]."""
        return torch.cat([self.annotations.sizes, self.tiles.sizes]) if self.tiles else self.annotations.sizes

    def __getitem__(self, key: Key) -> Example:
        """Load the image or tile of a row with the random transforms of an epoch and a step.

        Raises:
            BadImage: it cannot be read, or has not the annotated size.
            ValueError: a box or label is invalid, or a transform fails.
        """
        if not self.replace_bad:
            return self._load(key)
        example, bad = load_or_replace(self._load, key, len(self), self.seed)
        return replace(example, replaced=tuple(bad))

    def _load(self, key: Key) -> Example:
        row, epoch, step = key
        index, window = self._find(row, epoch)
        size, boxes, labels, read = self._view(index, window)
        try:
            pixels, boxes, labels, flip_resize = self.transform.prepare(
                size, boxes, labels, read, (self.seed, epoch, row), self._draw_scene, (self.seed, step)
            )
        except BadImage:
            raise
        except Exception as error:  # transforms may raise anything; add the file and image id
            place = f"{self.annotations.path(index)} ({self._describe(index)})"
            raise ValueError(f"{place}: a transform failed: {type(error).__name__}: {error}") from error
        proposals = None
        if self.proposals is not None:
            boxes, labels, proposals = self.proposals.split(boxes, labels)
        return Example(pixels, flip_resize, boxes, labels, size, index, proposals=proposals, window=window)

    def _find(self, row: int, epoch: int) -> tuple[int, Window | None]:
        """Return the image row of a row of the data set, and the window if it is a tile."""
        tile = row - len(self.annotations)
        if self.tiles is None or tile < 0:
            return row, None
        index = int(self.tiles.images[tile])
        if not isinstance(self.tiles, TrainTiles):
            return index, self.tiles.window(tile)
        height, width = self.annotations.sizes[index].tolist()
        return index, self.tiles.drawn_window(tile, (height, width), (self.seed, epoch, row))

    def _view(self, index: int, window: Window | None) -> tuple[Size, np.ndarray, np.ndarray, ReadPixels]:
        """Return the (h, w), boxes and labels of an image or of a window of it, and what reads its pixels."""
        size, boxes, labels = self._objects(index)
        if window is None:
            return size, boxes, labels, partial(self._read, index, size)
        boxes, visible = clip_to_windows(boxes, np.array(window))
        shown = is_shown(visible, self.tiles.min_visible if isinstance(self.tiles, TrainTiles) else 0.0)
        left, top, right, bottom = window
        read = partial(self._read_window, index, size, window)
        return (bottom - top, right - left), boxes[shown], labels[shown], read

    def _objects(self, index: int) -> tuple[Size, np.ndarray, np.ndarray]:
        """Return the (h, w), boxes and labels of a row in the original frame, followed by its proposals if there are any."""
        height, width = self.annotations.sizes[index].tolist()
        rows = self.annotations.rows(index)
        objects = ~self.annotations.iscrowd[rows].numpy()
        boxes, labels = self.annotations.boxes[rows].numpy()[objects], self.annotations.labels[rows].numpy()[objects]
        self._validate(index, boxes, labels)
        if self.proposals is not None:
            boxes, labels = self.proposals.append(index, boxes, labels)
        return (height, width), boxes, labels

    def _draw_scene(self, random_state: random.Random) -> Scene:
        """Draw another image, or a tile with objects, for a `Mixing` transform."""
        row = self._scene_rows[random_state.randrange(len(self._scene_rows))]
        index, window = self._find(row, epoch=random_state.getrandbits(32) if self.tiles else 0)
        _, boxes, labels, read = self._view(index, window)
        return Scene(read(None), boxes, labels, np.ones(len(boxes)))

    def _read(self, index: int, size: Size, least: Size | None) -> np.ndarray:
        """Decode the pixels [h, w, C] of a row, in full (None) or reduced to at least (h, w)."""
        path = self.annotations.path(index)
        reduction = reduction_to(size, least) if self.reduced_decoding and least else 1
        try:
            pixels = self._read_file(path, reduction)
        except BadImage as error:
            raise BadImage(path, f"{error} It is {self._describe(index)}.") from None
        found = pixels.shape[:2]
        if found != size and found != (size[0] // reduction, size[1] // reduction):
            is_rotated = found == size[::-1]
            rotated = " The annotations ignore its EXIF orientation." if is_rotated else ""
            raise BadImage(
                path,
                f"{path}: expected {size[1]} x {size[0]} px as annotated, got {found[1]} x {found[0]}.{rotated} "
                f"Correct the annotations or the file. It is {self._describe(index)}.",
            )
        return pixels

    def _read_window(self, index: int, size: Size, window: Window, least: Size | None) -> np.ndarray:
        """Return the pixels [h, w, C] of a window. The image stays in memory until another one is asked for."""
        if self._last is None or self._last[0] != index:
            self._last = index, self._read(index, size, None)
        left, top, right, bottom = window
        return self._last[1][top:bottom, left:right].copy()  # transforms may write to it

    def _validate(self, index: int, boxes: np.ndarray, labels: np.ndarray) -> None:
        """Raise ValueError for a box or label that would cause an error without a location on the device."""
        invalid = ~np.isfinite(boxes).all(axis=1) | (labels < 0) | (labels >= self.annotations.num_classes)
        if invalid.any():
            row = int(invalid.argmax())
            rows = self.annotations.rows(index)
            annotation_id = self.annotations.annotation_ids[rows][~self.annotations.iscrowd[rows]][row].item()
            raise ValueError(
                f"{self.annotations.path(index)} (image {self.annotations.image_ids[index].item()}): annotation {annotation_id}: expected "
                f"a finite box and a label below {self.annotations.num_classes}, got {boxes[row].tolist()} and {labels[row]}."
            )

    def _describe(self, index: int) -> str:
        """Return the image id and annotation ids of a row, for messages."""
        ids = self.annotations.annotation_ids[self.annotations.rows(index)].tolist()
        more = ", ..." if len(ids) > MAX_IDS_IN_MESSAGE else ""
        shown = f", annotations {', '.join(map(str, ids[:MAX_IDS_IN_MESSAGE]))}{more}" if ids else ""
        return f"image {self.annotations.image_ids[index].item()}{shown}"
