"""Settings that make the demo small enough for a test: steps of a fraction of a second."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fpn_det.models.detector import Detector
from fpn_det.training.config import TrainConfig

ROOT = Path(__file__).parent.parent

# The demo with a backbone that needs no other package and learns from scratch.
SCRATCH = (
    "experiment=demo",
    "backbone=resnet",
    "model.backbone.depth=18",
    "model.backbone.weights=null",
    "trainer.ema=null",
)

TINY = (
    *SCRATCH,
    "device=cpu",
    "data.num_workers=0",
    "model.neck.channels=32",
    "model.roi_head.box_head.width=64",
    "trainer.max_steps=2",
    "trainer.batch_size=4",
)


def state_of(
    config: TrainConfig, model: Detector, class_names: Sequence[str], category_ids: Sequence[int]
) -> dict[str, Any]:
    """The parts of a checkpoint that describe a detector, as far as evaluation, prediction and export read it."""
    return {
        "model": model.state_dict(),
        "ema": None,
        "progress": {"step": 5},
        "class_names": list(class_names),
        "category_ids": list(category_ids),
        "score_thresholds": {"overall": 0.1, "classes": {}},
        "config": config.to_yaml(),
    }


# Words that turn on each ingredient of a recipe.
BOX_LOSSES = "box_loss@model.roi_head.box_loss=ciou box_loss@model.rpn.box_loss=giou"
INGREDIENTS = (
    "roi_head=cascade",
    BOX_LOSSES,
    "box_loss@model.roi_head.box_loss=iou box_loss@model.rpn.box_loss=diou objectness_loss@model.rpn.cls_loss=focal",
    "cls_loss@model.roi_head.cls_loss=weighted_cross_entropy model.roi_head.cls_loss.class_weights=[1,2,3,0.5]",
    "roi_head=dynamic model.roi_head.interval=3",
    "model.backbone.deformable=[4,5] model.backbone.stochastic_depth=0.1",
    "suppression@model.roi_head.test_filter=soft_nms",
)
