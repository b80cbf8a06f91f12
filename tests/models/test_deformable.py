"""Deformable convolution and stochastic depth of a ResNet against forward passes written out."""

from __future__ import annotations

import pytest
import torch
from compare import assert_close
from torch import Tensor
from torch.nn import functional as F

from fpn_det.models.layers import DeformableConv2d, conv_norm
from fpn_det.models.resnet import ResNet, load_state


def sampled(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Bilinear values [B, C, ...] of maps [B, C, H, W] at points [B, ...]; zero outside."""
    height, width = image.shape[2:]
    grid = torch.stack([2 * (x + 0.5) / width - 1, 2 * (y + 0.5) / height - 1], dim=-1)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def written_out(input: Tensor, conv: DeformableConv2d) -> Tensor:
    """Sum over the nine taps of weight * factor * value at the shifted place (eq. 1 of Zhu et al. 2019)."""
    stride = conv.stride[0]
    prediction = F.conv2d(input, conv.offset.weight, conv.offset.bias, stride, 1)
    rows = torch.arange(prediction.shape[2])[:, None] * stride - 1.0
    columns = torch.arange(prediction.shape[3])[None] * stride - 1.0
    output = 0.0
    for tap in range(9):
        y = rows + tap // 3 + prediction[:, 2 * tap]
        x = columns + tap % 3 + prediction[:, 2 * tap + 1]
        values = sampled(input, y, x) * prediction[:, 18 + tap, None].sigmoid()
        output = output + torch.einsum("oc,bchw->bohw", conv.weight[:, :, tap // 3, tap % 3], values)
    return output


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """Offsets of about a cell."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, DeformableConv2d):
            torch.nn.init.normal_(module.offset.weight, std=0.05)
            torch.nn.init.normal_(module.offset.bias, std=0.5)
    return model


@pytest.mark.parametrize("stride", [1, 2])
def test_deformable_convolution_equals_the_sum_over_its_taps(stride: int):
    torch.manual_seed(0)
    conv = moved(DeformableConv2d(4, 6, 3, stride, bias=False))
    input = torch.randn(2, 4, 9, 12)
    assert_close(conv(input), written_out(input, conv), 1e-5)


def test_without_offsets_it_is_half_a_convolution():
    torch.manual_seed(0)
    conv, input = DeformableConv2d(4, 6, 3, 2, bias=False), torch.randn(2, 4, 8, 12)
    assert_close(conv(input), 0.5 * F.conv2d(input, conv.weight, None, 2, 1), 1e-5)


@pytest.mark.parametrize("depth", [18, 50])
def test_a_deformable_resnet_equals_its_forward_written_out(depth: int):
    torch.manual_seed(0)
    model = moved(ResNet(depth, norm="frozen", frozen_stages=0, deformable=(4, 5))).eval()
    input = torch.randn(1, 3, 64, 64)
    x, maps = model.maxpool(model.bn1(model.conv1(input)).relu()), []
    for number in range(1, 5):
        for block in getattr(model, f"layer{number}"):
            assert isinstance(block.conv2, DeformableConv2d) == (number >= 3)
            convs = [
                (getattr(block, f"conv{n}"), getattr(block, f"bn{n}"))
                for n in range(1, 4)
                if hasattr(block, f"conv{n}")
            ]
            output = x
            for place, (conv, norm) in enumerate(convs):
                output = norm(written_out(output, conv) if isinstance(conv, DeformableConv2d) else conv(output))
                output = output.relu() if place < len(convs) - 1 else output
            x = (output + (x if block.downsample is None else block.downsample(x))).relu()
        maps.append(x)
    for own, expected in zip(model(input), maps, strict=True):
        assert_close(own, expected, 1e-4)


def test_a_folded_norm_changes_nothing():
    torch.manual_seed(0)
    model = moved(ResNet(18, norm="frozen", frozen_stages=0, deformable=(5,)))
    block, input = model.layer4[1], torch.randn(1, 512, 4, 4)
    block.bn2.weight.uniform_(0.5, 2)
    block.bn2.running_mean.normal_()
    assert_close(conv_norm(input, block.conv2, block.bn2), block.bn2(block.conv2(input)), 1e-5)


def test_weights_of_a_plain_resnet_are_taken_over():
    plain, deformable = ResNet(18), ResNet(18, deformable=(3, 4, 5))
    load_state(deformable, plain.state_dict(), 18, "test")
    assert torch.equal(deformable.layer2[0].conv2.weight, plain.layer2[0].conv2.weight)
    assert not deformable.layer2[0].conv2.offset.weight.any()


@pytest.mark.parametrize(("stages", "frozen"), [((1,), 0), ((6,), 0), ((2, 3), 2)])
def test_stages_that_cannot_be_deformable_are_refused(stages, frozen):
    with pytest.raises(ValueError, match=r"backbone.deformable: expected stages from \d to 5, which are trained"):
        ResNet(18, frozen_stages=frozen, deformable=stages)


def test_stochastic_depth_grows_with_depth_and_keeps_the_mean():
    plain, model = (
        ResNet(18, norm="frozen", frozen_stages=0),
        ResNet(18, norm="frozen", frozen_stages=0, stochastic_depth=0.4),
    )
    model.load_state_dict(plain.state_dict())
    rates = [block.drop.p for number in range(1, 5) for block in getattr(model, f"layer{number}")]
    assert rates == pytest.approx([0.05 * number for number in range(1, 9)])
    input = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(input)[3], plain.eval()(input)[3])
    torch.manual_seed(0)
    block, x = model.layer1[1].train(), torch.randn(4000, 64, 2, 2).relu()
    residual = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
    output = block(x)
    skipped = (output == x.relu()).all(dim=(1, 2, 3))
    assert skipped.float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert_close(output[~skipped], (x + residual / 0.9).relu()[~skipped], 1e-5)
