"""The rows of the FPN paper's tables: each composes, counts its anchors as the paper does, trains a step and is scored."""

from __future__ import annotations

import json

import pytest
import torch

from fpn_det.composition import CONFIGS, compose
from fpn_det.evaluation.config import EvaluationConfig
from fpn_det.evaluation.evaluate import evaluate
from fpn_det.runtime import Ranks
from fpn_det.schema import build

ROWS = sorted(path.stem for path in (CONFIGS / "experiment" / "paper").glob("*.yaml"))
ANCHORS = {"a": 47_000, "b": 12_000, "c": 200_000, "d": 200_000, "e": 200_000, "f": 750_000}  # of 800 x 1000 px

SMALL = (
    "device=cpu",
    "data.num_workers=0",
    "data.max_images=2",
    "data.eval_batch_size=2",
    "data.train_transforms.resize.sides=[96]",
    "data.eval_transforms.resize.sides=[96]",
    "model.backbone.depth=18",
    "model.backbone.weights=null",
    "trainer.batch_size=2",
)
FEW_PROPOSALS = ("model.rpn.train_filter.post_nms=20", "model.rpn.test_filter.post_nms=20")
FEW_SAMPLES = ("model.roi_head.sampler.num_samples=8",)
LESS = {
    "table1": FEW_PROPOSALS,
    "table2": ("data.proposals.train_limit=20", "data.proposals.eval_limit=20", *FEW_SAMPLES),
    "table3": FEW_PROPOSALS + FEW_SAMPLES,
    "table5": FEW_PROPOSALS + FEW_SAMPLES,
}


@pytest.fixture(scope="session")
def saved_proposals(shapes_dataset) -> list[str]:
    """Settings that name a file of proposals for each part: the objects themselves."""
    settings = []
    for split in ("train", "val"):
        rows = json.loads((shapes_dataset / "annotations" / f"instances_{split}2017.json").read_text())["annotations"]
        path = shapes_dataset / f"proposals_{split}.json"
        path.write_text(json.dumps([{"image_id": row["image_id"], "bbox": row["bbox"], "score": 0.5} for row in rows]))
        settings.append(f"data.proposals.{split}={path}")
    return settings


def test_every_row_is_there():
    tables = {"table1": "abcdef", "table2": "abcdef", "table3": "abc"}
    assert {f"{table}_{row}" for table, rows in tables.items() for row in rows} <= set(ROWS)


@pytest.mark.parametrize("row", ANCHORS)
def test_table_1_has_the_anchors_of_the_paper(row):
    model = compose([f"experiment=paper/table1_{row}", *SMALL]).build_model(80)
    sizes = torch.tensor([[800, 1000]])
    canvas = [-(-side // model.stride) * model.stride for side in sizes[0].tolist()]
    shapes = [(-(-canvas[0] // stride), -(-canvas[1] // stride)) for stride in model.neck.strides]
    assert len(model.rpn.anchors(shapes)) == pytest.approx(ANCHORS[row], rel=0.03)


@pytest.mark.parametrize("row", ROWS)
def test_every_row_trains_a_step_and_is_scored(row, shapes_dataset, saved_proposals):
    torch.manual_seed(0)
    proposals = saved_proposals if row.startswith("table2") else []
    settings = compose([f"experiment=paper/{row}", f"data.root={shapes_dataset}", *SMALL, *LESS[row[:6]], *proposals])
    ranks, device = Ranks(), torch.device("cpu")
    data = settings.data.read_train_and_val(settings.seed)
    train, val = data.train, data.val
    model = settings.build_model(train.num_classes)
    (batch,) = settings.train_loader(train, model.stride, ranks, device).rebuild(0)
    optimizer = build(settings.optimizer, "optimizer").build(model, settings.trainer.batch_size)
    before = [parameter.clone() for parameter in model.parameters()]
    losses = model(batch, 0)
    losses.total().backward()
    optimizer.step()
    assert losses.total().isfinite()
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    loader = settings.eval_loader(val, model.stride, ranks, device)
    evaluation = evaluate(model, loader, val, settings.evaluation)
    assert evaluation.num_images == 2 and evaluation.metrics[settings.trainer.best_metric] is not None
    if model.rpn and model.roi_head:  # a whole detector is also scored by its proposals
        evaluation = evaluate(model, loader, val, EvaluationConfig((10, 20), target="proposals"))
        assert set(evaluation.metrics) >= {"AR10", "AR20", "ARs20"} and len(evaluation.detections) == 40
