"""RoIAlign and neighborhoods of cells, gathered from one table of all cells of a pyramid.

`Pyramid.cells` concatenates all levels. The row of a cell is `start[level] + y * W_level + x`, so boxes of all levels and
images are pooled in one call, without a loop over levels and without scatter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from fpn_det.boxes import box_area
from fpn_det.caching import LastResults, filled
from fpn_det.schema import Count, CountOrZero, Positive
from fpn_det.structures import Pyramid


class Geometry:
    """Position and shape of the levels in the table of cells, made once for each shape."""

    def __init__(self) -> None:
        self._results: LastResults[Tensor] = LastResults()

    def __call__(self, pyramid: Pyramid, num_levels: int) -> Tensor:
        """(first row, stride, width, height) of the first `num_levels` levels: [L, 4], i64, on the pyramid's device."""
        device = pyramid.levels[0].device
        rows = tuple(
            (start, stride, width, height)
            for start, stride, (height, width) in zip(pyramid.starts, pyramid.strides, pyramid.shapes, strict=True)
        )[:num_levels]
        return self._results.get((rows, device), lambda: torch.stack([filled(row, device) for row in rows]))


class LevelAssigner:
    """Assigns a box to the level it is pooled from: k = floor(k0 + log2(sqrt(w * h) / 224)) (FPN, eq. 1).

    Args:
        strides: of the levels that boxes may be pooled from, fine to coarse.
        canonical_size: a box of this side, px,
        canonical_level: is assigned to this level; level k has stride 2**k.
    """

    def __init__(
        self, strides: Sequence[int], canonical_size: Positive = 224, canonical_level: CountOrZero = 4
    ) -> None:
        levels = [stride.bit_length() - 1 for stride in strides]
        if [1 << level for level in levels] != list(strides) or levels != list(
            range(levels[0], levels[0] + len(levels))
        ):
            raise ValueError(f"LevelAssigner: expected strides that double from level to level, got {list(strides)}.")
        self.first, self.num_levels = levels[0], len(levels)
        self.canonical_size = canonical_size
        self.canonical_level = canonical_level

    def __call__(self, boxes: Tensor) -> Tensor:
        """Level indices [...] in [0, L) of boxes [..., 4] in input px; a box without area is assigned to the finest."""
        level = self.level(box_area(boxes).clamp(min=0).sqrt() / self.canonical_size)
        return (level - self.first).clamp(0, self.num_levels - 1).long()

    def level(self, scale: Tensor) -> Tensor:
        """Unclamped level k of boxes whose side is `scale` times the canonical size."""
        return torch.floor(self.canonical_level + torch.log2(scale + 1e-8))


class RoIAlign:
    """Pools a fixed grid of bins from the level of each box (Mask R-CNN 3; levels by FPN 4.2).

    A bin is the mean of its sampling points, a point the bilinear mix of four cells, so a bin is a weighted sum of
    rows of the table; all bins of all boxes are one `embedding_bag`. `method="torchvision"` calls torchvision's
    operator level by level instead; it gives the same values.

    Args:
        strides: of the levels to pool from, fine to coarse (the first of the pyramid's).
        output_size: bins per side.
        sampling_ratio: sampling points per bin and side; 0 = as many as the bin has cells (torchvision's operator only).
        aligned: shift by half a cell, so that box and cells share one convention.
        method: `table` or `torchvision`.
        canonical_size, canonical_level: see `LevelAssigner`.

    Raises:
        ValueError: `sampling_ratio` 0 with the table.
    """

    assigner_class: type[LevelAssigner] = LevelAssigner

    def __init__(
        self,
        strides: Sequence[int],
        output_size: Count = 7,
        sampling_ratio: CountOrZero = 2,
        aligned: bool = True,
        method: str = "table",
        canonical_size: Positive = 224,
        canonical_level: CountOrZero = 4,
    ) -> None:
        if method not in ("table", "torchvision"):
            raise ValueError(f"pooler.method: expected table or torchvision, got '{method}'.")
        if method == "table" and sampling_ratio < 1:
            raise ValueError("pooler: sampling_ratio 0 has no fixed number of points. Set pooler.method=torchvision.")
        self.strides = tuple(strides)
        self.output_size = output_size
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned
        self.method = method
        self._geometry = Geometry()
        self.assigner = self.assigner_class(strides, canonical_size, canonical_level)

    def __call__(self, pyramid: Pyramid, boxes: Tensor, levels: Tensor | None = None) -> Tensor:
        """Pool boxes [B, R, 4] (input px) of each image: [B * R, C, output_size, output_size], float32.

        Args:
            levels: [B, R], what `assigner` gives for these boxes, if it is known.
        """
        assert pyramid.strides[: len(self.strides)] == self.strides, "pooling from other levels than declared"
        with torch.autocast(boxes.device.type, enabled=False):
            pool = self._table if self.method == "table" else self._torchvision
            return pool(pyramid, boxes, self.assigner(boxes) if levels is None else levels)

    def _table(self, pyramid: Pyramid, boxes: Tensor, levels: Tensor) -> Tensor:
        cells = pyramid.cells
        num_images, num_cells, channels = cells.shape
        geometry = self._geometry(pyramid, len(self.strides))[levels]  # [B, R, 4]
        start, stride, width, _ = geometry.unbind(-1)
        first_row = start + torch.arange(num_images, device=boxes.device)[:, None] * num_cells
        cell_xy, weight_xy = self._points(boxes / stride[..., None], geometry[..., 2:])
        (x, y), (x_weight, y_weight) = cell_xy.unbind(2), weight_xy.unbind(2)
        rows = first_row[..., None, None] + y * width[..., None, None]
        # [B, R, bins_y, 1, 2 * points, 1] and [B, R, 1, bins_x, 1, 2 * points] -> one bag of rows per bin
        bag = rows[:, :, :, None, :, None] + x[:, :, None, :, None, :]
        weight = y_weight[:, :, :, None, :, None] * x_weight[:, :, None, :, None, :]
        size = (2 * self.sampling_ratio) ** 2
        bins = F.embedding_bag(
            bag.reshape(-1, size), cells.flatten(0, 1), per_sample_weights=weight.reshape(-1, size), mode="sum"
        )
        # [B*R*bins*bins, C] -> [B*R, C, bins, bins]
        return bins.view(-1, self.output_size, self.output_size, channels).permute(0, 3, 1, 2)

    def _points(self, boxes: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
        """Cells and their bilinear weights along both axes, [B, R, 2, bins, 2 * points] each, x first.

        A sampling point more than one cell outside the map has weight 0; other points are clamped to the map.

        Args:
            boxes: [B, R, 4], in cells of their level.
            limits: width and height [B, R, 2] of the level.
        """
        low, high = boxes.unflatten(-1, (2, 2)).unbind(-2)  # [B, R, 2] each
        extent = high - low if self.aligned else (high - low).clamp(min=1)
        low = low - 0.5 if self.aligned else low
        num_points = self.output_size * self.sampling_ratio
        steps = torch.arange(0.5, num_points, device=low.device) / num_points
        limit = limits[..., None]
        last = limit - 1
        point = low[..., None] + steps * extent[..., None]
        inside = (point >= -1) & (point <= limit)
        point = torch.minimum(point.clamp(min=0), last)
        cell = point.long()  # its floor; proposals are finite
        fraction = point - cell
        cells = torch.stack([cell, torch.minimum(cell + 1, last)], dim=-1)
        weights = torch.stack([1 - fraction, fraction], dim=-1) * (inside / self.sampling_ratio)[..., None]
        shape = (*low.shape, self.output_size, 2 * self.sampling_ratio)
        return cells.reshape(shape), weights.reshape(shape)

    def _torchvision(self, pyramid: Pyramid, boxes: Tensor, levels: Tensor) -> Tensor:
        image = torch.arange(boxes.shape[0], device=boxes.device)[:, None, None].expand(-1, boxes.shape[1], 1)
        rois = torch.cat([image.to(boxes.dtype), boxes], dim=2).flatten(0, 1)
        channels = pyramid.levels[0].shape[1]
        pooled = rois.new_zeros(rois.shape[0], channels, self.output_size, self.output_size)
        for level, stride in enumerate(self.strides):
            (here,) = torch.where(levels.flatten() == level)
            features = torchvision.ops.roi_align(
                pyramid.levels[level].float(),
                rois[here],
                self.output_size,
                1 / stride,
                self.sampling_ratio,
                self.aligned,
            )
            pooled = pooled.index_put((here,), features)
        return pooled


class Neighborhoods:
    """Gathers the 3x3 cells around single cells, which are the input of a 3x3 convolution with padding 1."""

    def __init__(self) -> None:
        self._rows: LastResults[Tensor] = LastResults()

    def __call__(self, pyramid: Pyramid, cell_idxs: Tensor) -> Tensor:
        """The cells around each of `cell_idxs` [B, S]: [B, S, 9 * C], float32, row by row, channels innermost; zero outside the map."""
        device, shapes = cell_idxs.device, tuple(pyramid.shapes)
        rows = self._rows.get((shapes, device), lambda: _neighbors(shapes, device))[cell_idxs]  # [B, S, 9]
        num_images, num_cells, _ = pyramid.cells.shape
        first_row = torch.arange(num_images, device=device)[:, None, None] * num_cells
        values = F.embedding(first_row + rows.clamp(min=0), pyramid.cells.flatten(0, 1))
        return torch.where((rows >= 0)[..., None], values, 0.0).flatten(2)


def _neighbors(shapes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Rows [N, 9] of the 3x3 cells around each cell of an image in its table, i32; -1 outside the map."""
    tables, start = [], 0
    for height, width in shapes:
        stop = start + height * width
        rows = torch.arange(start, stop, dtype=torch.int32, device=device).view(height, width)
        around = F.pad(rows, (1, 1, 1, 1), value=-1).unfold(0, 3, 1).unfold(1, 3, 1)  # [H, W, 3, 3]
        tables.append(around.reshape(-1, 9))
        start = stop
    return torch.cat(tables)
