"""Equality of the evaluation engines, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_evaluation_coco import annotations_of, random_scene, table_of

from fpn_det.evaluation import engines
from fpn_det.evaluation.coco import score
from fpn_det.evaluation.config import EvaluationConfig
from fpn_det.evaluation.detection_table import DetectionTable
from fpn_det.evaluation.engines import choose_engine, precision_and_recall
from fpn_det.structures import Annotations

needs_hotcoco = pytest.mark.skipif(
    engines.importlib.util.find_spec("hotcoco") is None, reason="hotcoco is not installed (extra fast-eval)"
)
OTHER_AREAS = {"tiny": (0.0, 100.0), "huge": (1e6, 1e7), "rest": (100.0, 1e6)}


def assert_equal_tables(
    annotations: Annotations, detections: DetectionTable, images: np.ndarray, config: EvaluationConfig, agnostic: bool
) -> None:
    expected, actual = (
        precision_and_recall(annotations, detections, images, replace(config, engine=engine), agnostic)
        for engine in ("pycocotools", "hotcoco")
    )
    for mine, theirs in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@needs_hotcoco
@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("max_dets", [(1, 10, 100), (1, 2, 3), (5,), (10, 1000)])
@pytest.mark.parametrize("seed", range(4))
def test_engines_give_equal_tables(seed: int, max_dets: tuple[int, ...], agnostic: bool):
    """Cover crowds, images and classes without objects, tied scores, other limits and areas, and a subset of the images."""
    annotations, detections = random_scene(seed)
    images = np.arange(len(annotations))
    for areas in (EvaluationConfig().area_ranges, OTHER_AREAS, {}):
        assert_equal_tables(annotations, detections, images, EvaluationConfig(max_dets, areas), agnostic)
    assert_equal_tables(annotations, detections, images[3:20:2], EvaluationConfig(max_dets), agnostic)


@needs_hotcoco
@pytest.mark.parametrize("agnostic", [False, True])
def test_engines_agree_where_something_is_empty(agnostic: bool):
    objects = annotations_of([[(0, 0, 20, 20, 0, 0), (3, 3, 9, 9, 0, 1)], [], [(5, 5, 300, 300, 1, 0)]])
    no_objects, only_crowd = annotations_of([[], [], []]), annotations_of([[(0, 0, 20, 20, 0, 1)], [], []])
    some = table_of([(0, 0, 0, 20, 20, 0.5, 0), (1, 0, 0, 0, 0, 0.5, 1), (2, 0, 0, 300, 299, 0.5, 1)])
    for truth in (objects, no_objects, only_crowd):
        for detections in (some, table_of([])):
            assert_equal_tables(truth, detections, np.arange(3), EvaluationConfig(), agnostic)


@needs_hotcoco
def test_engines_score_proposals_equally():
    annotations, detections = random_scene(8)
    config = EvaluationConfig((1, 3, 10, 100), target="proposals")
    one, other = (
        score(annotations, detections, np.arange(len(annotations)), replace(config, engine=engine))
        for engine in ("pycocotools", "hotcoco")
    )
    assert one.metrics == other.metrics and one.metrics["AR100"] > 0.1
    assert one.engine.startswith("pycocotools ") and other.engine.startswith("hotcoco ")


def test_auto_takes_hotcoco_only_if_it_is_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(engines, "_hotcoco_process", None)
    assert choose_engine(EvaluationConfig()) == "hotcoco"
    assert choose_engine(EvaluationConfig(engine="pycocotools")) == "pycocotools"
    monkeypatch.setattr(engines, "_hotcoco_process", 1)  # the parent of this process has used it
    assert choose_engine(EvaluationConfig()) == "pycocotools"
    with pytest.raises(ValueError, match=r"^evaluation\.engine: expected a process that was started anew"):
        choose_engine(EvaluationConfig(engine="hotcoco"))
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    assert choose_engine(EvaluationConfig()) == "pycocotools"
    with pytest.raises(ValueError, match=r"^evaluation\.engine: expected an installed hotcoco, got none\. Install it"):
        choose_engine(EvaluationConfig(engine="hotcoco"))
