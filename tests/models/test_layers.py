from __future__ import annotations

import copy
import io

import pytest
import torch
from compare import assert_close
from torch import nn

from fpn_det.composition import compose
from fpn_det.errors import is_user_facing
from fpn_det.models import layers
from fpn_det.models.layers import NORMS, ConvBlock, FixedBatchNorm2d, conv_norm, folded, make_norm, scaled_weights
from fpn_det.models.resnet import ResNet


def lively(norm: nn.Module) -> nn.Module:
    """With statistics and parameters that are not the identity."""
    generator = torch.Generator().manual_seed(0)
    for value in (*norm.parameters(), *norm.buffers()):
        if value.is_floating_point():
            value.data = torch.rand(value.shape, generator=generator) + 0.5
    return norm


@pytest.mark.parametrize("name", ["frozen", "fixed_statistics", "batch", "sync"])
def test_folded_norm_equals_unfolded(name: str):
    norm = lively(make_norm(name, 6)).eval()
    for bias in (True, False):
        conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=bias)
        input = torch.randn(2, 4, 9, 9)
        assert folded(norm) is not None
        expected = norm(conv(input))
        actual = conv_norm(input, conv, norm)
        assert_close(actual, expected, 1e-5)
        weight = torch.randn_like(expected)
        for mine, theirs in zip(
            torch.autograd.grad((actual * weight).sum(), list(conv.parameters())),
            torch.autograd.grad((expected * weight).sum(), list(conv.parameters())),
            strict=True,
        ):
            assert_close(mine, theirs, 1e-5)


def test_scale_and_shift_of_a_frozen_norm_are_computed_once_and_follow_its_buffers():
    norm, other = lively(make_norm("frozen", 6)), make_norm("frozen", 6)
    first = folded(norm)
    assert folded(norm)[0] is first[0]
    twin = copy.deepcopy(norm)
    twin.running_var.mul_(4)
    assert_close(folded(twin)[0], first[0] / 2, 1e-3)
    other.running_mean.fill_(7)
    other.load_state_dict(norm.state_dict())
    assert torch.equal(folded(other)[1], first[1])
    norm.load_state_dict(twin.state_dict())
    assert torch.equal(folded(norm)[0], folded(twin)[0])
    assert folded(norm.double())[0].dtype == torch.float64
    buffer = io.BytesIO()
    torch.save(norm, buffer)
    buffer.seek(0)
    assert torch.equal(folded(torch.load(buffer, weights_only=False))[0], folded(norm)[0])


@pytest.mark.parametrize("deformable", [(), (5,)])
def test_weights_scaled_together_give_the_same_bits(deformable: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    model = ResNet(18, norm="frozen", frozen_stages=2, deformable=deformable)
    norms = [lively(module) for module in model.modules() if isinstance(module, FixedBatchNorm2d)]

    def results(together: bool) -> list[torch.Tensor]:
        monkeypatch.setattr(layers, "_scales_together", lambda weight: together)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        maps = model(images)
        return [*maps, *torch.autograd.grad(sum(map.square().mean() for map in maps), weights)]

    images = torch.randn(2, 3, 64, 64)
    for _ in range(2):
        for mine, theirs in zip(results(True), results(False), strict=True):
            assert torch.equal(mine, theirs)
        with torch.no_grad():  # new weights and scales
            torch._foreach_mul_([*model.parameters(), *(norm.weight for norm in norms)], 1.01)


def test_weights_are_scaled_together_for_frozen_norms_alone(monkeypatch: pytest.MonkeyPatch):
    conv, frozen = nn.Conv2d(2, 3, 1), make_norm("frozen", 3)
    assert scaled_weights([(conv, frozen)]) is None  # on the CPU
    monkeypatch.setattr(layers, "_scales_together", lambda weight: True)
    assert set(scaled_weights([(conv, frozen)])) == {conv}
    for name in ("fixed_statistics", "batch", "group"):
        assert scaled_weights([(conv, make_norm(name, 3))]) is None
    frozen.foldable = False
    assert scaled_weights([(conv, frozen)]) is None


def test_norms_whose_statistics_move_are_not_folded():
    assert folded(nn.BatchNorm2d(4).train()) is None
    assert folded(make_norm("group", 4)) is None


def test_fixed_statistics_never_leave_eval():
    norm = make_norm("fixed_statistics", 4).train()
    before = norm.running_mean.clone()
    norm(torch.randn(2, 4, 3, 3) + 5)
    assert not norm.training and torch.equal(norm.running_mean, before)
    assert norm.weight.requires_grad


def test_sync_norm_alone_is_batch_norm():
    input = torch.randn(4, 6, 5, 5)
    mine, theirs = make_norm("sync", 6).train(), nn.BatchNorm2d(6).train()
    assert_close(mine(input), theirs(input), 1e-6)
    assert_close(mine.running_var, theirs.running_var, 1e-5)


def test_conv_block_has_a_bias_only_without_norm():
    assert ConvBlock(3, 4, 3)[0].bias is not None
    assert ConvBlock(3, 4, 3, "batch")[0].bias is None
    assert (ConvBlock(3, 4, 3, "batch", relu=True)(torch.randn(2, 3, 8, 8)) >= 0).all()


@pytest.mark.parametrize(("channels", "groups"), [(8, 8), (24, 24), (32, 32), (64, 32), (256, 32)])
def test_group_norm_has_32_groups_or_one_for_each_channel(channels: int, groups: int):
    assert make_norm("group", channels).num_groups == groups


@pytest.mark.parametrize(("channels", "near"), [(48, "32 or 64"), (100, "96 or 128")])
def test_group_norm_refuses_channels_that_do_not_divide(channels: int, near: str):
    settings = ["model.backbone.depth=18", "model.neck.norm=group", f"model.neck.channels={channels}"]
    words = f"^norm=group of a neck or box head: expected channels that 32 groups divide, got {channels}. Set its channels to {near}, "
    with pytest.raises(ValueError, match=words) as error:
        compose(settings).build_model(None)
    assert is_user_facing(error.value)


def test_make_norm_refuses_unknown_names():
    with pytest.raises(ValueError, match=f"expected one of {', '.join(NORMS)}, got 'layer'"):
        make_norm("layer", 3)


@pytest.mark.parametrize("name", ["batch", "sync"])
def test_batch_norm_refuses_a_single_value_per_channel(name: str):
    norm = make_norm(name, 4)
    with pytest.raises(
        ValueError, match="expected at least 2 values per channel for batch statistics, got 1. Use larger"
    ):
        norm(torch.randn(1, 4, 1, 1))
    assert norm.eval()(torch.randn(1, 4, 1, 1)).shape == (1, 4, 1, 1)
