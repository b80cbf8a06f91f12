from __future__ import annotations

import numpy as np
import pytest
from test_evaluation_coco import annotations_of, random_scene, table_of

from fpn_det.evaluation.best_f1 import as_thresholds, best_points
from fpn_det.evaluation.coco import score
from fpn_det.evaluation.config import EvaluationConfig
from fpn_det.evaluation.matching import IGNORED, match_detections
from fpn_det.structures import ScoreThresholds

CONFIG = EvaluationConfig()
HALF = np.array([0.5])


def test_best_f1_by_hand():
    # Three objects. From 0.9 on: 1 hit, F1 2/4. From 0.8: 1 of 2, 2/5. From 0.7: 2 of 3, 4/6. From 0.4: 2 of 4, 4/7.
    # The threshold is half way between 0.7 and 0.4.
    objects = [(x, 0, x + 10, 10, 0, 0) for x in (0, 100, 200)]
    found = [
        (0, 0, 0, 10, 10, 0.9, 0),
        (0, 50, 50, 60, 60, 0.8, 0),
        (0, 100, 0, 110, 10, 0.7, 0),
        (0, 9, 9, 20, 20, 0.4, 0),
    ]
    matches = match_detections(annotations_of([objects]), table_of(found), np.arange(1), CONFIG, HALF)
    overall, (first, second) = best_points(matches)
    assert first == overall and second is None
    assert (first.hits, first.detections, first.objects) == (2, 3, 3)
    assert first.score == pytest.approx(0.55) and first.f1 == pytest.approx(4 / 6)
    assert as_thresholds(overall, [first, second], ("a", "b")) == ScoreThresholds(first.score, {"a": first.score})
    assert ScoreThresholds(0.25, {"a": 0.5}).of(["b", "a"]) == [0.25, 0.5]


@pytest.mark.parametrize("seed", range(4))
def test_best_f1_is_that_of_the_best_threshold_of_all(seed: int):
    """Try every threshold, by a new matching of the detections above it. Scores are tied."""
    annotations, found = random_scene(seed)
    images = np.arange(len(annotations))

    def counts(least: float, label: int | None) -> tuple[int, int, int]:
        kept = found.take(np.flatnonzero(found.scores >= least))
        matches = match_detections(annotations, kept, images, CONFIG, HALF)
        mine = np.ones(len(kept), bool) if label is None else matches.detection_labels == label
        objects = len(matches.objects) if label is None else (matches.object_labels == label).sum()
        matched = matches.matched[0, 0][mine]
        return int((matched >= 0).sum()), int((matched != IGNORED).sum()), int(objects)

    overall, per_class = best_points(match_detections(annotations, found, images, CONFIG, HALF))
    for label, point in [(None, overall), *enumerate(per_class)]:
        tried = [counts(least, label) for least in np.unique(found.scores)]
        best = max(2 * hits / max(detections + objects, 1) for hits, detections, objects in tried)
        if point is None:
            assert best == 0
        else:
            assert point.f1 == pytest.approx(best)
            assert counts(point.score, label) == (point.hits, point.detections, point.objects)


def test_evaluation_has_the_thresholds_of_its_classes():
    annotations, found = random_scene(0)
    evaluation = score(annotations, found, np.arange(len(annotations)), CONFIG)
    thresholds = evaluation.score_thresholds
    assert thresholds.overall == evaluation.best_f1.score
    rows = evaluation.per_class
    assert thresholds.classes == {name: row["score"] for name, row in rows.items() if row["F1"]}
    assert list(rows)[-1] not in thresholds.classes  # has no objects
    strict = score(annotations, found, np.arange(len(annotations)), EvaluationConfig(match_iou=0.9))
    assert strict.best_f1.f1 < evaluation.best_f1.f1 and strict.match_iou == 0.9


def test_no_thresholds_without_hits():
    annotations = annotations_of([[(0, 0, 10, 10, 0, 0)]])
    for found in (table_of([]), table_of([(0, 50, 50, 60, 60, 0.9, 0)])):
        evaluation = score(annotations, found, np.arange(1), CONFIG)
        assert evaluation.score_thresholds is None and evaluation.per_class["class0"]["F1"] is None


def test_thresholds_are_read_from_plain_values():
    plain = {"overall": 0.5, "classes": {"cat": 1, "dog": 0.25}}
    assert ScoreThresholds.read(plain, "a.pt") == ScoreThresholds(0.5, {"cat": 1.0, "dog": 0.25})
    assert ScoreThresholds.read(None, "a.pt") is None
    for wrong in (
        {},
        [],
        0.5,
        {"overall": 0.5},
        {"overall": "x", "classes": {}},
        {"overall": 0.5, "classes": {"a": 7}},
    ):
        with pytest.raises(ValueError, match=r"^a\.pt: expected score_thresholds with overall and classes in \[0, 1\]"):
            ScoreThresholds.read(wrong, "a.pt")


def test_match_iou_is_refused_outside_of_its_range():
    with pytest.raises(ValueError, match=r"^evaluation\.match_iou: expected a number between 0 and 1, got 1\.5"):
        EvaluationConfig(match_iou=1.5)
