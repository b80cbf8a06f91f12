from __future__ import annotations

import math

import pytest
import torch
import torchvision
from compare import assert_close

from fpn_det.boxes import (
    MAX_LOG_SCALE,
    BoxCoder,
    box_iou,
    clip_boxes,
    xywh_to_xyxy,
    xyxy_to_xywh,
)


def random_boxes(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(*shape, 2, generator=generator) * 300
    return torch.cat([corners, corners + 1 + torch.rand(*shape, 2, generator=generator) * 200], dim=-1)


def test_box_iou_of_four_boxes_by_hand():
    boxes = torch.tensor([[0.0, 0, 10, 10]])
    others = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [10, 0, 20, 10], [2, 2, 4, 7]])
    # same: 1; half overlap: 50 / 150; touching: 0; inside: 10 / 100
    assert_close(box_iou(boxes, others), torch.tensor([[1, 1 / 3, 0, 0.1]]), 1e-5)


def test_box_iou_equals_torchvision():
    boxes, others = random_boxes(3, 50), random_boxes(3, 70, seed=1)
    for mine, a, b in zip(box_iou(boxes, others), boxes, others, strict=True):
        assert_close(mine, torchvision.ops.box_iou(a, b), 1e-6)


def test_box_iou_without_area_is_zero():
    points = torch.zeros(1, 2, 4)
    assert (box_iou(points, points) == 0).all()
    assert box_iou(torch.zeros(1, 0, 4), points).shape == (1, 0, 2)


def test_xywh_round_trip():
    boxes = random_boxes(20).double()
    assert_close(xywh_to_xyxy(xyxy_to_xywh(boxes)), boxes, 1e-12)


def test_encode_deltas_by_hand():
    anchor, box = torch.tensor([0.0, 0, 10, 20]), torch.tensor([10.0, 0, 30, 10])
    # centers (5, 10) and (20, 5); widths 10 and 20, heights 20 and 10
    expected = torch.tensor([10 * 1.5, 10 * -0.25, 5 * math.log(2), 5 * math.log(0.5)])
    assert_close(BoxCoder((10, 10, 5, 5)).encode(box, anchor), expected, 1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_decode_inverts_encode(seed: int):
    boxes, anchors = random_boxes(100, seed=seed), random_boxes(100, seed=seed + 100)
    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    ratio = (boxes[:, 2:] - boxes[:, :2]) / (anchors[:, 2:] - anchors[:, :2])
    fits = (ratio < math.exp(MAX_LOG_SCALE)).all(1)
    assert fits.sum() > 50
    decoded = coder.decode(coder.encode(boxes, anchors), anchors)
    assert_close(decoded[fits], boxes[fits], 1e-5)


def test_decode_deltas_limits_growth():
    anchor = torch.tensor([0.0, 0, 16, 16])
    box = BoxCoder().decode(torch.tensor([0.0, 0, 100, 100]), anchor)
    assert_close(box[2:] - box[:2], torch.tensor([1000.0, 1000.0]), 1e-5)  # 16 * 1000 / 16


def test_clip_boxes_to_each_images_own_size():
    boxes = torch.tensor([[[-5.0, -5, 500, 500]]] * 2)
    clipped = clip_boxes(boxes, torch.tensor([[100, 200], [300, 50]]))
    assert clipped.tolist() == [[[0, 0, 200, 100]], [[0, 0, 50, 300]]]
