"""Interface of necks, and the parts that several of them share."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpn_det.models.layers import ConvBlock, Norm

MERGES = ("sum", "average")
UPSAMPLINGS = ("nearest", "bilinear")
EXTRA_METHODS = ("subsample", "max_pool", "conv")


class Neck(nn.Module):
    """Interface of necks: feature maps of the backbone to the levels of a pyramid.

    A neck is made from `in_channels` and `in_strides`, those of the backbone's maps, and declares what follows from it.

    Attributes:
        channels: of every level.
        strides: of the levels, fine to coarse, input px per cell.
        roi_strides: of the levels that boxes are pooled from, which are the first ones.
        num_inputs: maps of the backbone that the neck reads, from the finest on; the backbone is truncated after them.
            None = all.
    """

    channels: int
    strides: tuple[int, ...]
    roi_strides: tuple[int, ...]
    num_inputs: int | None = None


class TopDown(nn.Module):
    """The top-down pathway: adds to every map the upsampled sum of all coarser ones (FPN, Figure 3)."""

    def __init__(self, merge: str = "sum", upsampling: str = "nearest") -> None:
        super().__init__()
        if merge not in MERGES:
            raise ValueError(f"neck.merge: expected {' or '.join(MERGES)}, got '{merge}'.")
        if upsampling not in UPSAMPLINGS:
            raise ValueError(f"neck.upsampling: expected {' or '.join(UPSAMPLINGS)}, got '{upsampling}'.")
        self.averages = merge == "average"
        self.upsampling = upsampling

    def forward(self, laterals: Sequence[Tensor]) -> list[Tensor]:
        """Maps of equal width, fine to coarse, to merged maps of the same sizes."""
        merged = list(laterals)
        for level in range(len(merged) - 2, -1, -1):
            merged[level] = merged[level] + self.upsampled(merged[level + 1], merged[level])
            if self.averages:
                merged[level] = merged[level] / 2
        return merged

    def upsampled(self, coarser: Tensor, finer: Tensor) -> Tensor:
        """The coarser map upsampled to the size of the finer one."""
        return upsample(coarser, finer, self.upsampling)


MOST_EXTRA_LEVELS = 16  # the last has one cell in any image


class ExtraLevels(nn.Module):
    """Adds coarser levels on top of a pyramid, each with half the sides of the one before.

    Args:
        channels: of the pyramid.
        count: number of levels to add.
        method: `subsample` takes every second cell, `max_pool` the largest of 3x3, `conv` a strided 3x3 convolution
            (with ReLU between two of them, as in RetinaNet).
    """

    def __init__(self, channels: int, count: int = 1, method: str = "subsample") -> None:
        super().__init__()
        if not 0 <= count <= MOST_EXTRA_LEVELS:
            raise ValueError(f"neck.extra_levels: expected 0 to {MOST_EXTRA_LEVELS}, got {count}.")
        if method not in EXTRA_METHODS:
            raise ValueError(f"neck.extra_method: expected {', '.join(EXTRA_METHODS)}, got '{method}'.")
        self.count = count
        self.method = method
        self.convs = nn.ModuleList(
            projection(channels, channels, 3, stride=2) for _ in range(count if method == "conv" else 0)
        )

    def strides(self, strides: Sequence[int]) -> tuple[int, ...]:
        """Strides of the pyramid with the extra levels."""
        return (*strides, *(strides[-1] << number for number in range(1, self.count + 1)))

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        """The levels followed by the extra ones."""
        top, extra = levels[-1], []
        for number in range(self.count):
            if self.method == "conv":
                top = self.convs[number](top.relu() if number else top)
            else:
                top = top[:, :, ::2, ::2] if self.method == "subsample" else F.max_pool2d(top, 3, stride=2, padding=1)
            extra.append(top)
        return levels + extra


def upsample(coarser: Tensor, finer: Tensor, method: str = "nearest") -> Tensor:
    """The coarser map upsampled to the size of the finer one, in its own dtype; autocast would return float32."""
    device = coarser.device.type
    # the meta device, on which shapes are computed, has no autocast; torch.amp.is_autocast_available breaks the graph before torch 2.12
    casting = nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
    with casting:
        return F.interpolate(coarser, size=finer.shape[-2:], mode=method)


def apply_each(layers: nn.ModuleList, maps: Sequence[Tensor]) -> list[Tensor]:
    """Apply to every map the layer of its level."""
    return [layer(each) for layer, each in zip(layers, maps, strict=True)]


def projection(
    in_channels: int, out_channels: int, kernel: int, norm: Norm | None = None, relu: bool = False, stride: int = 1
) -> nn.Module:
    """A convolution with the FPN's initialization; with a norm or ReLU, its weights are at `0.` and the norm's at `1.`."""
    block = ConvBlock(in_channels, out_channels, kernel, norm, relu, stride)
    conv = block[0]
    assert isinstance(conv, nn.Conv2d)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return block if norm or relu else conv  # a single convolution keeps its plain names, lateral.0.weight
