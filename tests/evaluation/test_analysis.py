"""Outcomes, intervals and error types: identities between counts, cases by hand, and other implementations."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from test_evaluation_coco import annotations_of, random_scene, table_of

from fpn_det.evaluation.best_f1 import as_thresholds, best_points
from fpn_det.evaluation.bootstrap import Interval, draw_weights, resample
from fpn_det.evaluation.coco import score
from fpn_det.evaluation.config import EvaluationConfig
from fpn_det.evaluation.curves import calibrate, curve_of
from fpn_det.evaluation.engines import IOU_THRESHOLDS
from fpn_det.evaluation.error_types import NO_ERROR, TYPES, find_errors
from fpn_det.evaluation.matching import match_detections
from fpn_det.evaluation.outcomes import find_outcomes
from fpn_det.report.analysis import Comparison
from fpn_det.structures import Annotations, ScoreThresholds

CONFIG = EvaluationConfig()
HALF = np.array([0.5])


def outcomes_of(annotations: Annotations, found, thresholds: ScoreThresholds | None = None, config=CONFIG):
    matches = match_detections(annotations, found, np.arange(len(annotations)), config, HALF)
    return find_outcomes(matches, found, thresholds)


@pytest.mark.parametrize("seed", range(6))
def test_counts_agree_with_each_other_and_with_the_table(seed: int):
    annotations, found = random_scene(seed)
    images = np.arange(len(annotations))
    evaluation = score(annotations, found, images, CONFIG)
    outcomes = outcomes_of(annotations, found, evaluation.score_thresholds)
    matches, matrix = outcomes.matches, outcomes.confusion
    objects = np.bincount(matches.object_labels, minlength=annotations.num_classes)
    shown = np.bincount(matches.detection_labels[outcomes.shown], minlength=annotations.num_classes)
    assert matrix[:-1].sum(axis=1).tolist() == objects.tolist()
    assert matrix[:, :-1].sum(axis=0).tolist() == shown.tolist() and matrix[-1, -1] == 0
    hits = np.diag(matrix)[:-1]
    assert (hits + matrix[:-1].sum(axis=1) - hits == objects).all()  # TP + FN
    assert hits.sum() == outcomes.is_hit.sum() == outcomes.is_found.sum()
    assert outcomes.is_confused.sum() == matrix[:-1, :-1].sum() - hits.sum() > 0
    for label, row in enumerate(evaluation.per_class.values()):
        if row["F1"] is None:
            continue
        assert row["precision"] == hits[label] / shown[label]
        assert row["recall"] == hits[label] / objects[label]
    taking = np.flatnonzero(outcomes.object_of >= 0)
    assert len(set(outcomes.object_of[taking])) == len(taking)  # no object twice


@pytest.mark.parametrize("seed", range(3))
def test_weights_of_one_give_the_metrics_of_the_engine(seed: int):
    annotations, found = random_scene(seed)
    images = np.arange(len(annotations))
    config = replace(CONFIG, max_dets=(1, 3, 100))
    evaluation = score(annotations, found, images, config)
    matches = match_detections(annotations, found, images, config, IOU_THRESHOLDS, by_area=True)
    outcomes = outcomes_of(annotations, found, evaluation.score_thresholds, config)
    ones = resample(matches, outcomes, config, np.ones((2, len(images))))
    for name, value in evaluation.metrics.items():
        assert ones.metrics[name][1] == pytest.approx(value, abs=1e-12), name
    for name, row in evaluation.per_class.items():
        for metric in ("AP", "AP50", "AR"):
            value = np.nan if row[metric] is None else row[metric]
            assert ones.per_class[name][metric][0] == pytest.approx(value, abs=1e-12, nan_ok=True)


def test_a_resample_equals_the_evaluation_of_the_drawn_images():
    """Copy images as often as they were drawn, and let the engine score the copies."""
    annotations, found = random_scene(4)
    found = replace(found, scores=np.random.default_rng(0).permutation(len(found)) / len(found))  # without ties
    weights = draw_weights(len(annotations), 3)
    assert (weights.sum(axis=1) == len(annotations)).all() and (weights != 1).any()
    matches = match_detections(annotations, found, np.arange(len(annotations)), CONFIG, IOU_THRESHOLDS, by_area=True)
    ours = resample(matches, outcomes_of(annotations, found), CONFIG, weights)
    for number, row in enumerate(weights.astype(int)):
        drawn = np.repeat(np.arange(len(row)), row)
        boxes = [
            [
                (*box, label, crowd)
                for box, label, crowd in zip(
                    annotations.boxes[annotations.rows(image)].tolist(),
                    annotations.labels[annotations.rows(image)].tolist(),
                    annotations.iscrowd[annotations.rows(image)].tolist(),
                    strict=True,
                )
            ]
            for image in drawn.tolist()
        ]
        copied = annotations_of(boxes, annotations.num_classes)
        rows = [
            (copy, *found.boxes[index], found.scores[index], found.labels[index])
            for copy, image in enumerate(drawn.tolist())
            for index in np.flatnonzero(found.images == image)
        ]
        theirs = score(copied, table_of(rows), np.arange(len(drawn)), CONFIG).metrics
        for name, value in theirs.items():
            assert ours.metrics[name][number] == pytest.approx(value, abs=1e-9), name


def test_interval_of_percentiles():
    interval = Interval.of(0.5, np.array([*np.linspace(0, 1, 41), np.nan]))
    assert (interval.low, interval.high) == (pytest.approx(0.025), pytest.approx(0.975))
    assert not Interval.of(0.0, np.array([-1.0, 1.0])).excludes_zero
    assert Interval.of(2.0, np.array([1.0, 3.0])).excludes_zero
    assert Interval.of(None, np.zeros(3)) == Interval(None, None, None)


def simulated(rng: np.random.Generator, num_images: int) -> tuple[Annotations, object]:
    """Draw images of different difficulty: in hard ones more objects are missed and more detections are false."""
    images, found = [], []
    for image in range(num_images):
        skill = rng.beta(4, 2)
        rows = []
        for place in range(rng.integers(1, 6)):
            x = 100.0 * place
            rows.append((x, 0, x + 50, 50, 0, 0))
            if rng.random() < skill:
                shift = rng.uniform(0, 12)
                found.append((image, x + shift, 0, x + 50 + shift, 50, rng.beta(4, 2), 0))
            if rng.random() < 0.5 * (1 - skill):
                found.append((image, x, 200, x + 50, 250, rng.beta(2, 3), 0))
        images.append(rows)
    return annotations_of(images, num_classes=1), table_of(found)


@pytest.mark.slow
def test_intervals_hold_the_true_ap_in_95_percent_of_simulated_sets():
    """The truth is the AP of a very large set of the same distribution."""
    config = replace(CONFIG, area_ranges={})
    rng = np.random.default_rng(0)
    truth = score(*simulated(rng, 20_000), np.arange(20_000), config).metrics
    held = {"AP": 0, "AP50": 0, "AR100": 0}
    weights = draw_weights(100, 400)
    for _ in range(200):
        annotations, found = simulated(rng, 100)
        matches = match_detections(annotations, found, np.arange(100), config, IOU_THRESHOLDS, by_area=True)
        drawn = resample(matches, outcomes_of(annotations, found), config, weights)
        for name in held:
            interval = Interval.of(0.0, drawn.metrics[name])
            held[name] += interval.low <= truth[name] <= interval.high
    assert all(180 <= count <= 196 for count in held.values()), held


# Two classes; an object of class 0 at (0, 0, 100, 100), and one of class 1 at (200, 0, 300, 100).
OBJECTS = [[(0, 0, 100, 100, 0, 0), (200, 0, 300, 100, 1, 0)]]
BY_HAND = {
    "classification": (200, 0, 300, 100, 0.9, 0),
    "localization": (60, 0, 160, 100, 0.9, 0),  # IoU 40/160 with the object of its class
    "both": (260, 0, 360, 100, 0.9, 0),  # the same with that of the other class
    "background": (0, 300, 100, 400, 0.9, 0),
    "duplicate": (1, 0, 101, 100, 0.4, 0),
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_error_type_by_hand(kind: str):
    hit = (0, 0, 0, 100, 100, 0.5, 0)
    errors = find_errors(*matches_of(annotations_of(OBJECTS), table_of([hit, (0, *BY_HAND[kind])])))
    index = int(errors.matches.scores.argmin() if kind == "duplicate" else errors.matches.scores.argmax())
    assert TYPES[errors.types[index]] == kind
    assert (np.delete(errors.types, index) == NO_ERROR).all()
    # the object of class 1 is missed unless the repair of the class finds it
    assert errors.missed.tolist() == [False, kind != "classification"]
    costs = np.nanmean(errors.costs(), axis=1)
    # class 0: the false detection before the hit halves its AP, a duplicate after it costs nothing; class 1: AP 0
    before = {"duplicate": 1.0}.get(kind, 0.5)
    assert errors.ap().tolist() == [pytest.approx(before), 0]
    gain = {"duplicate": 0.0, "classification": 0.75}.get(kind, 0.25)
    assert costs[TYPES.index(kind)] == pytest.approx(gain)


def test_a_missed_object_costs_its_recall():
    annotations = annotations_of([[(0, 0, 100, 100, 0, 0), (200, 0, 300, 100, 0, 0)]], num_classes=1)
    errors = find_errors(*matches_of(annotations, table_of([(0, 0, 0, 100, 100, 0.5, 0)])))
    assert errors.missed.tolist() == [False, True]
    assert errors.costs()[TYPES.index("missed"), 0] == pytest.approx(1 - 51 / 101)


def matches_of(annotations: Annotations, found):
    return match_detections(annotations, found, np.arange(len(annotations)), CONFIG, HALF), found


@pytest.mark.parametrize("seed", range(3))
def test_costs_equal_those_of_tidecv(seed: int):
    tidecv = pytest.importorskip(
        "tidecv", reason="tidecv is not installed (it needs a graphical OpenCV and matplotlib)"
    )
    annotations, found = random_scene(seed, num_images=40)
    real = ~annotations.iscrowd.numpy()
    kept = np.flatnonzero(found.labels < 3)  # a class without objects counts as AP 0 there
    rng = np.random.default_rng(seed)
    found = found.take(kept)
    found = replace(found, scores=rng.permutation(len(found)) / len(found))  # without ties
    truth, preds = tidecv.Data("truth"), tidecv.Data("found")
    offsets = annotations.offsets.tolist()
    rows = [
        [(*box, label, 0) for box, label in zip(
            annotations.boxes[start:stop][real[start:stop]].tolist(),
            annotations.labels[start:stop][real[start:stop]].tolist(), strict=True)]
        for start, stop in itertools.pairwise(offsets)
    ]  # fmt: skip
    annotations = annotations_of(rows, 3)
    for image, boxes in enumerate(rows):
        truth.add_image(image, "")
        for x1, y1, x2, y2, label, _ in boxes:
            truth.add_ground_truth(image, label, [x1, y1, x2 - x1, y2 - y1])
    for image, (x1, y1, x2, y2), value, label in zip(
        found.images.tolist(), found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True
    ):
        preds.add_detection(image, label, value, [x1, y1, x2 - x1, y2 - y1])
    tide = tidecv.TIDE()
    run = tide.evaluate(truth, preds, mode=tidecv.TIDE.BOX)
    theirs = tide.get_main_errors()["found"]
    errors = find_errors(*matches_of(annotations, found))
    assert 100 * np.nanmean(errors.ap()) == pytest.approx(run.ap, abs=0.1)
    ours = 100 * np.maximum(np.nanmean(errors.costs(), axis=1), 0)
    names = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")
    for name, value in zip(names, ours, strict=True):
        assert value == pytest.approx(theirs[name], abs=0.1), name


def test_curves_hold_the_best_f1():
    annotations, found = random_scene(2)
    matches, _ = matches_of(annotations, found)
    overall, per_class = best_points(matches)
    for label, point in [(None, overall), *enumerate(per_class)]:
        assert max(curve_of(matches, label).f1, default=0) == pytest.approx(point.f1 if point else 0)
    assert as_thresholds(overall, per_class, annotations.class_names)


def test_calibration_by_hand():
    # scores 0.95 (hit) and 0.91 (false): 1/2 of them are hits at a mean score of 0.93; 0.25 is false
    annotations = annotations_of([[(0, 0, 10, 10, 0, 0)]])
    found = table_of([(0, 0, 0, 10, 10, 0.95, 0), (0, 50, 50, 60, 60, 0.91, 0), (0, 50, 50, 60, 60, 0.25, 0)])
    calibration = calibrate(matches_of(annotations, found)[0])
    assert calibration.counts.tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 0, 2]
    assert calibration.precision[9] == 0.5 and calibration.mean_scores[9] == pytest.approx(0.93)
    assert calibration.expected_error == pytest.approx((2 * 0.43 + 0.25) / 3)
    assert calibrate(matches_of(annotations, table_of([]))[0]).expected_error is None


def test_verdict_on_two_seeds_of_the_same_settings():
    better = Interval(0.017, 0.010, 0.025)

    def verdict(interval: Interval, same_settings: bool, images: int = 10) -> str:
        return Comparison({"AP": interval}, {}, [], [], same_settings, images).verdict("a", "b")

    assert verdict(better, False).startswith("a is better")
    assert verdict(Interval(-0.017, -0.025, -0.010), False).startswith("b is better")
    assert verdict(Interval(0.017, -0.010, 0.025), False).startswith("a and b are not distinguishable")
    few = verdict(Interval(0.735, 0.735, 0.735), False, images=1)
    assert few.startswith("a and b are not distinguishable: AP of a - AP of b is +0.735, on 1 image, ")
    same = verdict(better, True)
    assert same.startswith("a and b are not distinguishable: ") and "the weights of a better" in same
    assert "+0.017" in same and "+0.010 to +0.025" in same
