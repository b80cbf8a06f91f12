"""Tables of the report: levels by hand, and identities between all counts of one analysis."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from test_evaluation_coco import annotations_of, random_scene, table_of

from fpn_det.data.transforms import Pipeline, ResizeShortestSide
from fpn_det.evaluation.coco import score
from fpn_det.evaluation.config import EvaluationConfig
from fpn_det.evaluation.curves import calibrate
from fpn_det.evaluation.error_types import TYPES
from fpn_det.evaluation.matching import IGNORED, match_detections
from fpn_det.evaluation.outcomes import CONFUSED, FALSE, HIT, MISSED, find_outcomes
from fpn_det.models.roi_align import LevelAssigner
from fpn_det.report.analysis import Analysis, analyze, compare, mistakes
from fpn_det.report.levels import Levels, find_levels
from fpn_det.report.tables import class_rows, error_rows, suspect_rows
from fpn_det.structures import ScoreThresholds, pack_paths

MODEL = SimpleNamespace(assigner=LevelAssigner((4, 8, 16, 32)), neck=SimpleNamespace(strides=(4, 8, 16, 32, 64)))


def levels_of(annotations, found, thresholds=None, transform=None) -> tuple[Levels, object]:
    images = np.arange(len(annotations))
    matches = match_detections(annotations, found, images, EvaluationConfig(), np.array([0.5]))
    levels = find_levels(matches, found, MODEL, transform or Pipeline([]))
    return levels, find_outcomes(matches, found, thresholds)


def test_counts_by_hand():
    """Boxes of 112 to 224 px are pooled from P3, smaller ones from P2 (FPN, eq. 1)."""
    annotations = annotations_of([[(0, 0, 120, 120, 0, 0), (200, 0, 300, 100, 0, 0), (400, 0, 500, 100, 0, 0)]])
    found = table_of(
        [
            (0, 0, 0, 120, 110, 0.9, 0),  # hit; 115 px, P3
            (0, 200, 0, 300, 100, 0.8, 1),  # of another class; P2
            (0, 400, 0, 500, 100, 0.3, 0),  # below the threshold
            (0, 300, 300, 400, 400, 0.7, 0),  # false; P2
        ]
    )
    found = replace(found, anchor_levels=np.array([4, 0, 0, 1]))
    levels, outcomes = levels_of(annotations, found, ScoreThresholds(0.5, {}))
    names = ("proposed: hits", "proposed: false", "pooled: hits", "pooled: false", "objects", "missed")
    assert [tuple(row.values()) for row in levels.counts(outcomes)] == [
        ("P2", 0, 1, 0, 2, 2, 2),
        ("P3", 0, 1, 1, 0, 1, 0),
        ("P4", 0, 0, 0, 0, 0, 0),
        ("P5", 0, 0, 0, 0, 0, 0),
        ("P6", 1, 0, 0, 0, 0, 0),
    ]
    assert tuple(levels.counts(outcomes)[0]) == ("level", *names)
    assert levels.finders(outcomes).tolist() == [[0, 0, 0, 0, 0, 2], [0, 0, 0, 0, 1, 0], *[[0] * 6] * 3]
    # at half the size of the image an object of 120 px has 60 px
    half, _ = levels_of(annotations, found, transform=Pipeline([ResizeShortestSide([320], 1333)]))
    assert half.objects.tolist() == [0, 0, 0] and levels.objects.tolist() == [1, 0, 0]


@pytest.mark.parametrize("known", [True, False])
def test_counts_of_all_levels_are_those_of_the_confusion_matrix(known: bool):
    annotations, found = random_scene(3)
    if known:
        found = replace(found, anchor_levels=np.random.default_rng(0).integers(0, 5, len(found)))
    levels, outcomes = levels_of(annotations, found, ScoreThresholds(0.3, {}))
    rows, matrix = levels.counts(outcomes), outcomes.confusion
    totals = {name: sum(row[name] for row in rows) for name in rows[0] if name != "level"}
    hits, shown, objects = np.trace(matrix[:-1, :-1]), matrix[:, :-1].sum(), matrix[:-1].sum()
    expected = {"hits": hits, "false": shown - hits}
    for kind in ("proposed", "pooled") if known else ("pooled",):
        assert {name: totals.pop(f"{kind}: {name}") for name in expected} == expected
    assert totals == {"objects": objects, "missed": objects - hits}
    finders = levels.finders(outcomes)
    if not known:
        assert finders is None
        return
    assert finders.sum(axis=1).tolist() == [row["objects"] for row in rows]
    assert finders[:, -1].tolist() == [row["missed"] for row in rows]
    assert finders[:, :-1].sum(axis=0).tolist() == [row["proposed: hits"] for row in rows]


def analysis_of(seed: int, error: float = 10.0) -> Analysis:
    """Analyze a random scene, four of five detections of which are kept and moved by an error in px."""
    annotations, found = random_scene(seed)
    rng = np.random.default_rng(seed)
    boxes = found.boxes + rng.normal(0, error, (len(found), 1)).astype(np.float32)
    found = replace(found, boxes=boxes, anchor_levels=rng.integers(0, 5, len(found)))
    found = found.take(np.flatnonzero(rng.random(len(found)) < 0.8))
    evaluation = score(annotations, found, np.arange(len(annotations)), EvaluationConfig())
    return analyze(annotations, evaluation, EvaluationConfig(), MODEL, Pipeline([]))


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analysis_of(5)


def test_suspects_name_their_images_below_the_common_folder(analysis):
    paths = [f"/videos/seq{row}/1.jpg" for row in range(len(analysis.annotations))]
    named = replace(analysis, annotations=replace(analysis.annotations, **pack_paths(paths)))
    assert [row["file"] for row in suspect_rows(named)] == [f"seq{one.image}/1.jpg" for one in named.suspects]
    assert len({one.image for one in named.suspects}) > 1


@pytest.mark.parametrize(("match_iou", "name"), [(0.5, "AP50 gained"), (0.55, "AP55 gained")])
def test_the_gain_of_a_repair_is_named_after_the_match_iou(analysis, match_iou, name):
    rows = error_rows(replace(analysis, config=replace(analysis.config, match_iou=match_iou)))
    assert {tuple(row) for row in rows} == {("by", "group", "type", "count", name)}


def test_rows_of_classes_agree_with_the_matrix_the_metrics_and_the_pictures(analysis: Analysis):
    rows, matrix, matches = class_rows(analysis), analysis.outcomes.confusion, analysis.matches
    for label, (row, metrics) in enumerate(zip(rows, analysis.evaluation.per_class.values(), strict=True)):
        assert row["hits"] + row["missed"] == row["objects"] == (matches.object_labels == label).sum()  # TP + FN
        shown = analysis.outcomes.shown & (matches.detection_labels == label)
        assert row["hits"] + row["false"] == row["detections"] == shown.sum()  # TP + FP
        if metrics["F1"] is not None:
            assert [row[name] for name in ("F1", "precision", "recall")] == [
                metrics[name] for name in ("F1", "precision", "recall")
            ]
            assert row["F1"] == pytest.approx(2 / (1 / row["precision"] + 1 / row["recall"]))
    totals = {name: sum(row[name] for row in rows) for name in ("hits", "false", "missed", "objects", "detections")}
    assert totals["hits"] == np.trace(matrix) > 0
    assert totals["objects"] == matrix[:-1].sum() and totals["detections"] == matrix[:, :-1].sum()
    values = analysis.values
    assert values["precision"] == totals["hits"] / totals["detections"]
    assert values["recall"] == totals["hits"] / totals["objects"]
    assert values["F1"] == pytest.approx(2 / (1 / values["precision"] + 1 / values["recall"]))
    assert mistakes(analysis).sum() == totals["false"] + totals["missed"]
    confused = matrix[:-1, :-1].sum() - totals["hits"]
    of_detections = np.bincount(analysis.outcomes.detection_kinds, minlength=5)
    assert of_detections[[HIT, FALSE, CONFUSED]].tolist() == [totals["hits"], matrix[-1].sum(), confused]
    of_objects = np.bincount(analysis.outcomes.object_kinds, minlength=5)
    assert of_objects[[HIT, MISSED, CONFUSED]].tolist() == [totals["hits"], matrix[:, -1].sum(), confused]


def test_errors_of_every_grouping_are_all_errors(analysis: Analysis):
    rows, matched = error_rows(analysis), analysis.matches.matched[0, 0]
    overall = {row["type"]: row["count"] for row in rows if row["by"] == "all"}
    assert tuple(overall) == TYPES and all(overall.values())
    assert sum(overall.values()) - overall["missed"] == ((matched < 0) & (matched != IGNORED)).sum()
    for kind in ("size", "level", "proposed by", "class"):
        totals = dict.fromkeys(TYPES, 0)
        for row in rows:
            if row["by"] == kind:
                totals[row["type"]] += row["count"]
        missed = 0 if kind == "proposed by" else overall["missed"]
        assert totals == overall | {"missed": missed}, kind


def test_counts_of_the_calibration_are_the_detections_outside_of_crowd_regions(analysis: Analysis):
    calibration, matched = calibrate(analysis.matches), analysis.matches.matched[0, 0]
    assert calibration.counts.sum() == (matched != IGNORED).sum() < len(matched)
    assert np.nansum(calibration.counts * calibration.precision) == pytest.approx((matched >= 0).sum())


def test_a_comparison_is_antisymmetric_and_of_nothing_with_itself(analysis: Analysis):
    same = compare(analysis, analysis)
    differences = [*same.differences.values(), *same.per_class.values()]
    assert {(one.value, one.low, one.high) for one in differences} == {(0.0, 0.0, 0.0), (None, None, None)}
    assert same.gained == same.lost == []
    other = analysis_of(5, error=20.0)
    there, back = compare(analysis, other), compare(other, analysis)
    assert there.differences["AP"].excludes_zero and there.differences["AP"].value > 0
    for name, one in there.differences.items():
        opposite = back.differences[name]
        assert (one.value, one.low, one.high) == pytest.approx((-opposite.value, -opposite.high, -opposite.low)), name
    assert set(there.gained) == set(back.lost) and set(there.lost) == set(back.gained) and there.gained
    with pytest.raises(ValueError, match="same images and annotations"):
        compare(analysis, analysis_of(4))
