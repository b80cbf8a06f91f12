"""ResNet (He et al. 2016): torchvision's blocks and parameter names, with fixed norms folded into the convolutions."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights
from torchvision.models import resnet as torchvision_resnet
from torchvision.ops import StochasticDepth

from fpn_det.models.backbone import Backbone
from fpn_det.models.layers import DeformableConv2d, Norm, ScaledWeights, conv_norm, make_norm, scaled_weights
from fpn_det.models.weights import widen_input
from fpn_det.schema import Amount, Count, Decay, listed
from fpn_det.weight_files import check_source, fetch, pixel_statistics, read_state, read_state_file

TORCHVISION = "torchvision/"
OFFSETS = ".conv2.offset."  # of a deformable convolution, in a place where other ResNets have a plain one


class _Residual:
    """The shortcut of both blocks, and their stochastic depth."""

    drop: nn.Module | None

    def pairs(self) -> list[tuple[nn.Conv2d, nn.Module]]:
        """The convolutions with their norms."""
        block: Any = self
        pairs = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
        if hasattr(block, "conv3"):
            pairs.append((block.conv3, block.bn3))
        return pairs if block.downsample is None else [*pairs, tuple(block.downsample)]

    def shortcut(self, input: Tensor, scaled: ScaledWeights | None) -> Tensor:
        downsample = self.downsample  # type: ignore[attr-defined]
        return input if downsample is None else conv_norm(input, downsample[0], downsample[1], scaled)

    def join(self, output: Tensor, input: Tensor, scaled: ScaledWeights | None) -> Tensor:
        """The sum of residual and shortcut, after ReLU."""
        output = output if self.drop is None else self.drop(output)
        return output.add_(self.shortcut(input, scaled)).relu_()


class BasicBlock(_Residual, torchvision_resnet.BasicBlock):
    """Two 3x3 convolutions with a shortcut (ResNet-18 and 34)."""

    def forward(self, x: Tensor, scaled: ScaledWeights | None = None) -> Tensor:
        output = conv_norm(x, self.conv1, self.bn1, scaled).relu_()
        output = conv_norm(output, self.conv2, self.bn2, scaled)
        return self.join(output, x, scaled)


class Bottleneck(_Residual, torchvision_resnet.Bottleneck):
    """1x1, 3x3, 1x1 convolutions with a shortcut (ResNet-50 and 101)."""

    def forward(self, x: Tensor, scaled: ScaledWeights | None = None) -> Tensor:
        output = conv_norm(x, self.conv1, self.bn1, scaled).relu_()
        output = conv_norm(output, self.conv2, self.bn2, scaled).relu_()
        output = conv_norm(output, self.conv3, self.bn3, scaled)
        return self.join(output, x, scaled)


class Stage(nn.Sequential):
    """Blocks of one stride. The weights that norms are folded into are scaled together before the first of them."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C', H / stride, W / stride]."""
        scaled = scaled_weights([pair for block in self for pair in block.pairs()])  # type: ignore[operator]
        for block in self:
            input = block(input, scaled)
        return input


_BLOCKS: dict[int, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    18: (BasicBlock, [2, 2, 2, 2]),
    34: (BasicBlock, [3, 4, 6, 3]),
    50: (Bottleneck, [3, 4, 6, 3]),
    101: (Bottleneck, [3, 4, 23, 3]),
}


class ResNet(torchvision_resnet.ResNet, Backbone):
    """Maps C2..C5 of a ResNet.

    Args:
        depth: 18, 34, 50 or 101.
        weights: `torchvision/IMAGENET1K_V1` or `V2`, `timm/<name>` such as timm/resnet50.a1_in1k, `pip/<package>`, the path
            of a ResNet state dict, or None for random ones.
        norm: None = frozen with pretrained weights, batch without.
        frozen_stages: the first of stem, C2, C3, C4, C5 that are not trained; None = 2 with pretrained weights for three
            channels, else 0.
        stride_in_1x1: stride on a bottleneck's first convolution, as in the original weights of MSRA; else on its 3x3.
        norm_eps: added to the variance; 0 for weights that were trained without it.
        deformable: stages whose 3x3 convolutions (of a basic block the second) are deformable, such as [3, 4, 5].
        stochastic_depth: rate at which the last block is skipped in training; it grows linearly from 0 (Huang et al. 2016).
            Random draws are those of torch's generator, which training seeds from (seed, step, rank).
        in_channels: of the images. Pretrained weights of three are adapted (`widen_input`).

    Raises:
        ValueError: unknown depth or norm, stages out of range, or a deformable stage that is frozen.
    """

    conv1: nn.Conv2d
    bn1: nn.Module
    maxpool: nn.Module
    layer2: Any
    layer3: Any
    layer4: Any

    def __init__(
        self,
        depth: int = 50,
        weights: str | None = None,
        norm: Norm | None = None,
        frozen_stages: int | None = None,
        stride_in_1x1: bool = False,
        norm_eps: Amount = 1e-5,
        deformable: tuple[int, ...] = (),
        stochastic_depth: Decay = 0.0,
        in_channels: Count = 3,
    ) -> None:
        if depth not in _BLOCKS:
            raise ValueError(f"backbone.depth: expected one of {', '.join(map(str, _BLOCKS))}, got {depth}.")
        norm = norm or ("frozen" if weights else "batch")
        frozen_stages = frozen_stages if frozen_stages is not None else (2 if weights and in_channels == 3 else 0)
        if not 0 <= frozen_stages <= 5:
            raise ValueError(f"backbone.frozen_stages: expected 0 (none) to 5 (all), got {frozen_stages}.")
        kind, layers = _BLOCKS[depth]
        super().__init__(kind, layers, norm_layer=partial(make_norm, norm, eps=norm_eps))
        del self.fc, self.avgpool
        self.in_channels = in_channels
        if in_channels != 3:
            self.conv1 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's
        self.depth = depth
        self.weights = weights
        self.norm = norm
        self.frozen_stages = frozen_stages
        self.channels = tuple(width * kind.expansion for width in (64, 128, 256, 512))
        self.strides: tuple[int, ...] = (4, 8, 16, 32)
        if stride_in_1x1 and kind is Bottleneck:
            for layer in (self.layer2, self.layer3, self.layer4):
                layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
        self.deformable = deformable
        self._deform(deformable)
        blocks: list[Any] = [block for stage in self._stages() for block in stage.children()]
        for number, block in enumerate(blocks, start=1):
            rate = stochastic_depth * number / len(blocks)
            block.drop = StochasticDepth(rate, "row") if stochastic_depth else None
        for part in self._frozen_parts():
            part.requires_grad_(False)

    def _make_layer(self, *args: Any, **options: Any) -> Stage:
        return Stage(*super()._make_layer(*args, **options))

    def _deform(self, stages: tuple[int, ...]) -> None:
        for number in stages:
            if not 2 <= number <= 5 or number <= self.frozen_stages:
                raise ValueError(
                    f"backbone.deformable: expected stages from {max(2, self.frozen_stages + 1)} to 5, which are trained, got {number}."
                )
            for block in getattr(self, f"layer{number - 1}"):
                conv = block.conv2
                block.conv2 = DeformableConv2d(conv.in_channels, conv.out_channels, 3, conv.stride[0], bias=False)
                block.conv2.weight = conv.weight

    def truncate(self, num_maps: int) -> None:
        """Remove the stages after the first `num_maps` maps.

        Raises:
            ValueError: one of them is deformable, which would be lost.
        """
        if lost := [str(stage) for stage in self.deformable if stage > num_maps + 1]:
            raise ValueError(
                f"model.backbone.deformable: expected stages up to {num_maps + 1}, after which this neck cuts the backbone "
                f"off, got {', '.join(lost)}. Leave out the later ones, or choose a neck that reads them."
            )
        for number in range(num_maps + 1, len(self.channels) + 1):
            delattr(self, f"layer{number}")
        self.channels, self.strides = self.channels[:num_maps], self.strides[:num_maps]

    def parameters_by_stage(self) -> list[list[nn.Parameter]]:
        """The parameters of stem, C2, C3, ..."""
        stem = [*self.conv1.parameters(), *self.bn1.parameters()]
        return [stem, *(list(stage.parameters()) for stage in self._stages())]

    def _stages(self) -> list[nn.Module]:
        return [getattr(self, f"layer{number}") for number in range(1, len(self.channels) + 1)]

    def _frozen_parts(self) -> list[nn.Module]:
        return [self.conv1, self.bn1, *self._stages()][: self.frozen_stages + 1] if self.frozen_stages else []

    def train(self, mode: bool = True) -> ResNet:
        """Frozen stages keep their statistics: their norms stay in eval."""
        super().train(mode)
        for part in self._frozen_parts():
            part.eval()
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        """Normalized images [B, C, H, W] to [C2, C3, C4, C5], or the first of them."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.frozen_stages < 1):
            x = self.maxpool(conv_norm(x, self.conv1, self.bn1).relu_())
        outputs = []
        for number, stage in enumerate(self._stages(), start=2):
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.frozen_stages < number):
                x = stage(x)
            outputs.append(x)
        return outputs

    def expected_pixels(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Those of timm's weights if they are set, else ImageNet's."""
        return pixel_statistics(self.weights, f"ResNet({self.depth})") or super().expected_pixels()

    def check_pretrained(self) -> None:
        """Refuse what `load_pretrained` would refuse, as far as that is known without reading a file.

        Raises:
            ValueError: no such file, or random weights that would stay as they are.
        """
        if self.weights is None and (self.norm == "frozen" or self.frozen_stages):
            raise ValueError(
                f"model.backbone: expected trained weights under norm={self.norm} and frozen_stages={self.frozen_stages}, got "
                f"random ones. Set model.backbone.weights or init_from, or norm=batch and frozen_stages=0."
            )
        if self.weights is not None:
            check_weights(self.depth, self.weights)

    def load_pretrained(self) -> None:
        """Load the weights that `weights` names; None leaves the random ones.

        Raises:
            ValueError: no such file and none to be fetched, or a file that does not fit; or random weights that would
                stay as they are.
        """
        self.check_pretrained()
        if self.weights is None:
            return
        state = pretrained_state(self.depth, self.weights)
        left_out = ("fc.", *(f"layer{number}." for number in range(len(self.channels) + 1, 5)))
        state = {name: value for name, value in state.items() if not name.startswith(left_out)}
        if "conv1.weight" in state:
            state["conv1.weight"] = widen_input(state["conv1.weight"], self.in_channels)
        load_state(self, state, self.depth, self.weights)


def pretrained_state(depth: int, weights: str) -> dict[str, Tensor]:
    """Read the state dict of a ResNet: torchvision's, timm's, or that of a file.

    Args:
        depth: of the ResNet.
        weights: see `ResNet`.

    Raises:
        ValueError: there is none of that name, no such file, or none to be fetched.
    """
    if not weights.startswith(TORCHVISION):
        return read_state(weights, f"ResNet({depth})")
    return read_state_file(fetch(_torchvision_url(depth, weights), f"ResNet({depth})"), f"ResNet({depth})")


def check_weights(depth: int, weights: str) -> None:
    """Refuse weights that `pretrained_state` would refuse, as far as that is known without the network or reading a file."""
    if weights.startswith(TORCHVISION):
        _torchvision_url(depth, weights)
    elif weights == "imagenet":
        raise ValueError(f"model.backbone.weights: 'imagenet' is called {TORCHVISION}IMAGENET1K_V1 now. Use that name.")
    else:
        check_source(weights, f"ResNet({depth})")


def _torchvision_url(depth: int, weights: str) -> str:
    entries = get_model_weights(f"resnet{depth}")
    name = weights.removeprefix(TORCHVISION)
    if name not in entries.__members__:
        known = listed(f"{TORCHVISION}{entry}" for entry in entries.__members__ if entry != "DEFAULT")
        raise ValueError(f"ResNet({depth}): expected weights of torchvision called {known}, got '{weights}'.")
    return entries[name].url


def load_state(module: nn.Module, state: dict[str, Tensor], depth: int, weights: str) -> None:
    """Load the state dict of a ResNet, or of a part of it.

    Args:
        depth, weights: where the state is from, for messages.

    Raises:
        ValueError: it does not fit.
    """
    own, given = (
        {name: value.shape for name, value in tensors.items() if not name.endswith("num_batches_tracked")}
        for tensors in (module.state_dict(), state)
    )
    # predicted offsets of a deformable convolution are new, and start at zero
    faults = {
        "missing": [name for name in own if name not in given and OFFSETS not in name],
        "unexpected": [name for name in given if name not in own],
        "of another shape": [name for name in own if name in given and given[name] != own[name]],
    }
    if any(faults.values()):
        parts = (f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in faults.items() if names)
        raise ValueError(
            f"ResNet({depth}): weights '{weights}' do not fit: {', '.join(parts)}. "
            f"Give the weights of a ResNet-{depth} in torchvision's names."
        )
    module.load_state_dict(state, strict=False)
