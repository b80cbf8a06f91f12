"""PAFPN, the FPN with a bottom-up path added (PANet, Liu et al. 2018, 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fpn_det.models.layers import Norm
from fpn_det.models.necks.base import apply_each, projection
from fpn_det.models.necks.fpn import FPN
from fpn_det.schema import Count


class PAFPN(FPN):
    """Adds a short bottom-up path, by which coarse levels get the localization of fine ones.

    Q_2 = P_2, Q_k = P_k + down_{k-1}(Q_{k-1}), followed by a 3x3 convolution for each level but the finest.

    As in mmdetection, Q_k goes on to the next level before that convolution, and without ReLU; the paper takes it after both.

    Args: see `FPN`.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        in_strides: Sequence[int],
        channels: Count = 256,
        norm: Norm | None = None,
        merge: str = "sum",
        upsampling: str = "nearest",
        extra_levels: int = 1,
        extra_method: str = "subsample",
    ) -> None:
        super().__init__(in_channels, in_strides, channels, norm, merge, upsampling, extra_levels, extra_method)
        self.down = nn.ModuleList(projection(channels, channels, 3, norm, stride=2) for _ in in_channels[1:])
        self.final = nn.ModuleList(projection(channels, channels, 3, norm) for _ in in_channels[1:])

    def levels(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Q2..Q5."""
        levels = super().levels(features)
        for number, down in enumerate(self.down, start=1):
            levels[number] = levels[number] + down(levels[number - 1])
        return [levels[0], *apply_each(self.final, levels[1:])]
