"""The Feature Pyramid Network: strong semantics at every scale (Lin et al. 2017, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fpn_det.models.layers import ConvBlock, Norm
from fpn_det.schema import Count

MERGES = ("sum", "average")
UPSAMPLINGS = ("nearest", "bilinear")
EXTRA_METHODS = ("subsample", "max_pool", "conv")


class Neck(nn.Module):
    """Makes a pyramid of the backbone's maps. Whoever writes one sets these attributes; all that follows is built from them.

    Attributes:
        channels: of every level.
        strides: of the levels, fine to coarse.
        roi_strides: of those that boxes are pooled from, the first of them.
        num_inputs: how many of the backbone's maps it reads, from the finest on; the backbone ends there. None = all.
    """

    channels: int
    strides: tuple[int, ...]
    roi_strides: tuple[int, ...]
    num_inputs: int | None = None


class FPN(Neck):
    """Merge coarse, strong maps top-down into fine, well-located ones.

    P_k = output_k(M_k), M_k = lateral_k(C_k) + upsample(M_{k+1}), all of the same width; P6 is every second cell of P5.

    Args:
        in_channels, in_strides: of the backbone's maps, fine to coarse.
        channels: width of every level.
        norm: after each convolution, one of `layers.NORMS`; None = none, with bias.
        merge: `sum`, or `average` of a lateral and what comes from above.
        upsampling: `nearest` or `bilinear`.
        extra_levels, extra_method: coarser levels on top, for the RPN; see `ExtraLevels`.
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


class TopDown(nn.Module):
    """The top-down pathway: to every map is added the upsampled sum of all coarser ones."""

    def __init__(self, merge: str = "sum", upsampling: str = "nearest") -> None:
        super().__init__()
        if merge not in MERGES:
            raise ValueError(f"neck.merge: expected {' or '.join(MERGES)}, got '{merge}'.")
        if upsampling not in UPSAMPLINGS:
            raise ValueError(f"neck.upsampling: expected {' or '.join(UPSAMPLINGS)}, got '{upsampling}'.")
        self.averages = merge == "average"
        self.upsampling = upsampling

    def forward(self, laterals: Sequence[Tensor]) -> list[Tensor]:
        """Maps of one width, fine to coarse, to as many of the same sizes."""
        merged = list(laterals)
        for level in range(len(merged) - 2, -1, -1):
            merged[level] = merged[level] + self.upsampled(merged[level + 1], merged[level])
            if self.averages:
                merged[level] = merged[level] / 2
        return merged

    def upsampled(self, coarser: Tensor, finer: Tensor) -> Tensor:
        """The coarser map at the size of the finer one."""
        return F.interpolate(coarser, size=finer.shape[-2:], mode=self.upsampling)


class ExtraLevels(nn.Module):
    """Coarser levels on top of a pyramid, each with half the sides of the one before.

    Args:
        channels: of the pyramid.
        count: how many.
        method: `subsample` takes every second cell, `max_pool` the largest of 3x3, `conv` a strided 3x3 convolution
            (with ReLU between two of them, as in RetinaNet).
    """

    def __init__(self, channels: int, count: int = 1, method: str = "subsample") -> None:
        super().__init__()
        if count < 0:
            raise ValueError(f"neck.extra_levels: expected at least 0, got {count}.")
        if method not in EXTRA_METHODS:
            raise ValueError(f"neck.extra_method: expected {', '.join(EXTRA_METHODS)}, got '{method}'.")
        self.count = count
        self.method = method
        self.convs = nn.ModuleList(
            projection(channels, channels, 3, stride=2) for _ in range(count if method == "conv" else 0)
        )

    def strides(self, strides: Sequence[int]) -> tuple[int, ...]:
        """Those of the pyramid with the extra levels."""
        return (*strides, *(strides[-1] << number for number in range(1, self.count + 1)))

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        """The levels, and the extra ones."""
        top, extra = levels[-1], []
        for number in range(self.count):
            if self.method == "conv":
                top = self.convs[number](top.relu() if number else top)
            else:
                top = top[:, :, ::2, ::2] if self.method == "subsample" else F.max_pool2d(top, 3, stride=2, padding=1)
            extra.append(top)
        return levels + extra


def apply_each(layers: nn.ModuleList, maps: Sequence[Tensor]) -> list[Tensor]:
    """Every map through the layer of its own level."""
    return [layer(each) for layer, each in zip(layers, maps, strict=True)]


def projection(
    in_channels: int, out_channels: int, kernel: int, norm: Norm | None = None, relu: bool = False, stride: int = 1
) -> nn.Module:
    """A convolution as necks use it; with a norm or ReLU, its weights are at `0.` and the norm's at `1.`."""
    block = ConvBlock(in_channels, out_channels, kernel, norm, relu, stride)
    conv = block[0]
    assert isinstance(conv, nn.Conv2d)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return block if norm or relu else conv  # a lone convolution keeps its plain names, lateral.0.weight
