from __future__ import annotations

import pytest
import torch
import torchvision
from compare import assert_close
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from fpn_det.models.necks.fpn import FPN


@pytest.mark.parametrize("norm", [None, "batch"])
def test_fpn_equals_torchvision(norm: str | None):
    layer = torch.nn.BatchNorm2d if norm else None
    theirs = torchvision.ops.FeaturePyramidNetwork([8, 16, 32], 12, LastLevelMaxPool(), layer).eval()
    mine = FPN([8, 16, 32], [4, 8, 16], channels=12, norm=norm).eval()
    mine.load_state_dict(dict(zip(mine.state_dict(), theirs.state_dict().values(), strict=True)))
    # odd sides: upsampling goes to the lateral's size
    maps = [torch.randn(2, 8, 17, 22), torch.randn(2, 16, 9, 11), torch.randn(2, 32, 5, 6)]
    expected = theirs({str(i): m for i, m in enumerate(maps)})
    for got, want in zip(mine(maps), expected.values(), strict=True):
        assert_close(got, want, 1e-5)
    assert mine.strides == (4, 8, 16, 32) and mine.channels == 12


def test_fpn_starts_within_the_bound_of_its_fan_in():
    neck = FPN([2048], [32], channels=256)
    weight = neck.lateral[0].weight
    bound = (3 / 2048) ** 0.5  # kaiming_uniform with a = 1
    assert 0.95 * bound < weight.abs().max() <= bound
    assert (neck.lateral[0].bias == 0).all()


def test_fpn_without_the_extra_level():
    assert FPN([8, 16], [4, 8], 12, extra_levels=0).strides == (4, 8)
