from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import TINY

from fpn_det.composition import compose
from fpn_det.models.detector import Detector
from fpn_det.structures import Batch, Targets
from fpn_det.training.config import TrainConfig
from fpn_det.visualization.pyramid_panels import (
    LEVEL_COLORS,
    NUM_BOXES,
    SIDE,
    PyramidInspection,
    draw_pyramid,
    heatmap,
    inspect_pyramid,
    outline_boxes,
)


@pytest.fixture(scope="module")
def settings(shapes_dataset) -> TrainConfig:
    return compose([*TINY, f"data.root={shapes_dataset}"])


@pytest.fixture(scope="module")
def batch(settings) -> Batch:
    """An image of 96 x 128 px."""
    annotations = settings.data.read_train_and_val(0).val
    (batch,) = settings.single_images(annotations, [1], 32, torch.device("cpu"))
    return batch


@pytest.fixture(scope="module")
def model(settings) -> Detector:
    torch.manual_seed(0)
    model = settings.build_model(6)
    torch.nn.init.normal_(model.rpn.head.objectness.weight, std=1.0)
    return model


@pytest.fixture(scope="module")
def levels(model, batch) -> PyramidInspection:
    return inspect_pyramid(model, batch)


def test_inspection_has_the_levels_of_the_pyramid(levels):
    assert levels.names == ["P2", "P3", "P4", "P5", "P6"] and levels.strides == (4, 8, 16, 32, 64)
    for each, stride in zip(levels.features, levels.strides, strict=True):
        assert each.shape == (96, 128)
        for y in range(0, 96, stride):  # one value in every cell, also where the image ends within it
            assert (each[y : y + stride, :stride] == each[y, 0]).all()
    assert all(0 <= each.min() and each.max() <= 1 for each in levels.objectness)


def test_anchors_proposals_and_rois_are_assigned_to_levels(levels, model, batch):
    with torch.no_grad():
        output = model.eval().rpn(model.pyramid(batch))
        proposals = model.propose(batch)
    match = model.rpn.matcher(batch.targets, output.anchors, output.inside)
    assert sum(map(len, levels.matched)) == int(match.positive.sum()) > 0
    best = proposals.boxes[0, :NUM_BOXES]
    shown = np.concatenate(levels.proposed)
    assert len(shown) == NUM_BOXES and {tuple(box) for box in shown.tolist()} == {tuple(box) for box in best.tolist()}
    for boxes, index in zip(levels.pooled, range(5), strict=True):
        assert (model.assigner(torch.from_numpy(boxes)) == index).all()
    assert sum(map(len, levels.pooled)) == NUM_BOXES


def test_inspection_restores_the_mode_of_the_model(model, batch):
    model.train()
    inspect_pyramid(model, batch)
    assert all(module.training for module in model.modules())


def test_a_sheet_has_a_row_for_each_kind_and_a_column_for_each_level(levels, batch, model):
    with_rois = draw_pyramid(levels, batch)
    without = draw_pyramid(inspect_pyramid(model.without_roi_head(), batch), batch)
    assert with_rois.shape[1] >= 6 * SIDE and with_rois.shape[0] * 4 == without.shape[0] * 6


def test_a_sheet_without_objects_has_no_row_of_matches(levels, batch, model):
    empty = replace(batch, targets=Targets.pad([torch.zeros(0, 4)], [torch.zeros(0, dtype=torch.int64)]))
    without = draw_pyramid(inspect_pyramid(model, empty), empty)
    assert draw_pyramid(levels, batch).shape[0] * 5 == without.shape[0] * 6


def test_shown_detections_are_those_of_the_detector_above_the_scores_of_their_classes(model, batch):
    with torch.no_grad():
        ((boxes, scores, labels),) = model.eval().detect(batch).images()
    least = [float(scores[labels == label].median()) if (labels == label).any() else 0.5 for label in range(6)]
    keep = scores >= torch.tensor(least)[labels]
    assert 0 < keep.sum() < len(keep)
    levels = inspect_pyramid(model, batch, least)
    shown = zip(np.concatenate(levels.detected).tolist(), levels.detected_labels, strict=True)
    expected = zip(boxes[keep].tolist(), labels[keep].tolist(), strict=True)
    assert sorted((label, box) for box, label in shown) == sorted((label, box) for box, label in expected)
    for each, index in zip(levels.detected, range(5), strict=True):
        assert (model.assigner(torch.from_numpy(each)) == index).all()


def test_heatmap_is_monotonic_and_keeps_cells_square():
    under = np.zeros((8, 8, 3), np.uint8)
    picture = heatmap(np.array([[0.0, 1.0], [2.0, 4.0]], np.float32), under).astype(int).sum(axis=2)
    assert (picture[:4, :4] == picture[0, 0]).all() and (picture[4:, 4:] == picture[7, 7]).all()
    assert picture[0, 0] < picture[0, 7] < picture[7, 0] < picture[7, 7]


def test_outlines_have_the_given_colors():
    picture = outline_boxes(
        np.full((20, 20, 3), 100, np.uint8), np.array([[2.0, 3.0, 10.0, 12.0]]), np.array(LEVEL_COLORS[:1])
    )
    assert tuple(picture[3, 2]) == tuple(picture[11, 9]) == LEVEL_COLORS[0]
    assert (picture[5, 5] == 45).all()
