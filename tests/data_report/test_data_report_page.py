"""Crops and advice of the data report."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import SCRATCH
from torchvision.ops import box_iou

from fpn_det.composition import compose
from fpn_det.data_report.anchor_coverage import measure_coverage
from fpn_det.data_report.page import CROP, LEAST_VIEW, RED, _levels, _sizes, _with_marked_box, _zoomed, anchor_advice
from fpn_det.structures import Annotations, pack_paths


@pytest.mark.parametrize("box", [(10.0, 20.0, 14.0, 23.0), (63.0, 47.0, 64.0, 48.0), (5.0, 5.0, 5.0, 5.0)])
def test_crop_shows_the_object_inside_its_red_frame(box):
    pixels = np.zeros((48, 64, 3), np.uint8)
    x1, y1, x2, y2 = map(int, box)
    pixels[y1:y2, x1:x2] = (0, 255, 0)
    crop = np.asarray(_zoomed(pixels, box))
    assert crop.shape == (CROP, CROP, 3)
    side = CROP / LEAST_VIEW
    green_area = (
        int((crop == (0, 255, 0)).all(-1).sum()) / side**2
    )  # the edges of pixels are rounded to those of the crop
    assert abs(green_area - (x2 - x1) * (y2 - y1)) <= 0.25 * (x2 - x1) * (y2 - y1)
    frame = np.argwhere((crop == RED).all(-1))
    green = np.argwhere((crop == (0, 255, 0)).all(-1))
    assert len(frame) and (not len(green) or ((frame.min(0) <= green.min(0)) & (green.max(0) <= frame.max(0))).all())


def test_only_a_box_that_leaves_the_image_gets_a_border():
    image = Image.new("RGB", (80, 40))
    assert _with_marked_box(image, (10, 10, 20, 20), 1).size == (80, 40)
    assert _with_marked_box(image, (-30, 10, 20, 20), 1).size == (100, 60)


@pytest.fixture
def coverage_of(tmp_path):
    """Coverage of square objects of these sides, one on each image of 256 x 256 px."""
    settings = compose([*SCRATCH, "model.neck.channels=32"])
    model = settings.build_model(1)
    transform = settings.data.transforms(train=False)

    def measure(sides, tile=None):
        count = len(sides)
        first = torch.tensor([[100.0, 100.0]] * count, dtype=torch.float64)
        annotations = Annotations.without_objects(["a.jpg"] * count, [(256, 256)] * count, ["cat"], [1])
        annotations = replace(
            annotations,
            **pack_paths(["a.jpg"] * count),
            offsets=torch.arange(count + 1),
            boxes=torch.cat([first, first + torch.tensor(sides, dtype=torch.float64)[:, None]], dim=1),
            labels=torch.zeros(count, dtype=torch.int64),
            iscrowd=torch.zeros(count, dtype=torch.bool),
            area=torch.ones(count, dtype=torch.float64),
            annotation_ids=torch.arange(count),
        )
        return measure_coverage(annotations, model, transform, tile), model

    return measure


def test_advice_names_anchors_that_fit_and_their_true_share(coverage_of):
    coverage, model = coverage_of([22, 23, 45, 46, 90] * 4)  # between the sizes 16, 32, 64, ...
    assert coverage.advice is not None and coverage.advice.setting in anchor_advice(coverage)
    words = [*SCRATCH, "model.neck.channels=32", coverage.advice.setting]
    anchors = compose(words).build_model(1).rpn.anchors
    side = int(coverage.boxes[0, 2]) * 4 // model.stride * model.stride
    every = anchors([(side // stride, side // stride) for stride in anchors.strides])
    best = box_iou(torch.from_numpy(coverage.boxes), every.double()).amax(dim=1)
    share = float((best < coverage.positive_iou).double().mean())
    assert abs(share - coverage.advice.below_positive) <= 0.05 < 0.2 < (coverage.ious < 0.7).mean()


def test_advice_is_given_only_where_it_is_true(coverage_of):
    one, _ = coverage_of([16.0] * 10)
    several, _ = coverage_of([16.0, 64.0, 128.0, 200.0, 250.0])
    assert "hardly uses" in _levels(one) and len(set(several.levels.tolist())) > 1
    assert "hardly uses" not in _levels(several)


def test_advice_says_that_it_is_of_whole_images_if_there_are_tiles(coverage_of):
    whole, tiled = (anchor_advice(coverage_of([22.0] * 10, tile)[0]) for tile in (None, 128))
    assert whole.startswith("Of 10 objects, ") and tiled.startswith("Of 10 objects in whole images, without tiles, ")
    # anchors for whole images would not fit the objects of tiles
    assert "model.rpn.anchors.sizes" in whole and "model.rpn.anchors.sizes" not in tiled and "were tried" not in tiled


def test_charts_of_whole_images_ask_for_no_larger_sides_if_tiles_show_the_objects_larger(coverage_of):
    whole, tiled = (coverage_of([4.0] * 10, tile)[0] for tile in (None, 128))
    for chart, advice in (
        (_sizes, "100% of the objects have less than half"),
        (_levels, "hardly uses the other levels"),
    ):
        assert advice in chart(whole) and "without tiles" not in chart(whole)
        assert "data.eval_transforms.resize.sides" not in chart(tiled) and "in whole images, without tiles" in chart(
            tiled
        )
