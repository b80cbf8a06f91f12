from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fpn_det.evaluation.config import EvaluationConfig
from fpn_det.evaluation.detection_table import DetectionTable
from fpn_det.evaluation.outcomes import OUTCOME_NAMES
from fpn_det.structures import Annotations, Batch, ScoreThresholds, Targets
from fpn_det.visualization.panels import (
    GREY,
    OUTCOME_COLORS,
    SIDE,
    class_color,
    draw_batch,
    draw_boxes,
    draw_comparison,
    pick_images,
    to_rgb,
)


@pytest.fixture
def annotations(tmp_path) -> Annotations:
    """Four black images of 60 x 120 px; the second and the last have objects, the last also a crowd."""
    Image.new("RGB", (120, 60)).save(tmp_path / "image.png")
    path = str(tmp_path / "image.png").encode()
    boxes = torch.tensor([[12, 30, 48, 54], [60, 30, 90, 54], [0, 0, 40, 40]], dtype=torch.float64)
    return Annotations(
        image_ids=torch.arange(4),
        path_bytes=torch.tensor(list(path * 4), dtype=torch.uint8),
        path_offsets=torch.arange(5) * len(path),
        sizes=torch.tensor([[60, 120]] * 4),
        offsets=torch.tensor([0, 0, 1, 1, 3]),
        boxes=boxes,
        labels=torch.tensor([0, 1, 1]),
        iscrowd=torch.tensor([False, False, True]),
        area=torch.ones(3, dtype=torch.float64),
        annotation_ids=torch.arange(3),
        class_names=("cat", "dog"),
        category_ids=(1, 2),
    )


def test_draw_boxes_outlines_the_box():
    # 120 px become 480: a factor of 4. Pixel column 12 starts at 48, the box ends before column 192.
    pixels = np.zeros((60, 120, 3), np.uint8)
    drawn = draw_boxes(pixels, np.array([[12, 30, 48, 54]], np.float32), [0], ["cat 0.91"])
    color = class_color(0)
    assert drawn.shape == (240, SIDE, 3) and drawn.dtype == np.uint8
    frame = np.argwhere((drawn[120:] == color).all(-1))  # the plate with the text is above
    assert frame.min(0).tolist() == [0, 48] and frame.max(0).tolist() == [216 - 120 - 1, 192 - 1]
    plate = (drawn[:120] == color).all(-1)
    assert plate.sum() > 300 and plate.any(0).nonzero()[0].min() == 48
    assert pixels.max() == 0


def test_draw_boxes_keeps_labels_inside_the_image():
    pixels = np.zeros((100, 100, 3), np.uint8)
    boxes = np.array([[0, 0, 5, 5], [98, 0, 100, 100], [-10, -10, 300, 300]])
    drawn = draw_boxes(pixels, boxes, [0, 1, 2], ["a long name 0.50"] * 3)
    assert drawn.shape == (SIDE, SIDE, 3)
    letters = (drawn[:20, -60:] == 0).all(-1) & (drawn[:20, -60:].max() > 0)
    assert letters.any() and (drawn[:17, -40:] == class_color(1)).all(-1).any()


def test_draw_boxes_of_an_image_without_objects():
    assert draw_boxes(np.full((30, 10, 3), 7, np.uint8), np.zeros((0, 4)), [], []).shape == (SIDE, 160, 3)


def test_class_colors_are_fixed_and_distinct():
    colors = [class_color(label) for label in range(30)]
    assert colors == [class_color(label) for label in range(30)]
    assert len(set(colors)) == 30
    assert all(sum(color) > 300 for color in colors)


def test_pick_images_is_deterministic_and_prefers_objects(annotations):
    assert pick_images(annotations, 1) == [1]
    assert pick_images(annotations, 8) == [1, 3]


def shown_colors(panel: np.ndarray) -> set[str]:
    return {
        name for name, color in zip(OUTCOME_NAMES, OUTCOME_COLORS, strict=True) if (panel == color).all(-1).sum() > 50
    }


def test_draw_comparison_colors_outcomes(annotations):
    """The last image has a dog and a crowd of dogs. A cat is found on the dog, a dog in the crowd, and one beside all."""
    found = DetectionTable(
        np.array([3, 3, 3, 3, 1]),
        np.array([[60, 30, 90, 54], [60, 30, 90, 54], [2, 2, 30, 30], [95, 2, 118, 25], [12, 30, 48, 54]], np.float32),
        np.array([0.8, 0.1, 0.9, 0.7, 0.9], np.float32),
        np.array([0, 1, 1, 1, 0]),
    )
    thresholds, config = ScoreThresholds(0.5, {"cat": 0.4}), EvaluationConfig()
    left, right = np.split(draw_comparison(annotations, found, thresholds, 3, config), [SIDE], axis=1)
    assert shown_colors(left) == {"class confused", "ignored"}
    assert shown_colors(right) == {"class confused", "ignored", "false"}  # the dog of 0.1 is not drawn
    left, right = np.split(draw_comparison(annotations, found, thresholds, 1, config), [SIDE], axis=1)
    assert shown_colors(left) == shown_colors(right) == {"hit"}
    proposals = EvaluationConfig(target="proposals", max_dets=(100,))
    boxes = replace(found, labels=np.zeros(5, np.int64))
    left, _ = np.split(draw_comparison(annotations, boxes, None, 3, proposals), [SIDE], axis=1)
    assert shown_colors(left) == {"hit", "ignored"}  # a proposal has no class


def test_draw_comparison_of_an_image_without_objects_or_detections(annotations):
    picture = draw_comparison(annotations, DetectionTable.join([]), None, 0, EvaluationConfig())
    assert picture.shape[1] == 2 * SIDE + 6
    assert (picture[-1, 0] == 0).all() and (picture[-1, SIDE + 2] == GREY).all()
    left = draw_comparison(annotations, DetectionTable.join([]), None, 1, EvaluationConfig())[:, :SIDE]
    assert shown_colors(left) == {"missed"}


def test_draw_batch_shows_every_image_with_its_padding():
    pixels = torch.full((3, 3, 64, 96), 200, dtype=torch.uint8)
    pixels[1, :, :, 48:] = 0
    boxes = [torch.tensor([[8.0, 16, 40, 60]]), torch.zeros(0, 4), torch.tensor([[1.0, 1, 90, 60]])]
    labels = [torch.tensor([1]), torch.zeros(0).long(), torch.tensor([0])]
    sizes = torch.tensor([[64, 96], [64, 48], [64, 96]])
    batch = Batch(pixels, sizes, sizes, Targets.pad(boxes, labels), torch.arange(3))
    picture = draw_batch(batch, ["cat", "dog"])
    first, second = picture[:344, :SIDE], picture[:344, SIDE + 6 :]
    assert (first == class_color(1)).all(-1).any()
    assert not any((second == class_color(label)).all(-1).any() for label in (0, 1))
    assert (second[100, 100] == 200).all() and (second[100, 400] == 0).all()
    assert (picture[345:, :SIDE] == class_color(0)).all(-1).any()


@pytest.mark.parametrize("scale", [1.0, 50.0, 4000.0])
def test_pixels_of_floating_point_numbers_fill_the_range_whatever_their_scale(scale):
    values = torch.linspace(0, 1, 100).view(1, 10, 10)
    pixels = torch.cat([values, values / 2, values - 0.5]) * scale
    drawn = to_rgb(pixels)
    assert drawn.shape == (10, 10, 3) and drawn.dtype == np.uint8
    # from the 2nd to the 98th of 100 equal steps, channel by channel: the 50th is in the middle
    assert np.abs(drawn.reshape(100, 3)[50] - 128.0).max() <= 3
    assert (drawn.reshape(100, 3)[:2] == 0).all() and (drawn.reshape(100, 3)[98:] == 255).all()


def test_pixels_of_8_bits_are_drawn_as_they_are():
    pixels = torch.arange(3 * 4 * 5, dtype=torch.uint8).view(3, 4, 5)
    assert np.array_equal(to_rgb(pixels), pixels.permute(1, 2, 0).numpy())
