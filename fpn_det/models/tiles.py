"""Detection on whole images and on their tiles, merged before one suppression.

A tile is detected on like an image. Its candidates are moved to the frame of the whole image and join those of the whole
image, and the selection runs once over all of them. An object that is cut by an edge of a tile is not reported by halves:
candidates at such an edge are left out, because a neighbouring tile or the whole image shows the object.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fpn_det.boxes import clip_boxes
from fpn_det.models.views import Views
from fpn_det.structures import Batch, Candidates, Detections, tensors_of

EDGE = 0.1  # a candidate that is closer to an edge than this part of its side counts as cut


class Detects(Protocol):
    """The part of a detector that whole images need; an exported model has it too."""

    def detect(self, batch: Batch, views: Views | None = None) -> Detections:
        """Detections in the input frame, with those of all test-time `views`."""


@runtime_checkable
class DetectsInTiles(Detects, Protocol):
    """The part of a detector that tiles need."""

    @property
    def score_threshold(self) -> float:
        """Score that a candidate must exceed to be selected."""

    def candidates(self, batch: Batch, views: Views | None = None) -> Candidates:
        """Boxes and scores before the selection, in the input frame."""

    def select(self, candidates: Candidates, batch: Batch) -> Detections:
        """The detections among all candidates."""


def check_tiles(model: Detects) -> None:
    """Refuse tiles of a model that does not give its candidates."""
    if not isinstance(model, DetectsInTiles):
        raise ValueError(
            f"tile.size: expected null for {type(model).__name__}, which suppresses the boxes of each tile by itself. "
            "Set tile.size=null (in Python tile=0), or use the checkpoint."
        )


def detect_all(
    model: Detects, batches: Iterable[Batch], dtype: torch.dtype | None = None, views: Views | None = None
) -> Iterator[tuple[Batch, Detections]]:
    """Yield each batch of whole images with its detections, in its input frame.

    Args:
        model: see `check_tiles` if there are tiles.
        batches: of whole images, each followed by batches of their tiles.
        dtype: of autocast; None disables it.
        views: test-time augmentation, of images and tiles.
    """
    group: _Group | None = None
    for batch in batches:
        if batch.windows is None:
            if group is not None:
                yield group.whole, group.detections()
            group = _Group(model, batch, dtype, views)
        elif group is not None:
            group.add(batch, batch.windows)
    if group is not None:
        yield group.whole, group.detections()


class _Group:
    """A batch of whole images, and what was found in their tiles.

    Args:
        model, dtype, views: see `detect_all`.
        whole: the batch.
    """

    def __init__(self, model: Detects, whole: Batch, dtype: torch.dtype | None, views: Views | None) -> None:
        self.whole = whole
        self._model, self._dtype, self._views = model, dtype, views
        self._found: dict[int, list[list[Tensor]]] = {}  # columns [P, ...] of candidates, by image row

    def add(self, tiles: Batch, windows: Tensor) -> None:
        """Detect on tiles, and keep the candidates that may be selected, in the frame of the whole images."""
        assert isinstance(self._model, DetectsInTiles)
        owner = tiles.indices[:, None] == self.whole.indices  # [B, images]; none if the whole image could not be read
        rows = owner.int().argmax(dim=1)
        with self._autocast():
            found = self._model.candidates(tiles, self._views)
        usable = found.valid & owner.any(dim=1, keepdim=True)
        cut = cut_by_edges(found.boxes, tiles.sizes, windows, self.whole.original_sizes[rows])
        scores = found.scores.masked_fill(cut | ~usable[..., None], 0.0)
        boxes = move_to_whole(found.boxes, tiles, windows, self.whole.original_sizes[rows], self.whole.sizes[rows])
        keep = (scores > self._model.score_threshold).any(dim=2)
        columns = tensors_of(replace(found, boxes=boxes, scores=scores))
        for row, kept, *of_tile in zip(rows.tolist(), keep, *columns, strict=True):
            self._found.setdefault(row, []).append([column[kept] for column in of_tile])

    def detections(self) -> Detections:
        """The detections of the whole images and their tiles; without tiles, exactly those of the model itself."""
        with self._autocast():
            if not self._found:
                return self._model.detect(self.whole, self._views)
            assert isinstance(self._model, DetectsInTiles)
            whole = self._model.candidates(self.whole, self._views)
            return self._model.select(self._merged(whole), self.whole)

    def _merged(self, whole: Candidates) -> Candidates:
        """Append the candidates of the tiles to those of the whole images, padded to the largest number."""
        images = []
        for row, *of_image in zip(range(len(self.whole)), *tensors_of(whole), strict=True):
            parts = [of_image, *self._found.get(row, [])]
            images.append([torch.cat(part) for part in zip(*parts, strict=True)])
        return Candidates(*(pad_sequence(list(column), batch_first=True) for column in zip(*images, strict=True)))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.whole.pixels.device.type, self._dtype, enabled=self._dtype is not None)


def cut_by_edges(boxes: Tensor, sizes: Tensor, windows: Tensor, image_sizes: Tensor) -> Tensor:
    """Mask [B, R, K] of the boxes that reach an edge of their tile, or nearly so, unless it is an edge of the image.

    Args:
        boxes: [B, R, K, 4], in the input frame of the tiles.
        sizes: of the tiles in that frame, i64 [B, 2].
        windows: of the tiles in the original frame, i64 [B, 4].
        image_sizes: of the whole images in the original frame, i64 [B, 2].
    """
    sides = (boxes[..., 2:] - boxes[..., :2]) * EDGE
    is_inner = torch.cat([windows[:, :2] > 0, windows[:, 2:] < image_sizes.flip(1)], dim=1)
    gaps = torch.cat([boxes[..., :2], sizes.flip(1)[:, None, None] - boxes[..., 2:]], dim=-1)
    return ((gaps < torch.cat([sides, sides], dim=-1)) & is_inner[:, None, None]).any(dim=-1)


def move_to_whole(boxes: Tensor, tiles: Batch, windows: Tensor, image_sizes: Tensor, input_sizes: Tensor) -> Tensor:
    """Move boxes [B, R, K, 4] from the input frame of tiles to that of the whole images.

    Args:
        tiles: the batch of tiles.
        windows: of the tiles in the original frame, i64 [B, 4].
        image_sizes: of the whole images in the original frame, i64 [B, 2].
        input_sizes: of the whole images in their input frame, i64 [B, 2].
    """
    to_original = (tiles.original_sizes.float() / tiles.sizes.float()).flip(1).repeat(1, 2)[:, None]
    to_input = (input_sizes.float() / image_sizes.float()).flip(1).repeat(1, 2)[:, None]
    moved = (boxes.flatten(1, 2) * to_original + windows[:, :2].repeat(1, 2)[:, None]) * to_input
    return clip_boxes(moved, input_sizes).view_as(boxes)
