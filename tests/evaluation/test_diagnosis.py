"""Diagnosis of detections with one deliberate mistake each."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fpn_det.evaluation.coco import score
from fpn_det.evaluation.config import EvaluationConfig
from fpn_det.evaluation.detection_table import DetectionTable
from fpn_det.evaluation.diagnosis import ABOUT_ZERO, diagnose
from fpn_det.structures import Annotations

NUM_IMAGES, PER_IMAGE, NAMES = 20, 4, ("ant", "bee", "cat", "dog")
HEIGHT, WIDTH = 480, 640


@pytest.fixture(scope="module")
def annotations() -> Annotations:
    """Four objects on each image, one of each class, of 20 to 120 px."""
    random = np.random.default_rng(0)
    corners = random.uniform((0, 0), (WIDTH - 125, HEIGHT - 125), (NUM_IMAGES * PER_IMAGE, 2))
    boxes = torch.from_numpy(np.hstack([corners, corners + random.uniform(20, 120, corners.shape)]))
    heights = torch.tensor([HEIGHT, WIDTH] * (NUM_IMAGES // 2))
    return Annotations(
        image_ids=torch.arange(NUM_IMAGES) + 100,
        path_bytes=torch.zeros(0, dtype=torch.uint8),
        path_offsets=torch.zeros(NUM_IMAGES + 1, dtype=torch.int64),
        sizes=torch.stack([heights, HEIGHT + WIDTH - heights], dim=1),
        offsets=torch.arange(NUM_IMAGES + 1) * PER_IMAGE,
        boxes=boxes,
        labels=torch.arange(PER_IMAGE).repeat(NUM_IMAGES),
        iscrowd=torch.zeros(len(boxes), dtype=torch.bool),
        area=(boxes[:, 2:] - boxes[:, :2]).prod(dim=1),
        annotation_ids=torch.arange(len(boxes)) + 1,
        class_names=NAMES,
        category_ids=(1, 2, 3, 4),
    )


def found(annotations: Annotations, change=lambda boxes, sizes: boxes, rename=lambda labels: labels) -> DetectionTable:
    """Detect every object with small box noise, after `change` of boxes and `rename` of labels, plus as many false positives of low score."""
    random = np.random.default_rng(1)
    images = np.repeat(np.arange(NUM_IMAGES), PER_IMAGE)
    boxes = annotations.boxes.numpy() + random.normal(0, 1, (len(images), 4))
    false = random.uniform(0, 300, (len(images), 2))
    boxes = np.vstack([boxes, np.hstack([false, false + random.uniform(20, 120, false.shape)])])
    table = DetectionTable(
        np.concatenate([images, images]),
        change(boxes, np.tile(annotations.sizes.numpy()[images], (2, 1))),
        np.concatenate([random.uniform(0.6, 0.9, len(images)), random.uniform(0.05, 0.1, len(images))]),
        rename(np.tile(annotations.labels.numpy(), 2)),
    )
    return DetectionTable.join([table])


def causes(annotations: Annotations, detections: DetectionTable) -> list[str]:
    evaluation = score(annotations, detections, np.arange(NUM_IMAGES), EvaluationConfig())
    assert evaluation.metrics["AP"] is not None and evaluation.metrics["AP"] < 0.15
    return diagnose(annotations, detections, np.arange(NUM_IMAGES))


def test_diagnose_reports_permuted_classes(annotations):
    (cause,) = causes(annotations, found(annotations, rename=lambda labels: (labels + 1) % 4))
    assert "class mapping is wrong" in cause and "AP50 is 1.00, with classes 0.00" in cause
    assert "'bee' is 'ant', 'cat' is 'bee', 'dog' is 'cat'" in cause


def test_diagnose_reports_labels_off_by_one(annotations):
    without_last = found(annotations)
    without_last = without_last.take(np.flatnonzero(without_last.labels < 3))
    table = DetectionTable(without_last.images, without_last.boxes, without_last.scores, without_last.labels + 1)
    (cause,) = causes(annotations, table)
    assert "Labels are off by 1." in cause


def test_diagnose_reports_a_single_class_for_all(annotations):
    table = found(annotations)
    table = table.take(np.flatnonzero(table.labels != 0))
    (cause,) = causes(annotations, DetectionTable(table.images, table.boxes, table.scores, np.zeros_like(table.labels)))
    assert "Every detection has the class 'ant'." in cause


def test_diagnose_reports_unrelated_classes(annotations):
    random = np.random.default_rng(2)
    table = found(annotations, rename=lambda labels: (labels + random.integers(1, 4, labels.shape)) % 4)
    (cause,) = causes(annotations, table)
    assert "boxes were learned, classes were not" in cause


def mirror(boxes: np.ndarray, sizes: np.ndarray, axis: int) -> np.ndarray:
    """Mirror boxes along x (0) or y (1)."""
    mirrored = boxes.copy()
    mirrored[:, [axis, axis + 2]] = sizes[:, [1 - axis]] - boxes[:, [axis + 2, axis]]
    return mirrored


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("x and y of the boxes are swapped", lambda boxes, sizes: boxes[:, [1, 0, 3, 2]]),
        ("boxes are xywh instead of xyxy", lambda boxes, sizes: np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]])),
        (
            "boxes are xyxy instead of xywh",
            lambda boxes, sizes: np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]]),
        ),
        ("boxes start at their centers", lambda boxes, sizes: boxes + np.tile((boxes[:, 2:] - boxes[:, :2]) / 2, 2)),
        ("flipped horizontally", lambda boxes, sizes: mirror(boxes, sizes, 0)),
        ("flipped vertically", lambda boxes, sizes: mirror(boxes, sizes, 1)),
        ("normalized to the size", lambda boxes, sizes: boxes / np.tile(sizes[:, ::-1], 2)),
        ("multiplied by 0.6", lambda boxes, sizes: boxes * 1.6667),
        ("multiplied by 3", lambda boxes, sizes: boxes / 3),
    ],
)
def test_diagnose_reports_a_wrong_frame(annotations, words, change):
    (cause,) = causes(annotations, found(annotations, change))
    assert "frame of the boxes is wrong" in cause and words in cause


def test_diagnose_reports_frame_and_classes(annotations):
    both = causes(
        annotations, found(annotations, lambda boxes, sizes: boxes[:, [1, 0, 3, 2]], lambda labels: labels ^ 1)
    )
    assert "swapped" in both[0] and "'bee' is 'ant'" in both[1] and "'ant' is 'bee'" in both[1]


def test_diagnose_reports_missing_detections(annotations):
    (cause,) = causes(annotations, found(annotations).take(np.zeros(0, int)))
    assert "there are no detections" in cause


def test_diagnose_reports_detections_of_other_images(annotations):
    table = found(annotations)
    rows = np.arange(10)
    (cause,) = diagnose(annotations, table.take(np.flatnonzero(table.images >= 10)), rows)
    assert "No detection is on an image with objects" in cause


def test_diagnose_reports_an_untrained_detector(annotations):
    random = np.random.default_rng(3)
    images = np.repeat(np.arange(NUM_IMAGES), 50)
    corners = random.uniform(0, 400, (len(images), 2))
    boxes = np.hstack([corners, corners + random.uniform(20, 120, corners.shape)])
    table = DetectionTable(images, boxes, random.uniform(0.05, 0.06, len(images)), random.integers(0, 4, len(images)))
    (cause,) = causes(annotations, table)
    assert "The detector is untrained" in cause and "between 0.05 and 0.06" in cause


def test_diagnose_reports_no_mistake_when_only_low_scores_match(annotations):
    random = np.random.default_rng(4)
    table = found(annotations)
    many = [table]
    for _ in range(10):
        corners = random.uniform(0, 400, (len(table), 2))
        many.append(
            DetectionTable(
                table.images, np.hstack([corners, corners + 30]), random.uniform(0.95, 1, len(table)), table.labels
            )
        )
    (cause,) = diagnose(annotations, DetectionTable.join(many), np.arange(NUM_IMAGES))
    assert "Boxes match 100% of the objects" in cause and "train longer" in cause


def test_diagnose_returns_nothing_without_objects(annotations):
    assert diagnose(annotations, found(annotations), np.zeros(0, np.int64)) == []
    assert 0 < ABOUT_ZERO < 0.05


def test_results_of_another_data_set_are_refused_with_the_ids_of_both(annotations, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps([{"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]))
    with pytest.raises(
        ValueError, match=r"none of its image ids is in the annotations: it has 7, ..., they have 100, 101, 102"
    ):
        DetectionTable.from_results(path, annotations)
