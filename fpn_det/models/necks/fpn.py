"""The Feature Pyramid Network: strong semantics at every scale (Lin et al. 2017, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fpn_det.models.layers import Norm
from fpn_det.models.necks.base import ExtraLevels, Neck, TopDown, apply_each, projection
from fpn_det.schema import Count


class FPN(Neck):
    """Merge coarse, strong maps top-down into fine, well-located ones.

    P_k = output_k(M_k), M_k = lateral_k(C_k) + upsample(M_{k+1}), all of the same width; P6 is every second cell of P5.

    Args:
        in_channels, in_strides: of the backbone's maps, fine to coarse.
        channels: width of every level.
        norm: after each convolution; None = none, and a bias.
        merge: `sum`, or `average` of a lateral and what comes from above.
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
        merge: str = "sum",
        upsampling: str = "nearest",
        extra_levels: int = 1,
        extra_method: str = "subsample",
    ) -> None:
        super().__init__()
        self.channels = channels
        self.roi_strides = tuple(in_strides)
        self.lateral = nn.ModuleList(projection(width, channels, 1, norm) for width in in_channels)
        self.output = nn.ModuleList(projection(channels, channels, 3, norm) for _ in in_channels)
        self.top_down = TopDown(merge, upsampling)
        self.extra = ExtraLevels(channels, extra_levels, extra_method)
        self.strides = self.extra.strides(in_strides)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps C2..C5 to P2..P6."""
        return self.extra(self.levels(features))

    def levels(self, features: Sequence[Tensor]) -> list[Tensor]:
        """P2..P5."""
        merged = self.top_down(apply_each(self.lateral, features))
        return apply_each(self.output, merged)
