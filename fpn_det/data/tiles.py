"""Tiles: overlapping square windows that cover an image, for objects that are small in a large image.

A data set with tiles has one row for each image, in the order of `Annotations`, and after them one row for each tile. An
image that is not larger than a tile has none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fpn_det.schema import Count, Decay
from fpn_det.structures import offsets_of

Window = tuple[int, int, int, int]  # xyxy px, original frame


@dataclass(frozen=True)
class Tiling:
    """The side of the tiles, and how far they overlap.

    An object no larger than about 0.8 of the overlap is seen whole, and not at an edge, by at least one tile.
    """

    size: Count  # side of a tile, px of the image
    overlap: Decay = 0.2  # of two neighbours, at least; fraction of the side

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
        """Return the tiles of images of `sizes` i64 [I, 2] (h, w), in shared memory."""
        distinct, which = np.unique(sizes.numpy(), axis=0, return_inverse=True)
        windows = [np.array(tiling.windows(*size), np.int64).reshape(-1, 4) for size in distinct.tolist()]
        parts = [windows[index] for index in which.reshape(-1)]
        offsets = offsets_of([len(part) for part in parts])
        images = torch.repeat_interleave(torch.arange(len(sizes)), offsets.diff())
        stacked = torch.from_numpy(np.concatenate([np.zeros((0, 4), np.int64), *parts]))
        return cls(images.share_memory_(), stacked.share_memory_(), offsets.share_memory_())

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
