"""BiFPN, the bidirectional feature pyramid (EfficientDet, Tan et al. 2020, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpn_det.models.layers import Norm
from fpn_det.models.necks.base import ExtraLevels, Neck, apply_each, projection, upsample
from fpn_det.schema import Count


class BiFPN(Neck):
    """Fuses all levels, including the extra ones, top-down and then bottom-up, `repeats` times.

    Args:
        in_channels, in_strides: of the backbone's maps, fine to coarse.
        channels: width of every level.
        norm: after each convolution; None = none, and a bias.
        repeats: number of layers.
        extra_levels: number of coarser levels on top.
        extra_method: `subsample` takes every second cell, `max_pool` the largest of 3x3, `conv` a strided 3x3 convolution.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        in_strides: Sequence[int],
        channels: Count = 256,
        norm: Norm | None = "batch",
        repeats: int = 3,
        extra_levels: int = 1,
        extra_method: str = "max_pool",
    ) -> None:
        super().__init__()
        if repeats < 1:
            raise ValueError(f"neck.repeats: expected at least 1, got {repeats}.")
        self.channels = channels
        self.roi_strides = tuple(in_strides)
        self.lateral = nn.ModuleList(projection(width, channels, 1, norm) for width in in_channels)
        self.extra = ExtraLevels(channels, extra_levels, extra_method)
        self.strides = self.extra.strides(in_strides)
        self.layers = nn.Sequential(*(_Layer(channels, len(self.strides), norm) for _ in range(repeats)))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps C2..C5 to P2..P6."""
        return self.layers(self.extra(apply_each(self.lateral, features)))


class _Layer(nn.Module):
    """One top-down and one bottom-up pass (Figure 2 d), with a shortcut from the input of each middle level."""

    def __init__(self, channels: int, num_levels: int, norm: Norm | None) -> None:
        super().__init__()
        self.down = nn.ModuleList(_Node(channels, 2, norm) for _ in range(num_levels - 1))
        middle = [_Node(channels, 3, norm) for _ in range(num_levels - 2)]
        self.up = nn.ModuleList([*middle, _Node(channels, 2, norm)])

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        down = list(levels)
        for number in range(len(levels) - 2, -1, -1):
            coarser = upsample(down[number + 1], levels[number])
            down[number] = self.down[number]([levels[number], coarser])
        up = [down[0]]
        for number, node in enumerate(self.up, start=1):
            finer = F.max_pool2d(up[-1], 3, stride=2, padding=1)
            # the top-down pass leaves the coarsest level unchanged
            own = [levels[number], down[number]] if number < len(levels) - 1 else [levels[number]]
            up.append(node([*own, finer]))
        return up


class _Node(nn.Module):
    """Weighted sum of maps of one size (3.3), then swish and a separable convolution."""

    def __init__(self, channels: int, num_inputs: int, norm: Norm | None) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(num_inputs))
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.pointwise = projection(channels, channels, 1, norm)

    def forward(self, maps: list[Tensor]) -> Tensor:
        weights = self.weights.relu()
        weights = weights / (weights.sum() + 1e-4)
        mixed = weights[0] * maps[0]
        for weight, each in zip(weights[1:], maps[1:], strict=True):
            mixed = mixed + weight * each
        return self.pointwise(self.depthwise(F.silu(mixed)))
