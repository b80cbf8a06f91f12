from __future__ import annotations

import contextlib
import io
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fpn_det.annotations.reading import read_annotations
from fpn_det.evaluation.coco import score
from fpn_det.evaluation.config import EvaluationConfig
from fpn_det.evaluation.detection_table import DetectionTable
from fpn_det.evaluation.engines import precision_and_recall, recall_of_proposals
from fpn_det.structures import Annotations

COCO_METRICS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
DEFAULT = EvaluationConfig()


def annotations_of(images: list[list[tuple]], num_classes: int = 2, image_ids=None, category_ids=None) -> Annotations:
    """Build annotations from lists of (x1, y1, x2, y2, label, crowd) per image. All annotation ids are 0, which must be harmless."""
    rows = [row for image in images for row in image]
    boxes = torch.tensor([row[:4] for row in rows], dtype=torch.float64).reshape(-1, 4)
    return Annotations(
        image_ids=torch.tensor(image_ids or range(len(images))),
        path_bytes=torch.zeros(0, dtype=torch.uint8),
        path_offsets=torch.zeros(len(images) + 1, dtype=torch.int64),
        sizes=torch.full((len(images), 2), 640),
        offsets=torch.tensor([0, *np.cumsum([len(image) for image in images])]),
        boxes=boxes,
        labels=torch.tensor([row[4] for row in rows], dtype=torch.int64),
        iscrowd=torch.tensor([bool(row[5]) for row in rows], dtype=torch.bool),
        area=(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
        annotation_ids=torch.zeros(len(rows), dtype=torch.int64),
        class_names=tuple(f"class{k}" for k in range(num_classes)),
        category_ids=tuple(category_ids or range(1, num_classes + 1)),
    )


def table_of(rows: list[tuple]) -> DetectionTable:
    """Build a table from rows of (image, x1, y1, x2, y2, score, label)."""
    columns = np.array(rows, np.float64).reshape(-1, 7)
    return DetectionTable(
        columns[:, 0].astype(np.int64),
        columns[:, 1:5].astype(np.float32),
        columns[:, 5].astype(np.float32),
        columns[:, 6].astype(np.int64),
    )


def perfect(annotations: Annotations) -> DetectionTable:
    """Detect every object with score 1."""
    images = np.repeat(np.arange(len(annotations)), np.diff(annotations.offsets.numpy()))
    real = ~annotations.iscrowd.numpy()
    boxes = annotations.boxes.numpy()[real].astype(np.float32)
    return DetectionTable(images[real], boxes, np.ones(len(boxes), np.float32), annotations.labels.numpy()[real])


def random_scene(seed: int, num_images: int = 30, num_classes: int = 4) -> tuple[Annotations, DetectionTable]:
    """Draw objects of all sizes, crowds, empty images and a class without objects; detections near objects and elsewhere, with tied scores."""
    rng = np.random.default_rng(seed)
    images, found = [], []
    for image in range(num_images):
        rows = []
        for _ in range(rng.poisson(4) if image % 5 else 0):
            x, y = rng.uniform(0, 300, 2)
            width, height = np.exp(rng.uniform(np.log(6), np.log(300), 2))
            rows.append((x, y, x + width, y + height, int(rng.integers(num_classes - 1)), bool(rng.random() < 0.1)))
        images.append(rows)
        for x1, y1, x2, y2, label, _ in [*rows, *rows, (5, 5, 50, 80, num_classes - 1, False)]:
            noise = rng.normal(0, 0.06, 4) * [x2 - x1, y2 - y1, x2 - x1, y2 - y1]
            box = np.array([x1, y1, x2, y2]) + noise
            found.append(
                (image, *box, round(rng.random(), 1), label if rng.random() < 0.8 else rng.integers(num_classes))
            )
    ids = rng.permutation(1000)[:num_images].tolist()
    return annotations_of(images, num_classes, ids, category_ids=[3, 7, 11, 90]), table_of(found)


def pycocotools_run(
    annotations: Annotations, detections: DetectionTable, image_ids=None, use_cats: bool = True, max_dets=None
) -> COCOeval:
    """Evaluate the same data with pycocotools, from dictionaries as in its documentation."""
    owners = np.repeat(annotations.image_ids.numpy(), np.diff(annotations.offsets.numpy()))
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i} for i in annotations.image_ids.tolist()],
        "categories": [{"id": i} for i in annotations.category_ids],
        "annotations": [
            {
                "id": row + 1,
                "image_id": int(owners[row]),
                "category_id": annotations.category_ids[annotations.labels[row]],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": annotations.area[row].item(),
                "iscrowd": int(annotations.iscrowd[row]),
            }
            for row, (x1, y1, x2, y2) in enumerate(annotations.boxes.tolist())
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        run = COCOeval(truth, truth.loadRes(list(detections.results(annotations))), "bbox")
        run.params.useCats = int(use_cats)
        if image_ids is not None:
            run.params.imgIds = image_ids
        if max_dets is not None:
            run.params.maxDets = list(max_dets)
        run.evaluate()
        run.accumulate()
        if max_dets is None:
            run.summarize()
    return run


def test_score_of_perfect_detections_is_one_for_any_ids():
    annotations = annotations_of(
        [[(0, 0, 20, 20, 0, 0), (30, 30, 80, 90, 1, 0)], [], [(5, 5, 300, 300, 0, 0)]],
        image_ids=[0, 900, 7],
        category_ids=[0, 90],
    )
    evaluation = score(annotations, perfect(annotations), np.arange(3), DEFAULT)
    assert list(evaluation.metrics) == COCO_METRICS
    assert all(value == pytest.approx(1) for value in evaluation.metrics.values())
    assert evaluation.num_images == 3
    best = {"F1": 1.0, "score": 1.0, "precision": 1.0, "recall": 1.0}
    assert evaluation.per_class["class0"] == {"AP": 1.0, "AP50": 1.0, "AR": 1.0, **best, "objects": 2, "detections": 2}


def test_score_of_half_the_objects_by_hand():
    # Class 0 has two objects: one detected with score 0.9, then a false positive. Precision is 1 up to recall 0.5 and 0 beyond:
    # the mean over the recalls 0, 0.01, ..., 1 is 51/101, at every IoU threshold. Class 1 has no objects.
    annotations = annotations_of([[(0, 0, 40, 40, 0, 0), (100, 100, 140, 140, 0, 0)]])
    found = table_of([(0, 0, 0, 40, 40, 0.9, 0), (0, 300, 300, 340, 340, 0.8, 0), (0, 0, 0, 9, 9, 0.8, 1)])
    evaluation = score(annotations, found, np.arange(1), DEFAULT)
    assert evaluation.metrics["AP"] == evaluation.metrics["APm"] == pytest.approx(51 / 101)
    assert evaluation.metrics["AR1"] == evaluation.metrics["AR100"] == 0.5
    assert evaluation.metrics["APs"] is None and evaluation.metrics["APl"] is None
    undefined = dict.fromkeys(("AP", "AP50", "AR", "F1", "score", "precision", "recall"))
    assert evaluation.per_class["class1"] == {**undefined, "objects": 0, "detections": 1}
    assert evaluation.remarks() == ["1 of 2 classes have no objects; the means exclude them."]


def test_score_counts_iou_thresholds_by_hand():
    # 72 of 100 columns are covered, IoU 0.72: found at 0.5, 0.55, 0.6, 0.65 and 0.7, half of the ten thresholds.
    annotations = annotations_of([[(0, 0, 100, 100, 0, 0)]], num_classes=1)
    evaluation = score(annotations, table_of([(0, 0, 0, 72, 100, 0.9, 0)]), np.arange(1), DEFAULT)
    assert (evaluation.metrics["AP"], evaluation.metrics["AP50"], evaluation.metrics["AP75"]) == (
        pytest.approx(0.5),
        pytest.approx(1),
        0.0,
    )


def test_score_ignores_detections_inside_a_crowd():
    annotations = annotations_of([[(0, 0, 40, 40, 0, 0), (100, 100, 300, 300, 0, 1)]], num_classes=1)
    found = table_of([(0, 110, 110, 150, 150, 0.9, 0), (0, 160, 160, 190, 190, 0.9, 0), (0, 0, 0, 40, 40, 0.5, 0)])
    evaluation = score(annotations, found, np.arange(1), DEFAULT)
    assert evaluation.metrics["AP"] == pytest.approx(1)
    assert evaluation.per_class["class0"]["objects"] == 1


@pytest.mark.parametrize("seed", range(3))
def test_score_equals_pycocotools(seed):
    annotations, found = random_scene(seed)
    ours = score(annotations, found, np.arange(len(annotations)), DEFAULT)
    theirs = pycocotools_run(annotations, found)
    assert [-1 if value is None else value for value in ours.metrics.values()] == theirs.stats.tolist()
    for k, row in enumerate(ours.per_class.values()):
        precision = theirs.eval["precision"][:, :, k, 0, 2]
        assert row["AP"] == (precision.mean() if (precision > -1).all() else None)


def test_score_equals_pycocotools_on_a_subset_of_images():
    annotations, found = random_scene(5)
    rows = np.array([3, 4, 8, 9, 10, 20])
    inside = np.isin(found.images, rows)
    part = DetectionTable(found.images[inside], found.boxes[inside], found.scores[inside], found.labels[inside])
    ours = score(annotations, part, rows, DEFAULT)
    theirs = pycocotools_run(annotations, part, annotations.image_ids[rows].tolist())
    assert [-1 if value is None else value for value in ours.metrics.values()] == theirs.stats.tolist()
    assert ours.num_images == 6


def test_class_agnostic_tables_equal_pycocotools():
    annotations, found = random_scene(7)
    precision, recall = precision_and_recall(
        annotations, found, np.arange(len(annotations)), DEFAULT, class_agnostic=True
    )
    theirs = pycocotools_run(annotations, found, use_cats=False).eval
    np.testing.assert_array_equal(np.nan_to_num(precision, nan=-1), theirs["precision"])
    np.testing.assert_array_equal(np.nan_to_num(recall, nan=-1), theirs["recall"])


def test_recall_of_proposals_equals_pycocotools_at_every_limit():
    annotations, found = random_scene(8)
    found = replace(found, labels=np.zeros_like(found.labels))  # proposals have no class
    settings = EvaluationConfig((1, 3, 10, 100), target="proposals")
    recall = recall_of_proposals(annotations, found, np.arange(len(annotations)), settings)
    theirs = pycocotools_run(annotations, found, use_cats=False, max_dets=settings.max_dets).eval["recall"][:, 0]
    np.testing.assert_array_equal(np.nan_to_num(recall, nan=-1), theirs)
    assert (np.diff(recall[0, 0]) > 0).all()  # more boxes find more


def test_recall_of_proposals_by_hand():
    # a small and a large object on the first image, none on the second, a crowd region on the third
    annotations = annotations_of([[(0, 0, 10, 10, 0, 0), (100, 100, 300, 300, 1, 0)], [], [(0, 0, 50, 50, 0, 1)]])
    found = table_of(
        [
            (0, 100, 100, 300, 200, 0.2, 0),  # IoU 1/2 with the large one, counts at the first of ten thresholds
            (0, 50, 50, 60, 60, 0.9, 0),  # nothing
            (0, 0, 0, 10, 10, 0.1, 0),  # the small one, third best of its image
            (1, 0, 0, 10, 10, 0.8, 0),
        ]
    )
    settings = EvaluationConfig((1, 2, 3), target="proposals")
    evaluation = score(annotations, found, np.arange(3), settings)
    assert evaluation.metrics == {
        **{"AR1": 0, "AR2": pytest.approx(0.05), "AR3": pytest.approx(0.55)},
        **{"ARs1": 0, "ARs2": 0, "ARs3": 1, "ARm1": None, "ARm2": None, "ARm3": None},
        **{"ARl1": 0, "ARl2": pytest.approx(0.1), "ARl3": pytest.approx(0.1)},
    }
    assert tuple(evaluation.metrics) == settings.metric_names
    assert evaluation.per_class == {} and evaluation.remarks() == []


def test_recall_of_no_proposals_is_zero():
    annotations = annotations_of([[(0, 0, 10, 10, 0, 0)]])
    metrics = score(annotations, table_of([]), np.arange(1), EvaluationConfig((100,), target="proposals")).metrics
    assert (metrics["AR100"], metrics["ARs100"], metrics["ARl100"]) == (0, 0, None)


def test_ap_is_computed_at_the_last_limit():
    annotations, _ = random_scene(1)
    settings = EvaluationConfig(max_dets=(1, 10, 1000))
    metrics = score(annotations, perfect(annotations), np.arange(len(annotations)), settings).metrics
    assert metrics["AP"] == metrics["AR1000"] == metrics["ARs"] == pytest.approx(1)
    assert [name for name in metrics if name.startswith("AR")] == ["AR1", "AR10", "AR1000", "ARs", "ARm", "ARl"]


def test_metrics_are_named_after_area_ranges():
    annotations = annotations_of([[(0, 0, 4, 4, 0, 0), (50, 50, 90, 90, 0, 0)]], num_classes=1)
    found = table_of([(0, 0, 0, 4, 4, 0.9, 0)])
    settings = EvaluationConfig(area_ranges={"tiny": (0, 100), "huge": (1e6, 1e7), "rest": (100, 1e6)})
    metrics = score(annotations, found, np.arange(1), settings).metrics
    assert (metrics["APtiny"], metrics["APhuge"], metrics["APrest"]) == (pytest.approx(1), None, 0.0)
    assert "APs" not in metrics


def test_score_of_no_detections_is_zero():
    annotations = annotations_of([[(0, 0, 40, 40, 0, 0)], []])
    evaluation = score(annotations, DetectionTable.join([]), np.arange(2), DEFAULT)
    assert evaluation.metrics["AP"] == evaluation.metrics["AR100"] == 0.0
    assert "There are no detections." in evaluation.remarks()
    assert list(DetectionTable.join([]).results(annotations)) == []


@pytest.mark.parametrize("images", [[], [[], []]])
def test_score_without_objects_is_undefined(images):
    annotations = annotations_of(images)
    found = table_of([(0, 0, 0, 9, 9, 0.5, 0)] if images else [])
    assert set(score(annotations, found, np.arange(len(images)), DEFAULT).metrics.values()) == {None}


def test_score_counts_images_at_the_limit_of_detections():
    annotations = annotations_of([[(0, 0, 40, 40, 0, 0)]] * 3)
    found = table_of([(0, 0, 0, 40, 40, 0.9, 0)] * 2 + [(2, 0, 0, 40, 40, 0.9, 0)])
    evaluation = score(annotations, found, np.arange(3), DEFAULT, max_detections=2)
    assert (evaluation.max_detections, evaluation.capped_images) == (2, 1)
    assert "1 of 3 images reached the limit of 2 detections." in evaluation.remarks()
    assert score(annotations, found, np.arange(3), DEFAULT, max_detections=300).max_detections == 100


def test_the_limit_of_the_metrics_is_that_of_a_class():
    annotations = annotations_of([[(0, 0, 40, 40, 0, 0)]] * 3)
    two_classes = [(0, 0, 0, 40, 40, 0.9, 0), (0, 0, 0, 40, 40, 0.9, 1)]
    found = table_of(two_classes + [(2, 0, 0, 40, 40, 0.9, 1)] * 2)
    metrics = replace(DEFAULT, max_dets=(1, 2))
    for of_model, capped in ((100, 1), (2, 2)):
        evaluation = score(annotations, found, np.arange(3), metrics, max_detections=of_model)
        assert (evaluation.max_detections, evaluation.capped_images) == (2, capped)


def test_score_prints_nothing(capsys):
    annotations, found = random_scene(0, num_images=4)
    score(annotations, found, np.arange(4), DEFAULT)
    assert capsys.readouterr().out == ""


def test_detection_table_round_trips_through_a_results_file(tmp_path):
    annotations, found = random_scene(2)
    file = tmp_path / "predictions.json"
    rows = list(found.results(annotations))
    assert {row["category_id"] for row in rows} <= {3, 7, 11, 90}
    file.write_text(json.dumps(rows))
    back = DetectionTable.from_results(file, annotations)
    for name in ("images", "boxes", "scores", "labels"):
        np.testing.assert_array_equal(getattr(back, name), getattr(found, name))
    everything = np.arange(len(annotations))
    assert (
        score(annotations, back, everything, DEFAULT).metrics == score(annotations, found, everything, DEFAULT).metrics
    )


@pytest.mark.parametrize("change", [{"image_id": 5000}, {"category_id": 1}])
def test_detection_table_refuses_foreign_results(tmp_path, change):
    annotations, found = random_scene(2)
    file = tmp_path / "predictions.json"
    row = next(found.results(annotations))
    file.write_text(json.dumps([row, row | change]))
    with pytest.raises(ValueError, match=r"predictions\.json: image \d+, category \d+ is not in the annotations"):
        DetectionTable.from_results(file, annotations)


BOX = [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("results", "words"),
    [
        (
            {"images": [], "annotations": []},
            r"expected a list of detections .*, got a dict with 'images', 'annotations'",
        ),
        (3, "got int"),
        ([5], "detection 0: expected image_id, category_id, .* got a int"),
        ([{"image_id": 1, "category_id": 3, "bbox": BOX}], "detection 0: .* got no score"),
        ([{"bbox": BOX, "score": 1}], "got no image_id and no category_id"),
        ([{"image_id": [], "category_id": 3, "bbox": BOX, "score": 1}], r"got image_id \[\]"),
        ([{"image_id": 1, "category_id": 3, "bbox": BOX[:3], "score": 1}], r"got bbox \[1, 2, 3\]"),
        ([{"image_id": 1, "category_id": 3, "bbox": BOX, "score": None}], "got score None"),
        ([{"image_id": 1, "category_id": 3, "bbox": BOX, "score": float("nan")}], "got score nan"),
        ([{"image_id": 1, "category_id": 3, "bbox": BOX, "score": 10**400}], "got score 1000"),
        ([{"image_id": 1, "category_id": 3, "bbox": BOX, "score": "0.5"}], "got score '0.5'"),
        ([{"image_id": True, "category_id": 3, "bbox": BOX, "score": 1}], "got image_id True"),
    ],
)
def test_detection_table_refuses_results_of_another_format(tmp_path, results, words):
    file = tmp_path / "predictions.json"
    file.write_text(json.dumps(results))
    with pytest.raises(ValueError, match=rf"predictions\.json: .*{words}"):
        DetectionTable.from_results(file, random_scene(2)[0])


def test_detection_table_refuses_a_file_that_is_not_json(tmp_path):
    file = tmp_path / "predictions.json"
    file.write_bytes(b"[{\xff")
    with pytest.raises(ValueError, match=r"predictions\.json: expected COCO results in JSON"):
        DetectionTable.from_results(file, random_scene(2)[0])


def test_detection_table_joins_in_the_order_of_images():
    first, second = table_of([(2, 0, 0, 1, 1, 0.5, 0), (2, 0, 0, 2, 2, 0.4, 1)]), table_of([(1, 0, 0, 3, 3, 0.9, 0)])
    joined = DetectionTable.join([first, second])
    assert joined.images.tolist() == [1, 2, 2]
    assert joined.scores.tolist() == pytest.approx([0.9, 0.5, 0.4])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_dets": ()}, "max_dets: expected growing numbers"),
        ({"max_dets": (100, 10)}, r"got \[100, 10\]"),
        ({"max_dets": (0, 10)}, "from 1"),
        ({"area_ranges": {"s": (32, 0)}}, r"area_ranges\.s: expected \[smallest, largest\]"),
        ({"area_ranges": {"s": (32,)}}, r"got \[32\]"),
        ({"area_ranges": {"50": (0, 400)}}, "area_ranges: .* got two of the name AP50"),
        ({"area_ranges": {"s": (0, 9), "s1": (9, 99)}, "max_dets": (1, 11), "target": "proposals"}, "name ARs11"),
    ],
)
def test_config_refuses_invalid_values(arguments, words):
    with pytest.raises(ValueError, match=words):
        EvaluationConfig(**arguments)


@pytest.fixture
def coco128() -> tuple[Annotations, Path]:
    folder = Path(os.environ.get("FPN_DET_DATA", "nowhere")) / "coco128"
    if not folder.is_dir():
        pytest.skip("FPN_DET_DATA names no folder with coco128")
    file = folder / "annotations" / "instances_val2017.json"
    return read_annotations(file, folder / "val2017"), file


def test_score_of_the_ground_truth_of_real_images_is_one(coco128):
    annotations, _ = coco128
    metrics = score(annotations, perfect(annotations), np.arange(len(annotations)), DEFAULT).metrics
    assert all(metrics[name] == pytest.approx(1) for name in COCO_METRICS if name not in ("AR1", "AR10"))


def test_score_of_real_images_equals_pycocotools_from_files(coco128, tmp_path):
    annotations, file = coco128
    exact, rng = perfect(annotations), np.random.default_rng(0)
    boxes = (exact.boxes + rng.normal(0, 5, exact.boxes.shape)).astype(np.float32)
    labels = np.where(rng.random(len(exact)) < 0.8, exact.labels, rng.integers(80, size=len(exact)))
    found = DetectionTable(exact.images, boxes, rng.random(len(exact)).astype(np.float32), labels)
    predictions = tmp_path / "predictions.json"
    predictions.write_text(json.dumps(list(found.results(annotations))))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
        run = COCOeval(truth, truth.loadRes(str(predictions)), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    metrics = score(annotations, found, np.arange(len(annotations)), DEFAULT).metrics
    assert list(metrics.values()) == pytest.approx(run.stats.tolist(), abs=1e-12)
    assert 0.1 < metrics["AP"] < 0.9
