from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from compare import assert_close

from fpn_det.interop.conventions import TorchvisionLevelAssigner
from fpn_det.models.roi_align import LevelAssigner, Neighborhoods, RoIAlign
from fpn_det.structures import Pyramid

STRIDES = (4, 8, 16, 32)


def random_pyramid(canvas: tuple[int, int] = (128, 192), channels: int = 5, images: int = 2) -> Pyramid:
    generator = torch.Generator().manual_seed(0)
    levels = [
        torch.randn(images, channels, -(-canvas[0] // s), -(-canvas[1] // s), generator=generator, requires_grad=True)
        for s in (*STRIDES, 64)
    ]
    return Pyramid(levels, (*STRIDES, 64), torch.tensor([canvas] * images))


def boxes_of_all_sizes(canvas: tuple[int, int], number: int, images: int = 2) -> torch.Tensor:
    """Some reach beyond the canvas, some have no area."""
    generator = torch.Generator().manual_seed(1)
    center = torch.rand(images, number, 2, generator=generator) * torch.tensor([canvas[1], canvas[0]])
    half = torch.exp(torch.rand(images, number, 2, generator=generator) * 5.5) / 2
    half[:, 0] = 0
    return torch.cat([center - half, center + half], dim=2)


def test_level_assigner_at_the_limits():
    assign = LevelAssigner(STRIDES)
    sides = torch.tensor([0, 111.999, 112, 112.00001, 223.9999, 224, 447.9999, 448, 5000])
    boxes = torch.stack([torch.zeros(9), torch.zeros(9), sides, sides], dim=1)
    assert (assign(boxes) + 2).tolist() == [2, 2, 3, 3, 3, 4, 5, 5, 5]  # FPN eq. 1 with the peers' epsilon
    outside = TorchvisionLevelAssigner(STRIDES)
    assert (outside(boxes) + 2).tolist() == [2, 2, 3, 3, 4, 4, 5, 5, 5]  # torchvision's


def test_level_assigner_refuses_strides_with_gaps():
    with pytest.raises(ValueError, match="double from level to level"):
        LevelAssigner([4, 16])


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [1, 2, 3])
def test_roi_align_table_equals_torchvision_operator(aligned: bool, sampling_ratio: int):
    boxes = boxes_of_all_sizes((128, 192), 60)
    results = []
    for method in ("table", "torchvision"):
        pyramid = random_pyramid()
        pooled = RoIAlign(STRIDES, sampling_ratio=sampling_ratio, aligned=aligned, method=method)(pyramid, boxes)
        weight = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(2))
        results.append((pooled, *torch.autograd.grad((pooled * weight).sum(), pyramid.levels[:4])))
    for mine, oracle in zip(*results, strict=True):
        assert_close(mine, oracle, 3e-5)


@pytest.mark.parametrize("stride", [4, 16, 32])
def test_roi_align_of_a_single_level_equals_torchvision_operator(stride: int):
    level = torch.randn(2, 5, 128 // stride, 192 // stride, generator=torch.Generator().manual_seed(0))
    pyramid = Pyramid([level], (stride,), torch.tensor([[128, 192]] * 2))
    boxes = boxes_of_all_sizes((128, 192), 60)
    table, oracle = (RoIAlign((stride,), method=method)(pyramid, boxes) for method in ("table", "torchvision"))
    assert_close(table, oracle, 3e-5)


def test_roi_align_sums_thousands_of_gradients_in_one_cell():
    pyramid = random_pyramid(images=1)
    boxes = torch.tensor([10.0, 10.0, 17.0, 17.0]).repeat(1, 2000, 1)
    grads = []
    for method in ("table", "torchvision"):
        pooled = RoIAlign(STRIDES, method=method)(pyramid, boxes)
        grads.append(torch.autograd.grad(pooled.sum(), pyramid.levels[0])[0])
    assert_close(grads[0], grads[1], 1e-4)
    assert grads[0].sum() == pytest.approx(2000 * 49 * 5, rel=1e-4)  # every bin is a mean of cells


def test_roi_align_table_keeps_float32_under_autocast():
    pyramid = random_pyramid()
    boxes = boxes_of_all_sizes((128, 192), 20)
    expected = RoIAlign(STRIDES)(pyramid, boxes)
    with torch.autocast("cpu", torch.bfloat16):
        pooled = RoIAlign(STRIDES)(pyramid, boxes)
    assert pooled.dtype == torch.float32 and torch.equal(pooled, expected)


def test_roi_align_refuses_what_the_table_cannot_do():
    with pytest.raises(ValueError, match=r"pooler\.method=torchvision"):
        RoIAlign(STRIDES, sampling_ratio=0)
    pooled = RoIAlign(STRIDES, sampling_ratio=0, method="torchvision")(
        random_pyramid(), boxes_of_all_sizes((128, 192), 3)
    )
    assert pooled.shape == (6, 5, 7, 7)


def test_roi_align_of_one_level_is_torchvisions():
    pyramid = random_pyramid(images=1)
    box = torch.tensor([[[8.0, 12.0, 40.0, 60.0]]])
    expected = torchvision.ops.roi_align(pyramid.levels[0], [box[0]], 7, 1 / 4, 2, aligned=True)
    assert_close(RoIAlign(STRIDES)(pyramid, box), expected, 1e-5)


def test_neighborhoods_are_what_a_convolution_sees():
    pyramid = random_pyramid()
    weight = torch.randn(7, 5, 3, 3)
    dense = torch.cat([F.conv2d(level, weight, padding=1).flatten(2) for level in pyramid.levels], dim=2)  # [B, 7, N]
    everywhere = torch.arange(dense.shape[2]).repeat(2, 1)
    sparse = F.linear(Neighborhoods()(pyramid, everywhere), weight.permute(0, 2, 3, 1).flatten(1))
    assert_close(sparse, dense.transpose(1, 2), 1e-5)
