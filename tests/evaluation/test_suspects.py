from __future__ import annotations

import numpy as np
from test_evaluation_coco import annotations_of, table_of

from fpn_det.evaluation.config import EvaluationConfig
from fpn_det.evaluation.matching import match_detections
from fpn_det.evaluation.suspects import find_suspects


def test_each_kind_of_wrong_annotation_is_found_before_sound_ones():
    """Ten images with a sound object of each class; in the last four images one annotation more is wrong."""
    images = [[(0, 0, 50, 50, 0, 0), (100, 0, 150, 50, 1, 0)] for _ in range(10)]
    found = [(i, *row[:4], 0.9, row[4]) for i, rows in enumerate(images) for row in rows]
    images[6].append((0, 200, 50, 250, 0, 0))  # of the other class
    found.append((6, 0, 200, 50, 250, 0.95, 1))
    images[7].append((0, 200, 50, 250, 0, 0))  # moved: IoU 1/4
    found.append((7, 30, 200, 80, 250, 0.95, 0))
    found.append((8, 0, 200, 50, 250, 0.95, 0))  # without annotation
    images[9].append((0, 200, 50, 250, 0, 0))  # without object
    annotations, detections = annotations_of(images), table_of(found)
    matches = match_detections(annotations, detections, np.arange(10), EvaluationConfig(), np.array([0.5]))
    suspects = find_suspects(matches, detections)
    assert {(suspect.kind, suspect.image) for suspect in suspects} == {
        ("class", 6),
        ("place", 7),
        ("missing", 8),
        ("unseen", 9),
    }
    values = [suspect.suspicion for suspect in suspects]
    assert values == sorted(values, reverse=True) and all(0 < value <= 1 for value in values)
    place = next(suspect for suspect in suspects if suspect.kind == "place")
    assert place.box == (30, 200, 80, 250) and place.annotation is not None
