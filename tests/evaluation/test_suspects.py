from __future__ import annotations

import numpy as np
import pytest
from test_evaluation_coco import annotations_of, table_of

from fpn_det.evaluation.config import EvaluationConfig
from fpn_det.evaluation.matching import match_detections
from fpn_det.evaluation.suspects import Suspect, find_suspects


def suspects_of(images: list[list[tuple]], found: list[tuple], num_classes: int = 2) -> list[Suspect]:
    annotations, detections = annotations_of(images, num_classes), table_of(found)
    matches = match_detections(annotations, detections, np.arange(len(images)), EvaluationConfig(), np.array([0.5]))
    return find_suspects(matches, detections)


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
    suspects = suspects_of(images, found)
    assert len(suspects) == 4
    assert {(suspect.kind, suspect.image) for suspect in suspects} == {
        ("class", 6),
        ("place", 7),
        ("missing", 8),
        ("unseen", 9),
    }
    # no sound object has a score of 0.95, so each of the first three is 1 of 1 + 1; 3 of 13 objects of class 0 have no detection
    expected = {"class": 1 / 2, "place": 0.95 / (0.95 + 0.05 * 3 / 13) / 2, "missing": 0.95 / 2, "unseen": 14 / 15 / 2}
    assert {suspect.kind: suspect.suspicion for suspect in suspects} == pytest.approx(expected)
    values = [suspect.suspicion for suspect in suspects]
    assert values == sorted(values, reverse=True) and all(0 < value <= 1 for value in values)
    place = next(suspect for suspect in suspects if suspect.kind == "place")
    assert place.box == (30, 200, 80, 250) and place.annotation is not None


def test_suspicion_compares_events_with_right_detections_of_the_class():
    sound = [[(0, 0, 50, 50, 0, 0)] for _ in range(10)]
    found = [(i, 0, 0, 50, 50, 0.9, 0) for i in range(10)]
    orphans = [(0, 200, 0, 250, 50, 0.6, 0), (1, 200, 0, 250, 50, 0.95, 0), (2, 200, 0, 250, 50, 0.4, 0)]
    # at 0.6: two events, and ten objects that are found as well, plus one; no object is found at 0.95
    suspects = suspects_of(sound, found + orphans)
    assert [(suspect.image, suspect.suspicion) for suspect in suspects] == [
        (1, pytest.approx(0.95 * 11 / 13)),
        (0, pytest.approx(0.6 * 11 / 13)),
    ]
    # two of twelve objects are unseen, which is half as sure as a detection can be
    unseen = suspects_of([*sound, [(0, 0, 50, 50, 0, 0)] * 2], found)
    assert [suspect.kind for suspect in unseen] == ["unseen"] * 2
    assert [suspect.suspicion for suspect in unseen] == pytest.approx([0.5 * 13 / 15] * 2)


def test_a_detection_that_is_right_about_another_object_contradicts_none():
    """Two objects of different classes at one place, both found."""
    both = [(0, 0, 50, 50, 0, 0), (2, 0, 52, 50, 1, 0)]
    found = [(0, 0, 0, 50, 50, 0.9, 0), (0, 2, 0, 52, 50, 0.9, 1)]
    assert suspects_of([both], found) == []
    # the second is annotated with the class of the first as well
    (suspect,) = suspects_of([[both[0], (2, 0, 52, 50, 0, 0)]], found)
    assert suspect.kind == "class" and suspect.label == 1


def test_of_two_objects_the_nearer_one_was_moved():
    objects = [(0, 0, 50, 50, 0, 0), (60, 0, 110, 50, 0, 0)]
    suspects = suspects_of([objects], [(0, 40, 0, 90, 50, 0.9, 0)])
    assert {(suspect.kind, suspect.annotation) for suspect in suspects} == {("place", 1), ("unseen", 0)}


def simulated(rng: np.random.Generator) -> tuple[list[list[tuple]], list[tuple]]:
    """Objects of three unequal classes and detections that miss, confuse, misplace and invent some; one object of a hundred is not annotated."""
    images, found = [], []
    for image in range(120):
        rows = []
        for cell in rng.permutation(24)[: rng.integers(6, 20)].tolist():
            sides, label = rng.uniform(60, 100, 2), int(rng.choice(3, p=[0.8, 0.1, 0.1]))
            corner = 110 * np.array(divmod(cell, 6)) + rng.uniform(0, 10, 2)
            if rng.random() > 0.01:
                rows.append((*corner, *(corner + sides), label, 0))
            is_bad, draw = rng.random() < 0.03, rng.random()
            moved = corner + sides * rng.normal(0, 0.25 if is_bad else 0.05, 2)
            shown = label if draw > 0.04 else int(rng.integers(3))
            if draw > 0.03:
                found.append((image, *moved, *(moved + sides), rng.beta(*((3, 2) if is_bad else (9, 1))), shown))
        for corner in rng.uniform(0, 500, (rng.poisson(0.4), 2)):
            found.append((image, *corner, *(corner + 80), rng.beta(2, 4), int(rng.integers(3))))
        images.append(rows)
    return images, found


def test_most_corrupted_annotations_of_a_simulated_set_are_among_the_first_suspects():
    """Change the class of three annotations, move three and delete three: six of nine are in the first thirty on average."""
    count = 0
    for seed in range(6):
        rng = np.random.default_rng(seed)
        images, found = simulated(rng)
        corrupted = {}
        for number, image in enumerate(rng.permutation(len(images))[:9].tolist()):
            x1, y1, x2, y2, label, _ = images[image].pop(0)
            corrupted[image] = (x1, y1, x2, y2)
            if number % 3 == 0:
                images[image].insert(0, (x1, y1, x2, y2, (label + 1) % 3, 0))
            elif number % 3 == 1:
                images[image].insert(0, (x1 + 50, y1 + 50, x2 + 50, y2 + 50, label, 0))
        first = suspects_of(images, found, num_classes=3)[:30]
        count += len(
            {
                suspect.image
                for suspect in first
                if np.abs(np.subtract(suspect.box, corrupted.get(suspect.image, 1e9))).max() < 30
            }
        )
    assert count >= 6 * 6
