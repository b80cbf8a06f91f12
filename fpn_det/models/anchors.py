"""Anchors: the fixed boxes that every cell of a pyramid proposes from (Faster R-CNN 3.1.1, FPN 4.1).

Candidate (anchor) index = cell * A + a, where cells are numbered as in `Pyramid.cells`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fpn_det.schema import Positive


class AnchorGenerator(nn.Module):
    """Lay the same few boxes around every cell.

    Args:
        strides: input px per cell, one per level, fine to coarse.
        sizes: square roots of the anchors' areas, px. One number per level, or a list of numbers per level; on a
            pyramid of one level a flat list puts all sizes on it.
        ratios: height / width. Within a cell anchors are ordered by ratio, then by size.
        offset: where in its cell an anchor is centered, in strides; 0 is the top left corner.
        rounded: round the anchors' corners to whole px, as torchvision does.
        stride_source: `declared`, or `inferred` from the sizes of the maps, as torchvision does.
        computed_in: `float32`, or `float64` as detectron2 does, before the anchors become float32. It is the last bit
            that decides which of many equally good anchors is an object's best.

    Raises:
        ValueError: sizes and levels do not go together.
    """

    def __init__(
        self,
        strides: Sequence[int],
        sizes: Sequence[Positive] | Sequence[Sequence[Positive]] = (32, 64, 128, 256, 512),
        ratios: Sequence[Positive] = (0.5, 1.0, 2.0),
        offset: float = 0.0,
        rounded: bool = False,
        stride_source: str = "declared",
        computed_in: str = "float32",
    ) -> None:
        super().__init__()
        if stride_source not in ("declared", "inferred"):
            raise ValueError(f"anchors.stride_source: expected declared or inferred, got '{stride_source}'.")
        if computed_in not in ("float32", "float64"):
            raise ValueError(f"anchors.computed_in: expected float32 or float64, got '{computed_in}'.")
        if not ratios:
            raise ValueError("anchors.ratios: expected at least one ratio of height to width, got none.")
        dtype = torch.float32 if computed_in == "float32" else torch.float64
        per_level = _sizes_per_level(sizes, len(strides))
        self.strides = tuple(strides)
        self.offset = offset
        self.stride_source = stride_source
        self.num_per_cell = len(per_level[0]) * len(ratios)
        cells = torch.stack([_cell_anchors(level_sizes, ratios, dtype) for level_sizes in per_level]).float()
        self.register_buffer("cell_anchors", cells.round() if rounded else cells, persistent=False)  # [L, A, 4]
        self.cell_anchors: Tensor

    def centers(self, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """(x, y) of every cell's anchors, px, [H_l * W_l, 2] per level."""
        centers = []
        for (height, width), (stride_y, stride_x) in zip(shapes, self._steps(shapes), strict=True):
            y = (torch.arange(height, device=self.cell_anchors.device) + self.offset) * stride_y
            x = (torch.arange(width, device=self.cell_anchors.device) + self.offset) * stride_x
            grid = torch.stack([x.repeat(height), y.repeat_interleave(width)], dim=1)
            centers.append(grid.to(self.cell_anchors.dtype))
        return centers

    def forward(self, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """All anchors [M, 4] of maps with these (H_l, W_l), in input px. They may reach beyond the image."""
        levels = []
        for centers, cells in zip(self.centers(shapes), self.cell_anchors, strict=True):
            # [H*W, 1, 4] + [A, 4] -> [H*W*A, 4]
            levels.append((centers.repeat(1, 2)[:, None] + cells).flatten(0, 1))
        return torch.cat(levels)

    def _steps(self, shapes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        if self.stride_source == "declared":
            return [(stride, stride) for stride in self.strides]
        canvas = [side * self.strides[0] for side in shapes[0]]
        return [(canvas[0] // height, canvas[1] // width) for height, width in shapes]


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


def _cell_anchors(sizes: Sequence[float], ratios: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Boxes [A, 4] around (0, 0): area size**2, height / width = ratio."""
    ratio = torch.tensor(ratios, dtype=dtype).sqrt()
    size = torch.tensor(sizes, dtype=dtype)
    half_height = (ratio[:, None] * size).flatten() / 2
    half_width = ((1 / ratio)[:, None] * size).flatten() / 2
    return torch.stack([-half_width, -half_height, half_width, half_height], dim=1)
