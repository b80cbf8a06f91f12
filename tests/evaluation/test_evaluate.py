from __future__ import annotations

import json
import multiprocessing
import os
import socket
from dataclasses import replace
from importlib import metadata

import numpy as np
import pytest
import torch
from torch import nn

from fpn_det.evaluation.coco import score
from fpn_det.evaluation.config import EvaluationConfig
from fpn_det.evaluation.detection_table import DetectionTable
from fpn_det.evaluation.evaluate import evaluate, evaluation_mode, replaced, to_host, write_evaluation
from fpn_det.models.roi_align import LevelAssigner
from fpn_det.runtime import process_group
from fpn_det.structures import Annotations, Batch, Detections, Targets

SETTINGS = EvaluationConfig()
NUM_IMAGES = 5


class Oracle(nn.Module):
    """Detector that returns the targets, except for images from `blind_from` on."""

    def __init__(self, blind_from: int = NUM_IMAGES) -> None:
        super().__init__()
        self.trained, self.frozen = nn.BatchNorm2d(3), nn.BatchNorm2d(3).eval()
        self.assigner, self.max_detections = LevelAssigner([4, 8, 16, 32]), 8
        self.blind_from = blind_from
        self.modes: list[bool] = []

    def detect(self, batch: Batch, views=None) -> Detections:
        self.modes.append(self.training or self.trained.training)
        seen = batch.targets.valid & (batch.indices < self.blind_from)[:, None]
        scores = torch.linspace(0.9, 0.5, batch.targets.valid.shape[1]).expand(len(batch), -1)
        return Detections(batch.targets.boxes, scores, batch.targets.labels, seen)


def annotations_of_images() -> Annotations:
    """Images of 100 x 200 px; image i has i objects."""
    counts = list(range(NUM_IMAGES))
    boxes = [[20.0 * j, 10.0 * i, 20.0 * j + 16, 10.0 * i + 30] for i in counts for j in range(i)]
    return Annotations(
        image_ids=torch.tensor([40, 0, 30, 10, 20]),
        path_bytes=torch.zeros(0, dtype=torch.uint8),
        path_offsets=torch.zeros(NUM_IMAGES + 1, dtype=torch.int64),
        sizes=torch.tensor([[100, 200]] * NUM_IMAGES),
        offsets=torch.tensor([0, *np.cumsum(counts)]),
        boxes=torch.tensor(boxes, dtype=torch.float64),
        labels=torch.tensor([j % 2 for i in counts for j in range(i)]),
        iscrowd=torch.zeros(len(boxes), dtype=torch.bool),
        area=torch.full((len(boxes),), 16.0 * 30, dtype=torch.float64),
        annotation_ids=torch.arange(len(boxes)),
        class_names=("cat", "dog"),
        category_ids=(17, 3),
    )


def batches_of(annotations: Annotations, images: list[int], scale: float = 2.0) -> list[Batch]:
    """Batch pairs of images whose input frame is `scale` times the original frame."""
    batches = []
    for start in range(0, len(images), 2):
        rows = images[start : start + 2]
        boxes = [annotations.boxes[annotations.rows(row)].float() * scale for row in rows]
        labels = [annotations.labels[annotations.rows(row)] for row in rows]
        sizes = annotations.sizes[rows]
        pixels = torch.zeros(len(rows), 3, 224, 416, dtype=torch.uint8)
        batches.append(Batch(pixels, (sizes * scale).long(), sizes, Targets.pad(boxes, labels), torch.tensor(rows)))
    return batches


def test_evaluate_scores_in_the_original_frame():
    annotations = annotations_of_images()
    evaluation = evaluate(Oracle(), batches_of(annotations, [3, 0, 1, 4, 2]), annotations, SETTINGS)
    assert evaluation.metrics["AP"] == pytest.approx(1)
    assert (evaluation.num_images, evaluation.max_detections, evaluation.capped_images) == (5, 8, 0)
    assert len(evaluation.detections) == len(annotations.boxes)
    assert evaluation.seconds > 0
    # 10 objects in 5 images, of 32 x 60 px in the input frame: all of the size of the finest level
    assert evaluation.statistics == {
        "detections/P2": 2.0,
        "detections/P3": 0.0,
        "detections/P4": 0.0,
        "detections/P5": 0.0,
    }


def test_evaluate_restores_the_mode_of_every_module():
    annotations, model = annotations_of_images(), Oracle().train()
    model.frozen.eval()
    evaluate(model, batches_of(annotations, [1, 2]), annotations, SETTINGS)
    assert model.modes == [False]
    assert (model.training, model.trained.training, model.frozen.training) == (True, True, False)
    with pytest.raises(RuntimeError), evaluation_mode(model):
        raise RuntimeError
    assert model.trained.training


def test_evaluate_refuses_a_duplicate_image():
    annotations = annotations_of_images()
    with pytest.raises(AssertionError, match="more than once"):
        evaluate(Oracle(), batches_of(annotations, [1, 2, 1]), annotations, SETTINGS)


def test_evaluate_without_images():
    evaluation = evaluate(Oracle(), [], annotations_of_images(), SETTINGS)
    assert evaluation.num_images == 0 and set(evaluation.metrics.values()) == {None}


def test_to_host_keeps_bits_and_drops_empty_slots():
    generator = torch.Generator().manual_seed(0)
    detections = Detections(
        boxes=torch.randn(3, 4, 4, generator=generator).exp(),
        scores=torch.rand(3, 4, generator=generator),
        labels=torch.randint(0, 90, (3, 4), generator=generator),
        valid=torch.tensor([[True, True, False, False], [False] * 4, [True, False, True, True]]),
    )
    images, table = to_host(detections, torch.tensor([70_000_000, 2, 5]))
    assert images.tolist() == [70_000_000, 2, 5]
    assert table.images.tolist() == [70_000_000, 70_000_000, 5, 5, 5]
    torch.testing.assert_close(torch.from_numpy(table.boxes), detections.boxes[detections.valid], rtol=0, atol=0)
    torch.testing.assert_close(torch.from_numpy(table.scores), detections.scores[detections.valid], rtol=0, atol=0)
    assert table.labels.tolist() == detections.labels[detections.valid].tolist()
    assert table.anchor_levels is None
    levels = torch.randint(0, 5, (3, 4), generator=generator)
    _, with_levels = to_host(replace(detections, anchor_levels=levels), torch.tensor([70_000_000, 2, 5]))
    assert with_levels.anchor_levels.tolist() == levels[detections.valid].tolist()
    assert (with_levels.boxes == table.boxes).all()
    # an empty table knows no levels, and hides none
    joined = DetectionTable.join([DetectionTable.join([]), with_levels.take(np.array([4, 0]))])
    assert joined.anchor_levels.tolist() == [levels[2, 3], levels[0, 0]]
    assert DetectionTable.join([table, with_levels]).anchor_levels is None


def test_to_host_of_no_slots():
    empty = Detections(torch.zeros(2, 0, 4), torch.zeros(2, 0), torch.zeros(2, 0).long(), torch.zeros(2, 0).bool())
    images, table = to_host(empty, torch.tensor([1, 2]))
    assert images.tolist() == [1, 2] and len(table) == 0 and table.boxes.shape == (0, 4)


def work(rank: int, port: int, answers) -> None:
    """Evaluate images 4, 1 and 3 on rank 0; images 2 and 0, without detections, on rank 1."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    annotations = annotations_of_images()
    with process_group("cpu", timeout_minutes=1):
        model = Oracle(blind_from=0 if rank else NUM_IMAGES)
        shard = [2, 0] if rank else [4, 1, 3]
        evaluation = evaluate(model, batches_of(annotations, shard), annotations, SETTINGS)
        answers.put(
            (rank, evaluation.metrics, evaluation.num_images, len(evaluation.detections), evaluation.statistics)
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_evaluate_refuses_weights_that_are_not_finite(value):
    annotations, model = annotations_of_images(), Oracle()
    model.register_buffer("weight", torch.tensor([1.0, value]))
    with pytest.raises(ValueError, match=r"^evaluate: expected finite weights, got NaN or infinity in weight\. Use"):
        evaluate(model, batches_of(annotations, [0, 1]), annotations, SETTINGS)


def test_evaluate_on_two_ranks_equals_one_process():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # not forked from this process, whose threads do not survive a fork
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    answers = context.Queue()
    processes = [context.Process(target=work, args=(rank, port, answers), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    results = sorted(answers.get(timeout=60) for _ in processes)

    annotations = annotations_of_images()
    alone = evaluate(Oracle(), batches_of(annotations, [1, 3, 4]), annotations, SETTINGS)
    expected = score(annotations, alone.detections, np.arange(NUM_IMAGES), SETTINGS).metrics
    statistics = {name: value * 3 / 5 for name, value in alone.statistics.items()}
    assert results == [(0, expected, 5, 8, statistics), (1, expected, 5, 0, statistics)]


def test_written_predictions_score_the_same(tmp_path):
    annotations = annotations_of_images()
    evaluation = evaluate(Oracle(blind_from=4), batches_of(annotations, [0, 1, 2, 3, 4]), annotations, SETTINGS)
    write_evaluation(tmp_path, evaluation, annotations, step=20, checkpoint="best.pt", weights="ema")

    record = json.loads((tmp_path / "metrics.json").read_text())
    assert {name: record[name] for name in evaluation.metrics} == evaluation.metrics
    assert record["APl"] is None
    assert (record["step"], record["checkpoint"], record["weights"]) == (20, "best.pt", "ema")
    engine, version = record["engine"].split()
    assert engine in ("pycocotools", "hotcoco") and version == metadata.version(engine)
    assert record["per_class"]["cat"]["AP"] == evaluation.per_class["cat"]["AP"]

    again = DetectionTable.from_results(tmp_path / "predictions.json", annotations)
    assert score(annotations, again, np.arange(NUM_IMAGES), SETTINGS).metrics == evaluation.metrics
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "metrics.jsonl", "predictions.json"}


def test_write_evaluation_replaces_lines_of_an_interrupted_run(tmp_path):
    annotations = annotations_of_images()
    evaluation = evaluate(Oracle(), batches_of(annotations, [1, 2]), annotations, SETTINGS)
    nothing = replace(evaluation, detections=DetectionTable.join([]))
    for step in (10, 20, 30, 20):
        write_evaluation(tmp_path, nothing, annotations, step, "last.pt", "raw")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20]
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads(lines[-1])
    assert json.loads((tmp_path / "predictions.json").read_text()) == []


def test_replaced_keeps_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), replaced(path) as file:
        file.write("ne")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
