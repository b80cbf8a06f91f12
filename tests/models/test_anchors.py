from __future__ import annotations

import pytest
import torch
from compare import assert_close
from torchvision.models.detection.anchor_utils import AnchorGenerator as TorchvisionAnchors
from torchvision.models.detection.image_list import ImageList

from fpn_det.interop.conventions import RoundedAnchors
from fpn_det.models.anchors import AnchorGenerator


def test_anchors_of_two_by_two_cells_by_hand():
    anchors = AnchorGenerator(strides=[16], sizes=[32], ratios=[0.5, 1.0])([(2, 2)])
    # area 32^2; ratio h / w = 0.5: w = 32 * sqrt(2) = 45.2548, h = 22.6274
    wide, square = [-22.6274, -11.3137, 22.6274, 11.3137], [-16.0, -16, 16, 16]
    expected = []
    for y, x in ((0, 0), (0, 16), (16, 0), (16, 16)):
        for box in (wide, square):
            expected.append([box[0] + x, box[1] + y, box[2] + x, box[3] + y])
    assert_close(anchors, torch.tensor(expected), 1e-5)


def test_anchors_offset_moves_by_parts_of_a_stride():
    plain, moved = (AnchorGenerator([8, 16], [32, 64], offset=offset)([(3, 4), (2, 2)]) for offset in (0.0, 0.5))
    assert_close(moved[: 3 * 4 * 3] - plain[: 3 * 4 * 3], torch.full((36, 4), 4.0), 1e-5)
    assert_close(moved[3 * 4 * 3 :] - plain[3 * 4 * 3 :], torch.full((12, 4), 8.0), 1e-5)


@pytest.mark.parametrize("sizes", [[[32], [64], [128]], [[32, 40], [64, 80], [128, 160]]])
@pytest.mark.parametrize("canvas", [(64, 96), (96, 160), (800, 1088)])
def test_anchors_equal_torchvision_when_rounded_and_inferred(sizes: list, canvas: tuple[int, int]):
    shapes = [(-(-canvas[0] // s), -(-canvas[1] // s)) for s in (4, 8, 64)]
    mine = RoundedAnchors([4, 8, 64], sizes)(shapes)
    oracle = TorchvisionAnchors(tuple(map(tuple, sizes)), ((0.5, 1.0, 2.0),) * 3)
    images = ImageList(torch.zeros(1, 3, *canvas), [canvas])
    assert torch.equal(mine, oracle(images, [torch.zeros(1, 1, *shape) for shape in shapes])[0])


def test_anchors_put_all_sizes_on_a_single_level():
    assert AnchorGenerator([16], [32, 64, 128, 256, 512]).num_per_cell == 15


def test_anchors_refuse_sizes_that_do_not_fit_the_levels():
    with pytest.raises(ValueError, match="each of 3 levels"):
        AnchorGenerator([4, 8, 16], [32, 64])
