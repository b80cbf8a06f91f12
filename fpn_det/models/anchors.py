"""Anchors: the fixed boxes that every cell of a pyramid proposes from (Faster R-CNN 3.1.1, FPN 4.1).

Candidate (anchor) index = cell * A + a, where cells are numbered as in `Pyramid.cells`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fpn_det.caching import LastResults
from fpn_det.schema import Positive


class AnchorGenerator(nn.Module):
    """Generates the same anchors around every cell of a level.

    Args:
        strides: input px per cell, one per level, fine to coarse.
        sizes: square roots of the anchors' areas, px. One number per level, or a list of numbers per level; on a
            pyramid of one level a flat list puts all sizes on it.
        ratios: height / width. Within a cell anchors are ordered by ratio, then by size.
        offset: position of the anchors' center within its cell, in strides; 0 is the top left corner.

    Raises:
        ValueError: the number of sizes does not fit the number of levels.
    """

    def __init__(
        self,
        strides: Sequence[int],
        sizes: Sequence[Positive] | Sequence[Sequence[Positive]] = (32, 64, 128, 256, 512),
        ratios: Sequence[Positive] = (0.5, 1.0, 2.0),
        offset: float = 0.0,
    ) -> None:
        super().__init__()
        if not ratios:
            raise ValueError("anchors.ratios: expected at least one ratio of height to width, got none.")
        per_level = _sizes_per_level(sizes, len(strides))
        self.strides = tuple(strides)
        self.offset = offset
        self.num_per_cell = len(per_level[0]) * len(ratios)
        cells = torch.stack([self.make_cell(level_sizes, ratios) for level_sizes in per_level])
        self.register_buffer("cell_anchors", cells, persistent=False)  # [L, A, 4]
        self.cell_anchors: Tensor
        self._centers: LastResults[Tensor] = LastResults()
        self._anchors: LastResults[Tensor] = LastResults()

    def centers(self, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """Centers (x, y) of the anchors of every cell, input px, [N, 2]."""
        return self._centers.get((tuple(shapes), self.cell_anchors.device), lambda: self._make_centers(shapes))

    def _make_centers(self, shapes: Sequence[tuple[int, int]]) -> Tensor:
        centers = []
        for (height, width), (stride_y, stride_x) in zip(shapes, self.steps(shapes), strict=True):
            y = (torch.arange(height, device=self.cell_anchors.device) + self.offset) * stride_y
            x = (torch.arange(width, device=self.cell_anchors.device) + self.offset) * stride_x
            grid = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=2)
            centers.append(grid.flatten(0, 1).to(self.cell_anchors.dtype))
        return torch.cat(centers)

    def forward(self, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """All anchors [M, 4] of maps with these (H_l, W_l), in input px. They may reach beyond the image."""
        return self._anchors.get((tuple(shapes), self.cell_anchors.device), lambda: self._make_anchors(shapes))

    def _make_anchors(self, shapes: Sequence[tuple[int, int]]) -> Tensor:
        levels = []
        by_level = self.centers(shapes).split([height * width for height, width in shapes])
        for centers, cells in zip(by_level, self.cell_anchors, strict=True):
            # [H*W, 1, 4] + [A, 4] -> [H*W*A, 4]
            levels.append((centers.repeat(1, 2)[:, None] + cells).flatten(0, 1))
        return torch.cat(levels)

    def steps(self, shapes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Distance (y, x) between neighboring centers of each level, px."""
        return [(stride, stride) for stride in self.strides]

    def make_cell(self, sizes: Sequence[float], ratios: Sequence[float]) -> Tensor:
        """The anchors [A, 4] of a cell around (0, 0), float32."""
        return boxes_of_sizes(sizes, ratios)


def _sizes_per_level(sizes: Sequence, num_levels: int) -> list[list[float]]:
    nested = [list(size) if isinstance(size, Sequence) else [size] for size in sizes]
    if num_levels == 1 and len(nested) > 1:
        nested = [[size for level in nested for size in level]]
    if len(nested) != num_levels or len({len(level) for level in nested}) != 1 or not nested[0]:
        raise ValueError(
            f"anchors.sizes: expected one size (or one list of equal length) for each of {num_levels} levels, got {list(sizes)}. "
            f"Change rpn.anchors.sizes."
        )
    return nested


def boxes_of_sizes(sizes: Sequence[float], ratios: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
    """Boxes [A, 4] around (0, 0) with area size**2 and height / width = ratio, by ratio, then by size."""
    ratio = torch.tensor(ratios, dtype=dtype).sqrt()
    size = torch.tensor(sizes, dtype=dtype)
    half_height = (ratio[:, None] * size).flatten() / 2
    half_width = ((1 / ratio)[:, None] * size).flatten() / 2
    return torch.stack([-half_width, -half_height, half_width, half_height], dim=1)
