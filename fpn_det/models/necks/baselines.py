"""The pyramids that the FPN paper compares with: Figure 1 and Tables 1 to 3."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fpn_det.models.layers import Norm
from fpn_det.models.necks.base import ExtraLevels, Neck, TopDown, apply_each, projection
from fpn_det.schema import Count

MAPS = ("C2", "C3", "C4", "C5")


class BottomUp(Neck):
    """The FPN without its top-down pathway: P_k = output_k(lateral_k(C_k)) (Table 1 d).

    Args:
        in_channels, in_strides: of the backbone's maps, fine to coarse.
        channels: width of every level.
        norm: after each convolution; None = none, and a bias.
        extra_levels: number of coarser levels on top, for the RPN.
        extra_method: `subsample` takes every second cell, `max_pool` the largest of 3x3, `conv` a strided 3x3 convolution.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        in_strides: Sequence[int],
        channels: Count = 256,
        norm: Norm | None = None,
        extra_levels: int = 1,
        extra_method: str = "subsample",
    ) -> None:
        super().__init__()
        self.channels = channels
        self.roi_strides = tuple(in_strides)
        self.lateral = nn.ModuleList(projection(width, channels, 1, norm) for width in in_channels)
        self.output = nn.ModuleList(projection(channels, channels, 3, norm) for _ in in_channels)
        self.extra = ExtraLevels(channels, extra_levels, extra_method)
        self.strides = self.extra.strides(in_strides)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps C2..C5 to P2..P6."""
        return self.extra(apply_each(self.output, apply_each(self.lateral, features)))


class TopDownOnly(Neck):
    """The FPN without lateral connections: every level is made of the coarsest map alone (Table 1 e).

    P_k = output_k(upsample^(5-k)(lateral(C5))).

    Args:
        in_channels, in_strides: of the backbone's maps, fine to coarse.
        channels: width of every level.
        norm: after each convolution; None = none, and a bias.
        upsampling: `nearest` or `bilinear`.
        extra_levels: number of coarser levels on top, for the RPN.
        extra_method: `subsample` takes every second cell, `max_pool` the largest of 3x3, `conv` a strided 3x3 convolution.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        in_strides: Sequence[int],
        channels: Count = 256,
        norm: Norm | None = None,
        upsampling: str = "nearest",
        extra_levels: int = 1,
        extra_method: str = "subsample",
    ) -> None:
        super().__init__()
        self.channels = channels
        self.roi_strides = tuple(in_strides)
        self.lateral = projection(in_channels[-1], channels, 1, norm)
        self.output = nn.ModuleList(projection(channels, channels, 3, norm) for _ in in_channels)
        self.top_down = TopDown(upsampling=upsampling)
        self.extra = ExtraLevels(channels, extra_levels, extra_method)
        self.strides = self.extra.strides(in_strides)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps C2..C5, of which all but the last give only the sizes of the levels, to P2..P6."""
        levels = [self.lateral(features[-1])]
        for feature in features[-2::-1]:
            levels.insert(0, self.top_down.upsampled(levels[0], feature))
        return self.extra(apply_each(self.output, levels))


class FinestLevel(Neck):
    """P2 of the FPN alone, with all anchors on it; all boxes are pooled from it (Table 1 f).

    Args:
        in_channels, in_strides: of the backbone's maps, fine to coarse.
        channels: width.
        norm: after each convolution; None = none, and a bias.
        merge, upsampling: see `FPN`.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        in_strides: Sequence[int],
        channels: Count = 256,
        norm: Norm | None = None,
        merge: str = "sum",
        upsampling: str = "nearest",
    ) -> None:
        super().__init__()
        self.channels = channels
        self.strides = self.roi_strides = tuple(in_strides[:1])
        self.lateral = nn.ModuleList(projection(width, channels, 1, norm) for width in in_channels)
        self.output = projection(channels, channels, 3, norm)
        self.top_down = TopDown(merge, upsampling)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps C2..C5 to P2."""
        return [self.output(self.top_down(apply_each(self.lateral, features))[0])]


class SingleMap(Neck):
    """One map of the backbone, with all anchors on it; all boxes are pooled from it (Table 1 a and b; Figure 1 b).

    Args:
        in_channels, in_strides: of the backbone's maps, fine to coarse.
        level: the map, C2 to C5. The backbone is truncated after it.
        channels: width, by a 1x1 and a 3x3 convolution as in the FPN; None = the map unchanged.
        norm: after each convolution; None = none, and a bias.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        in_strides: Sequence[int],
        level: str = "C5",
        channels: int | None = 256,
        norm: Norm | None = None,
    ) -> None:
        super().__init__()
        self.index = _index(level, "neck.level")
        self.num_inputs = self.index + 1
        self.strides = self.roi_strides = (in_strides[self.index],)
        width = in_channels[self.index]
        self.channels = channels or width
        self.project = (
            nn.Sequential(projection(width, channels, 1, norm), projection(channels, channels, 3, norm))
            if channels
            else nn.Identity()
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps C2.. to one level."""
        return [self.project(features[self.index])]


class FeatureHierarchy(Neck):
    """SSD's pyramid: maps of the backbone, then added strided layers, without merging (Figure 1 c; Liu et al. 2016).

    A 1x1 convolution projects a map of the backbone to the common width. An added level is a 1x1 convolution to half the
    width and a strided 3x3, each with ReLU, on the level before.

    Args:
        in_channels, in_strides: of the backbone's maps, fine to coarse.
        first: the finest map used, C2 to C5. C3 has the stride of SSD's conv4_3.
        num_levels: of the pyramid.
        channels: width of every level.
        norm: after each convolution; None = none, and a bias.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        in_strides: Sequence[int],
        first: str = "C3",
        num_levels: int = 5,
        channels: Count = 256,
        norm: Norm | None = None,
    ) -> None:
        super().__init__()
        self.index = _index(first, "neck.first")
        widths, self.roi_strides = in_channels[self.index :], tuple(in_strides[self.index :])
        num_added = num_levels - len(widths)
        if num_added < 0:
            raise ValueError(
                f"neck.num_levels: expected at least {len(widths)}, the number of maps from {first} on, got {num_levels}."
            )
        self.channels = channels
        self.strides = (*self.roi_strides, *(in_strides[-1] << number for number in range(1, num_added + 1)))
        self.lateral = nn.ModuleList(projection(width, channels, 1, norm) for width in widths)
        self.added = nn.ModuleList(
            nn.Sequential(
                projection(channels if number else widths[-1], channels // 2, 1, norm, relu=True),
                projection(channels // 2, channels, 3, norm, relu=True, stride=2),
            )
            for number in range(num_added)
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps C2..C5 to as many levels as there are strides."""
        levels, top = apply_each(self.lateral, features[self.index :]), features[-1]
        for layers in self.added:
            top = layers(top)
            levels.append(top)
        return levels


def _index(level: str, where: str) -> int:
    if level not in MAPS:
        raise ValueError(f"{where}: expected one of {', '.join(MAPS)}, got '{level}'.")
    return MAPS.index(level)
