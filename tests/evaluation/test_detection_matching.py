"""The matcher against pycocotools, and by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_evaluation_coco import annotations_of, pycocotools_run, random_scene, table_of

from fpn_det.evaluation import matching
from fpn_det.evaluation.config import EvaluationConfig
from fpn_det.evaluation.engines import IOU_THRESHOLDS
from fpn_det.evaluation.matching import IGNORED, NOTHING, find_pairs, match_detections

CONFIG = EvaluationConfig()


@pytest.mark.parametrize("limit", [100, 2])
@pytest.mark.parametrize("seed", range(4))
def test_matches_equal_those_of_pycocotools(seed: int, limit: int):
    """Compare every detection at every IoU threshold and area range, with crowds, tied scores and empty images."""
    annotations, detections = random_scene(seed)
    config = replace(CONFIG, max_dets=(limit,))
    images = np.arange(len(annotations))
    ours = match_detections(annotations, detections, images, config, IOU_THRESHOLDS, by_area=True)
    run = pycocotools_run(annotations, detections, max_dets=[limit])
    expected = {}  # (area, category, image id, rank) -> matched annotation id [T], ignored [T], score
    areas = [tuple(bounds) for bounds in run.params.areaRng]
    for found in filter(None, run.evalImgs):
        for rank in range(len(found["dtIds"])):
            key = areas.index(tuple(found["aRng"])), found["category_id"], found["image_id"], rank
            expected[key] = found["dtMatches"][:, rank], found["dtIgnore"][:, rank], found["dtScores"][rank]
    assert len(expected) == 4 * len(ours.detections) > 400
    for area in range(4):
        for index in range(len(ours.detections)):
            image_id = int(annotations.image_ids[images[ours.detection_images[index]]])
            category_id = annotations.category_ids[ours.detection_labels[index]]
            ids, ignored, score = expected[area, category_id, image_id, int(ours.ranks[index])]
            matched = ours.matched[area, :, index]
            assert score == ours.scores[index]
            hits = matched >= 0
            assert (ids[hits] == ours.objects[matched[hits]] + 1).all()
            false = (matched == NOTHING) & ours.detection_in_area[area, index]
            assert (hits == ((ids > 0) & (ignored == 0))).all()
            assert (false == ((ids == 0) & (ignored == 0))).all()


def test_detections_are_in_order_of_accumulation():
    annotations, detections = random_scene(3)
    found = match_detections(annotations, detections, np.arange(len(annotations)), CONFIG, np.array([0.5]))
    assert (np.diff(found.detection_labels) >= 0).all()
    for label in range(annotations.num_classes):
        rows = found.of_class(label)
        assert (found.detection_labels[rows] == label).all() and (np.diff(found.scores[rows]) <= 0).all()
    assert (detections.scores[found.detections] == found.scores).all()


def test_images_that_were_not_evaluated_are_left_out():
    annotations, detections = random_scene(1)
    images = np.array([7, 3, 4])
    found = match_detections(annotations, detections, images, CONFIG, np.array([0.5]))
    assert set(images[found.detection_images]) == set(detections.images) & {3, 4, 7}
    assert (annotations.image_of_boxes.numpy()[found.objects] == images[found.object_images]).all()


def test_a_detection_takes_the_free_object_of_highest_iou():
    # Objects of columns 0..10 and 4..14. The first detection covers 3..13: IoU 7/13 and 9/11, so it takes the second object.
    # The next one covers 4..14, IoU 1 with the second and 6/14 with the first: nothing is left for it.
    annotations = annotations_of([[(0, 0, 10, 10, 0, 0), (4, 0, 14, 10, 0, 0)]])
    found = table_of([(0, 4, 0, 14, 10, 0.8, 0), (0, 3, 0, 13, 10, 0.9, 0), (0, 3, 0, 13, 10, 0.7, 1)])
    matches = match_detections(annotations, found, np.arange(1), CONFIG, np.array([0.4, 0.5]))
    assert matches.detections.tolist() == [1, 0, 2]
    assert matches.matched[0].tolist() == [[1, 0, NOTHING], [1, NOTHING, NOTHING]]


def test_detections_on_a_crowd_are_ignored():
    annotations = annotations_of([[(0, 0, 100, 100, 0, 1), (0, 0, 10, 10, 0, 0)]])
    found = table_of([(0, 0, 0, 10, 10, 0.9, 0), (0, 0, 0, 10, 10, 0.8, 0), (0, 20, 20, 30, 30, 0.7, 0)])
    matches = match_detections(annotations, found, np.arange(1), CONFIG, np.array([0.5]))
    assert matches.objects.tolist() == [1]
    assert matches.matched[0, 0].tolist() == [0, IGNORED, IGNORED]


def test_pairs_do_not_depend_on_the_size_of_the_parts(monkeypatch):
    annotations, detections = random_scene(2)
    whole = find_pairs(annotations, detections, least=0.1)
    monkeypatch.setattr(matching, "MAX_PAIRS", 7)
    parts = find_pairs(annotations, detections, least=0.1)
    assert len(whole[0]) > 100 and all((one == other).all() for one, other in zip(whole, parts, strict=True))


def test_nothing_at_all():
    nothing, some = table_of([]), table_of([(0, 0, 0, 10, 10, 0.9, 0)])
    empty, objects = annotations_of([[], []]), annotations_of([[(0, 0, 10, 10, 0, 0)], []])
    for truth in (empty, objects):
        for found in (nothing, some):
            matches = match_detections(truth, found, np.arange(2), CONFIG, IOU_THRESHOLDS, by_area=True)
            assert matches.matched.shape == (4, 10, len(found))
            assert (matches.matched >= 0).any() == (truth is objects and found is some)
    assert len(match_detections(objects, some, np.zeros(0, np.int64), CONFIG, IOU_THRESHOLDS).objects) == 0
