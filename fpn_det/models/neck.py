"""The Feature Pyramid Network: strong semantics at every scale (Lin et al. 2017, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fpn_det.models.layers import ConvBlock


class FPN(nn.Module):
    """Merge coarse, strong maps top-down into fine, well-located ones.

    P_k = output_k(lateral_k(C_k) + upsample(the sum of level k + 1)), all of the same width; P6 is every second cell of P5.

    Args:
        in_channels, in_strides: of the backbone's maps, fine to coarse.
        channels: width of every level.
        norm: after each convolution, one of `layers.NORMS`; None = none, with bias.
        extra_level: add a coarser level, by subsampling.

    Attributes:
        channels, strides: of the pyramid.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        in_strides: Sequence[int],
        channels: int = 256,
        norm: str | None = None,
        extra_level: bool = True,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.extra_level = extra_level
        self.strides = tuple(in_strides) + ((in_strides[-1] * 2,) if extra_level else ())
        self.lateral = nn.ModuleList(_projection(width, channels, 1, norm) for width in in_channels)
        self.output = nn.ModuleList(_projection(channels, channels, 3, norm) for _ in in_channels)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps C2..C5 to P2..P6."""
        sums = [lateral(feature) for lateral, feature in zip(self.lateral, features, strict=True)]
        for level in range(len(sums) - 2, -1, -1):
            coarser = F.interpolate(sums[level + 1], size=sums[level].shape[-2:], mode="nearest")
            sums[level] = sums[level] + coarser
        levels = [output(merged) for output, merged in zip(self.output, sums, strict=True)]
        if self.extra_level:
            levels.append(levels[-1][:, :, ::2, ::2])
        return levels


def _projection(in_channels: int, out_channels: int, kernel: int, norm: str | None) -> nn.Module:
    block = ConvBlock(in_channels, out_channels, kernel, norm)
    conv = block[0]
    assert isinstance(conv, nn.Conv2d)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return block if norm else conv  # a lone convolution keeps its plain names, lateral.0.weight
