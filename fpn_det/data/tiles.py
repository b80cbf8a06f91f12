"""Tiles: overlapping square windows that cover an image, for objects that are small in a large image.

A data set with tiles has one row for each image, in the order of `Annotations`, and after them one row for each tile. An
image that is not larger than a tile has none. Evaluation detects on all rows. An epoch of training shows all images, the
tiles with objects, and some of those without.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fpn_det.schema import Count, Part
from fpn_det.structures import Annotations, offsets_of

PAIRS = 1 << 20  # of a tile and an object, examined at a time
Window = tuple[int, int, int, int]  # xyxy px, original frame


@dataclass(frozen=True)
class Tiling:
    """The side of the tiles, and how far they overlap.

    An object no larger than about 0.8 of the overlap is seen whole, and not at an edge, by at least one tile.
    """

    size: Count  # side of a tile, px of the image
    overlap: Part = 0.2  # of two neighbours, at least; fraction of the side

    def starts(self, length: int) -> list[int]:
        """Return where tiles start along an axis of `length` px: evenly spaced, the first at 0, the last one ends at the end."""
        room = max(length - self.size, 0)
        stride = max(int(self.size * (1 - self.overlap)), 1)
        steps = -(-room // stride)
        return [room * step // max(steps, 1) for step in range(steps + 1)]

    def windows(self, height: int, width: int) -> list[Window]:
        """Return the tiles of an image, row by row; none if a single one would be the whole image."""
        windows = [
            (left, top, min(left + self.size, width), min(top + self.size, height))
            for top in self.starts(height)
            for left in self.starts(width)
        ]
        return windows if len(windows) > 1 else []


@dataclass(frozen=True)
class Tiles:
    """The tiles of all images of a data set. Those of image row i are `offsets[i]:offsets[i + 1]`."""

    images: Tensor  # i64 [T], image row of each tile
    windows: Tensor  # i64 [T, 4], xyxy, original frame
    offsets: Tensor  # i64 [I + 1]

    @classmethod
    def of(cls, sizes: Tensor, tiling: Tiling) -> Tiles:
        """Make the tiles of images of `sizes` i64 [I, 2] (h, w), in shared memory."""
        distinct, which = np.unique(sizes.numpy(), axis=0, return_inverse=True)
        windows = [np.array(tiling.windows(*size), np.int64).reshape(-1, 4) for size in distinct.tolist()]
        parts = [windows[index] for index in which.reshape(-1)]
        offsets = offsets_of([len(part) for part in parts])
        images = torch.repeat_interleave(torch.arange(len(sizes)), offsets.diff())
        stacked = torch.from_numpy(np.concatenate([np.zeros((0, 4), np.int64), *parts]))
        return Tiles(images.share_memory_(), stacked.share_memory_(), offsets.share_memory_())

    def __len__(self) -> int:
        return len(self.images)

    @property
    def sizes(self) -> Tensor:
        """(h, w) of each tile, i64 [T, 2]."""
        return (self.windows[:, 2:] - self.windows[:, :2]).flip(1)

    def rows_of(self, index: int) -> range:
        """Return the rows of the data set that are tiles of image row `index`."""
        num_images = len(self.offsets) - 1
        start, stop = self.offsets[index : index + 2].tolist()
        return range(num_images + start, num_images + stop)

    def window(self, tile: int) -> Window:
        """Return the window of a tile."""
        left, top, right, bottom = self.windows[tile].tolist()
        return left, top, right, bottom


@dataclass(frozen=True)
class TrainTiles(Tiles):
    """The tiles of training images. Each time that one is shown, its window is moved at random by up to half of the overlap."""

    shows_objects: Tensor  # bool [T], at its place in the grid
    factors: Tensor  # f64 [T], mean number of times that an epoch shows each tile
    reach: int  # how far windows are moved at most, px
    min_visible: float  # an object of which a tile shows less than this fraction of its area is left out

    @classmethod
    def of_images(
        cls, annotations: Annotations, tiling: Tiling, min_visible: float, empty_share: float, of_classes: Tensor
    ) -> TrainTiles:
        """Make the tiles of a training set.

        Args:
            annotations: of its images.
            tiling: their side and overlap.
            min_visible: see `TrainTiles`.
            empty_share: fraction of the tiles of an epoch that show no object, as far as there are such tiles.
            of_classes: f64 [K], how often an epoch repeats tiles of each class, at least 1.
        """
        tiles = cls.of(annotations.sizes, tiling)
        rows, objects = shown_objects(tiles, annotations, min_visible)
        factors = torch.zeros(len(tiles), dtype=torch.float64)
        factors.scatter_reduce_(0, rows, of_classes[annotations.labels[objects]], "amax")
        shows_objects = factors > 0
        num_empty = int((~shows_objects).sum())
        wanted = min(round(float(factors.sum()) * empty_share / (1 - empty_share)), num_empty)
        factors[~shows_objects] = wanted / max(num_empty, 1)
        reach = int(tiling.size * tiling.overlap / 2)
        return cls(**vars(tiles), shows_objects=shows_objects, factors=factors, reach=reach, min_visible=min_visible)

    def drawn_window(self, tile: int, size: tuple[int, int], key: tuple[int, ...]) -> Window:
        """Return the window of a tile, moved at random within its image.

        Args:
            tile: its number.
            size: (h, w) of the image.
            key: seed of the move.
        """
        left, top, right, bottom = self.window(tile)
        moves = np.random.default_rng(key).integers(-self.reach, self.reach, 2, endpoint=True).tolist()
        x, y = (
            min(max(move, -low), limit - high)
            for move, low, high, limit in zip(moves, (left, top), (right, bottom), size[::-1], strict=True)
        )
        return left + x, top + y, right + x, bottom + y

    def describe(self) -> str:
        """Describe in a line what an epoch shows."""
        empty = ~self.shows_objects
        return (
            f"an epoch shows {len(self.offsets) - 1} whole images, {self.factors[self.shows_objects].sum():.0f} tiles with objects, "
            f"and {self.factors[empty].sum():.0f} of {int(empty.sum())} tiles without"
        )


def clip_to_windows(boxes: np.ndarray, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Clip boxes [P, 4] to windows [P, 4] or [4]. Returns the boxes in the frame of their window, and their visible fractions [P]."""
    clipped = np.clip(boxes, np.tile(windows[..., :2], 2), np.tile(windows[..., 2:], 2))
    sides = clipped[:, 2:] - clipped[:, :2]
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return clipped - np.tile(windows[..., :2], 2), sides.prod(axis=1) / np.maximum(areas, np.finfo(np.float64).tiny)


def is_shown(visible: np.ndarray, min_visible: float) -> np.ndarray:
    """Return which objects a tile shows, by their visible fractions."""
    return (visible > 0) & (visible >= min_visible)


def shown_objects(tiles: Tiles, annotations: Annotations, min_visible: float) -> tuple[Tensor, Tensor]:
    """Find the objects in each tile, without crowd regions. Returns pairs (tile, row of `Annotations.boxes`), i64 [P] each."""
    counts = annotations.boxes_per_image[tiles.images]
    ends = counts.cumsum(0)
    starts = ends - counts
    found = [(torch.zeros(0, dtype=torch.int64),) * 2]
    chunk_sizes = torch.unique_consecutive(ends // PAIRS, return_counts=True)[1]
    for chunk in torch.arange(len(tiles)).split(chunk_sizes.tolist()):
        rows = torch.repeat_interleave(chunk, counts[chunk])
        position = torch.arange(len(rows)) + starts[chunk[0]] - starts[rows]  # among the objects of its image
        objects = annotations.offsets[tiles.images[rows]] + position
        _, visible = clip_to_windows(annotations.boxes[objects].numpy(), tiles.windows[rows].numpy())
        kept = torch.from_numpy(is_shown(visible, min_visible)) & ~annotations.iscrowd[objects]
        found.append((rows[kept], objects[kept]))
    tile_rows, object_rows = (torch.cat(column) for column in zip(*found, strict=True))
    return tile_rows, object_rows
