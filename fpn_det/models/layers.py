"""Normalization layers, and convolutions with a fixed norm folded into their weights.

A norm whose statistics do not move is an affine map per channel: conv(x) * scale + shift = conv(x; w * scale) + shift.
Folding it saves two passes over every activation and keeps nothing extra for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d, deform_conv2d

from fpn_det.runtime import all_reduce_sum, current_ranks


class RunningStatistics(nn.Module):
    """A module whose buffers are updated by the forward pass in training, as those of batch norms are."""


class FixedStatisticsBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that stays in eval mode: statistics are fixed, weight and bias are trained (mmdetection's `norm_eval`)."""

    def train(self, mode: bool = True) -> FixedStatisticsBatchNorm2d:
        return super().train(False)


class FixedBatchNorm2d(FrozenBatchNorm2d):
    """Frozen batch norm, by torch's batch norm operator wherever no gradient is needed.

    So it equals `nn.BatchNorm2d` in eval mode to the last bit, and detectron2's frozen norm.
    """

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__(num_features, eps)
        self._kept: _ScaleAndShift | None = None

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Scale and shift [C] of the norm as an affine map; recomputed only after a buffer was replaced or changed."""
        buffers = (self.weight, self.bias, self.running_mean, self.running_var)
        if any(buffer.is_inference() for buffer in buffers):  # these have no version counter
            return _scale_and_shift(*buffers, self.eps)
        if self._kept is None or not self._kept.is_of(buffers):
            with torch.inference_mode(False), torch.no_grad():
                self._kept = _ScaleAndShift(buffers, _scale_and_shift(*buffers, self.eps))
        return self._kept.value

    def scale_like(self, weight: Tensor) -> Tensor:
        """The scale with the shape and strides of a convolution's weight; kept likewise."""
        scale, _ = self.scale_and_shift()
        if self._kept is None or self._kept.value[0] is not scale:
            return scale[:, None, None, None].expand_as(weight)
        with torch.inference_mode(False), torch.no_grad():
            return self._kept.scale_like(weight)


class _ScaleAndShift:
    """Scale and shift with the buffers, and their versions, that they were computed from."""

    def __init__(self, buffers: tuple[Tensor, ...], value: tuple[Tensor, Tensor]) -> None:
        self.buffers = buffers
        self.versions = [buffer._version for buffer in buffers]
        self.value = value
        self._expanded: Tensor | None = None

    def scale_like(self, weight: Tensor) -> Tensor:
        """The scale in memory of its own, with the shape and strides of a convolution's weight."""
        kept = self._expanded
        if kept is None or (kept.shape, kept.stride()) != (weight.shape, weight.stride()):
            kept = self._expanded = torch.empty_like(weight).copy_(self.value[0][:, None, None, None])
        return kept

    def is_of(self, buffers: tuple[Tensor, ...]) -> bool:
        """True if these are the same buffers with unchanged values."""
        return all(
            buffer is own and buffer._version == version
            for buffer, own, version in zip(buffers, self.buffers, self.versions, strict=True)
        )

    def __deepcopy__(self, memo: dict) -> None:
        return None  # the copy of a norm has buffers of its own


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm that refuses a batch with a single value per channel, whose variance is undefined."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            check_has_variance(input.numel() // max(input.shape[1], 1))
        return super().forward(input)


def check_has_variance(count: int) -> None:
    """Refuse batch statistics of a single value per channel.

    Raises:
        ValueError: there is one value only.
    """
    if count == 1:
        raise ValueError(
            "norm: expected at least 2 values per channel for batch statistics, got 1. Use larger images, a larger "
            "trainer.batch_size, or norm=frozen, fixed_statistics or group."
        )


class SyncBatchNorm2d(BatchNorm2d):
    """Batch norm over the images of all ranks, on any device (torch's needs CUDA).

    One all-reduce exchanges mean, sum of squared deviations and count of each rank, which are then combined (Chan et al.
    1979). Ranks may have different numbers of pixels. The difference E[x^2] - E[x]^2 would cancel catastrophically where
    the mean is large compared with the standard deviation.
    """

    def forward(self, input: Tensor) -> Tensor:
        ranks = current_ranks()
        if not self.training or ranks.world_size == 1:
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        values = input.float()
        local_count = values.numel() // values.shape[1]
        # a float32 mean is not exact enough, so its rounding error is measured and exchanged too
        pivot = values.detach().sum((0, 2, 3)) / max(local_count, 1)
        deviations = values - pivot[:, None, None]
        error = deviations.sum((0, 2, 3)) / max(local_count, 1)
        squares = deviations.square().sum((0, 2, 3)) - local_count * error.square()
        moments = torch.stack(
            [pivot.double() + error, squares.double(), torch.full_like(squares, local_count).double()]
        )
        # each rank fills its own row; the sum over ranks is then an all-gather with a gradient
        rows = [torch.zeros_like(moments)] * ranks.world_size
        rows[ranks.rank] = moments
        means, squares, counts = all_reduce_sum(torch.stack(rows)).unbind(1)  # f64 [ranks, C] each
        counts = counts.detach()
        count = counts.sum(0)
        mean = (counts * means).sum(0) / count.clamp(min=1)
        total = squares.sum(0) + (counts * (means - mean).square()).sum(0)
        with torch.no_grad():
            momentum = self.momentum if self.momentum is not None else 0.1
            weight = torch.where(count > 0, momentum, 0.0).float()  # without values the statistics are kept
            self.running_mean.lerp_(mean.float(), weight)
            self.running_var.lerp_((total / (count - 1).clamp(min=1)).float(), weight)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt((total / count.clamp(min=1)).float() + self.eps)
        shift = self.bias - (mean - pivot).float() * scale
        return (deviations * scale[:, None, None] + shift[:, None, None]).to(input.dtype)


def _group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """32 groups, as in Wu and He 2018 and in other projects; fewer channels are a group each."""
    if channels > 32 and channels % 32:
        near = channels // 32 * 32
        raise ValueError(
            f"norm=group of a neck or box head: expected channels that 32 groups divide, got {channels}. Set its channels "
            f"to {near} or {near + 32}, or another norm."
        )
    return nn.GroupNorm(min(32, channels), channels, eps)


Norm = Literal["frozen", "fixed_statistics", "batch", "sync", "group"]
NORMS: dict[Norm, Callable[..., nn.Module]] = {
    "frozen": FixedBatchNorm2d,
    "fixed_statistics": FixedStatisticsBatchNorm2d,
    "batch": BatchNorm2d,
    "sync": SyncBatchNorm2d,
    "group": _group_norm,
}


def make_norm(name: Norm, channels: int, eps: float = 1e-5) -> nn.Module:
    """Make a normalization layer over `channels`; `eps` is added to the variance.

    Raises:
        ValueError: unknown name, or channels that do not divide into groups.
    """
    if name not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got '{name}'.")
    return NORMS[name](channels, eps=eps)


def folded(norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Scale and shift [C] of a norm with fixed statistics; None for other norms and for those that are not `foldable`.

    Those of a frozen norm are computed once, until its buffers change.
    """
    if not getattr(norm, "foldable", True):
        return None
    if isinstance(norm, FixedBatchNorm2d) and not torch.compiler.is_compiling():
        return norm.scale_and_shift()
    if not isinstance(norm, FrozenBatchNorm2d) and (not isinstance(norm, nn.BatchNorm2d) or norm.training):
        return None
    assert norm.running_mean is not None and norm.running_var is not None
    return _scale_and_shift(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)


def _scale_and_shift(weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    scale = weight * torch.rsqrt(variance + eps)
    return scale, bias - mean * scale


def set_foldable(model: nn.Module, foldable: bool) -> None:
    """Allow or forbid folding of all norms of a model."""
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d | nn.BatchNorm2d):
            module.foldable = foldable


ScaledWeights = dict[nn.Module, Tensor]  # by convolution, its weight times the scale of its norm


def conv_norm(input: Tensor, conv: nn.Conv2d, norm: nn.Module, scaled: ScaledWeights | None = None) -> Tensor:
    """Convolution followed by a norm; one operator where the norm can be folded.

    Args:
        scaled: weights from `scaled_weights`.
    """
    affine = folded(norm)
    if affine is None:
        return norm(conv(input))
    scale, shift = affine
    weight = conv.weight * scale[:, None, None, None] if scaled is None else scaled[conv]
    bias = shift if conv.bias is None else shift + conv.bias * scale
    if isinstance(conv, DeformableConv2d):
        return conv.apply_with(input, weight, bias)
    return F.conv2d(input, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def scaled_weights(pairs: Sequence[tuple[nn.Conv2d, nn.Module]]) -> ScaledWeights | None:
    """The weights of convolutions times the scales of their frozen norms, in one kernel or a few for all of them.

    Their gradients are there once all of them are, so it is for the convolutions of a stage: ranks exchange gradients meanwhile.
    None where that does not pay or is not possible: on the CPU, in a compiled graph, and under other norms.
    """
    if torch.compiler.is_compiling() or not _scales_together(pairs[0][0].weight):
        return None
    scales = [norm.scale_like(conv.weight) for conv, norm in pairs if isinstance(norm, FixedBatchNorm2d)]
    if len(scales) < len(pairs) or not all(getattr(norm, "foldable", True) for _, norm in pairs):
        return None
    convs = [conv for conv, _ in pairs]
    return dict(zip(convs, _Products.apply(scales, *(conv.weight for conv in convs)), strict=True))


def _scales_together(weight: Tensor) -> bool:
    return weight.is_cuda  # each small kernel costs a launch there


class _Products(torch.autograd.Function):
    """Products of tensors with constants of equal shapes and strides, in one kernel or a few forward and backward."""

    @staticmethod
    def forward(ctx, constants: list[Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.constants = constants
        return tuple(torch._foreach_mul(tensors, constants))

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *torch._foreach_mul(gradients, ctx.constants)


class DeformableConv2d(nn.Conv2d):
    """Modulated deformable convolution (Deformable ConvNets v2, Zhu et al. 2019, 3.2), in float32.

    A convolution `offset` predicts for each tap of the kernel a shift in cells and a factor in 0..1. It starts at zero: no shift, and
    factors of 1/2. The weights are those of the convolution that it replaces, under the same names.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, bias: bool) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, kernel // 2, bias=bias)
        self.offset = nn.Conv2d(in_channels, 3 * kernel**2, kernel, stride, kernel // 2)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)  # type: ignore[arg-type]

    def apply_with(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve with other weights than its own, such as those that a norm is folded into."""
        shifts, factors = self.offset(input).float().split([2 * self.kernel_size[0] ** 2, self.kernel_size[0] ** 2], 1)
        with torch.autocast(input.device.type, enabled=False):
            output = deform_conv2d(
                input.float(),
                shifts,
                weight.float(),
                None if bias is None else bias.float(),
                stride=self.stride,
                padding=self.padding,
                mask=factors.sigmoid(),
            )
        return output

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] to [B, out_channels, H / stride, W / stride]."""
        return self.apply_with(input, self.weight, self.bias)


class ConvBlock(nn.Sequential):
    """Convolution with optional norm and ReLU. Its weights are at `0.`, the norm's at `1.`."""

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


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return input.view_as(input)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def scale_gradient(input: Tensor, factor: float) -> Tensor:
    """Return `input`, whose gradient is multiplied by `factor`."""
    return _ScaledGradient.apply(input, factor)
