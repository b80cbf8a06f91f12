"""Normalisation layers, and convolutions that take a fixed norm into their weights.

A norm whose statistics do not move is an affine map per channel: conv(x) * scale + shift = conv(x; w * scale) + shift.
Folding it saves two passes over every activation and keeps nothing extra for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from fpn_det.runtime import all_reduce_sum, current_ranks


class FixedStatisticsBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that never leaves eval mode: statistics stay, weight and bias are trained (mmdetection's `norm_eval`)."""

    def train(self, mode: bool = True) -> FixedStatisticsBatchNorm2d:
        return super().train(False)


class FixedBatchNorm2d(FrozenBatchNorm2d):
    """Batch norm of which nothing is trained, by torch's own operator wherever no gradient passes.

    So it equals `nn.BatchNorm2d` in eval mode to the last bit, and detectron2's frozen norm.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the images of all ranks; on any device, unlike torch's.

    One all-reduce carries sum, sum of squares and count, so ranks may hold different numbers of pixels.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or current_ranks().world_size == 1:
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        values = input.float()
        count = values.new_full((1,), values.numel() / values.shape[1])
        sums = torch.cat([values.sum((0, 2, 3)), values.square().sum((0, 2, 3)), count])
        totals = all_reduce_sum(sums)
        count = totals[-1].detach()
        mean, mean_square = (totals[:-1] / count).view(2, -1)
        variance = (mean_square - mean.square()).clamp(min=0)
        with torch.no_grad():
            momentum = self.momentum if self.momentum is not None else 0.1
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * count / (count - 1), momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        return (values * scale[:, None, None] + shift[:, None, None]).to(input.dtype)


def _group_norm(channels: int, eps: float) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels), channels, eps)


Norm = Literal["frozen", "fixed_statistics", "batch", "sync", "group"]
NORMS: dict[Norm, Callable[..., nn.Module]] = {
    "frozen": FixedBatchNorm2d,
    "fixed_statistics": FixedStatisticsBatchNorm2d,
    "batch": nn.BatchNorm2d,
    "sync": SyncBatchNorm2d,
    "group": _group_norm,
}


def make_norm(name: Norm, channels: int, eps: float = 1e-5) -> nn.Module:
    """A normalisation layer over `channels`; `eps` is added to the variance.

    Raises:
        ValueError: no such norm.
    """
    if name not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got '{name}'.")
    return NORMS[name](channels, eps=eps)


def folded(norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    """(scale, shift) [C] of a norm whose statistics do not move now; None for any other, or if it is not `foldable`."""
    if not getattr(norm, "foldable", True):
        return None
    if not isinstance(norm, FrozenBatchNorm2d) and (not isinstance(norm, nn.BatchNorm2d) or norm.training):
        return None
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


def set_foldable(model: nn.Module, foldable: bool) -> None:
    """Decide for all norms of a model whether convolutions may take them in."""
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d | nn.BatchNorm2d):
            module.foldable = foldable


def conv_norm(input: Tensor, conv: nn.Conv2d, norm: nn.Module) -> Tensor:
    """Normalised convolution; one operator where the norm can be folded."""
    affine = folded(norm)
    if affine is None:
        return norm(conv(input))
    scale, shift = affine
    weight = conv.weight * scale[:, None, None, None]
    bias = shift if conv.bias is None else shift + conv.bias * scale
    return F.conv2d(input, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


class ConvBlock(nn.Sequential):
    """Convolution, norm, ReLU; the last two where asked for. Weights are at `0.`, the norm's at `1.`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        norm: Norm | None = None,
        relu: bool = False,
        stride: int = 1,
    ) -> None:
        conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=norm is None)
        super().__init__(conv, *([make_norm(norm, out_channels)] if norm else []))
        self.relu = relu

    def forward(self, input: Tensor) -> Tensor:
        output = conv_norm(input, self[0], self[1]) if len(self) == 2 else self[0](input)  # type: ignore[arg-type]
        return output.relu_() if self.relu else output
