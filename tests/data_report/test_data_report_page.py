"""Charts, map, crops and advice of the data report."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from compare import assert_close
from PIL import Image
from torchvision.ops import box_iou

from fpn_det.composition import compose
from fpn_det.data_report.anchor_coverage import measure_coverage
from fpn_det.data_report.charts import bar, bars_are_log, coverage_map, linear_ticks, log_ticks
from fpn_det.data_report.page import CROP, LEAST_VIEW, RED, _levels, _with_marked_box, _zoomed, anchor_advice
from fpn_det.structures import Annotations, pack_paths


@pytest.mark.parametrize(
    ("ticks", "low", "high", "expected"),
    [
        (log_ticks, 11.3, 300.0, [16, 32, 64, 128, 256]),
        (log_ticks, 0.24, 4.1, [0.25, 0.5, 1, 2, 4]),
        (log_ticks, 30.0, 61.0, [30, 35, 40, 45, 50, 55, 60]),
        (linear_ticks, -0.01, 1.02, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (linear_ticks, 0.28, 0.97, [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
    ],
)
def test_ticks_are_round(ticks, low, high, expected):
    assert_close(torch.tensor(ticks(low, high)).double(), torch.tensor(expected).double(), 1e-6)


def test_ticks_of_any_range_are_few_and_inside():
    random = np.random.default_rng(0)
    for low, factor in zip(10 ** random.uniform(-2, 4, 200), 1 + 10 ** random.uniform(-2, 4, 200), strict=True):
        for ticks in (linear_ticks, log_ticks):
            found = ticks(low, low * factor)
            assert 3 <= len(found) <= 21 and low <= found[0] and found[-1] <= low * factor


def test_map_counts_the_boxes_over_every_cell():
    random = np.random.default_rng(1)
    sizes = np.array([(60, 120)] * 40)
    first = random.uniform(0, (100, 45), (40, 2))
    boxes = np.concatenate([first, first + random.uniform(1, (20, 15), (40, 2))], axis=1)
    share, aspect = coverage_map(boxes, sizes)
    assert aspect == 0.5 and share.shape == (24, 48)
    for row, column in random.integers(0, (24, 48), (200, 2)):  # cells of 2.5 px
        x, y = column * 2.5, row * 2.5
        over = (boxes[:, 0] < x + 2.5) & (boxes[:, 2] > x) & (boxes[:, 1] < y + 2.5) & (boxes[:, 3] > y)
        assert_close(torch.tensor(share[row, column]), torch.tensor(over.mean()), 1e-9)


def test_bars_show_rare_classes():
    assert bars_are_log([1, 100]) and not bars_are_log([2, 199, 0]) and not bars_are_log([])
    assert "--share:0.1000" in bar(10, 100) and "--share:1.0000" in bar(100, 100, log=True)
    assert "--share:0.1502" in bar(1, 100, log=True)  # log 2 / log 101


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
    settings = compose(["experiment=demo", "model.backbone.depth=18", "model.neck.channels=32"])
    model = settings.build_model(1)
    transform = settings.data.transforms(train=False)

    def measure(sides):
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
        return measure_coverage(annotations, model, transform), model

    return measure


def test_advice_names_anchors_that_fit_and_their_true_share(coverage_of):
    coverage, model = coverage_of([22, 23, 45, 46, 90] * 4)  # between the sizes 16, 32, 64, ...
    assert coverage.advice is not None and coverage.advice.setting in anchor_advice(coverage)
    words = ["experiment=demo", "model.backbone.depth=18", "model.neck.channels=32", coverage.advice.setting]
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
