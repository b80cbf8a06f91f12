"""Runs with the ingredients of recipes: they train, evaluate, and resume to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import BOX_LOSSES, TINY

TOGETHER = {
    "cascade": f"roi_head=cascade {BOX_LOSSES} suppression@model.roi_head.test_filter=soft_nms "
    "model.backbone.deformable=[5] model.backbone.stochastic_depth=0.5 optimizer.layer_decay=0.8",
    "dynamic": "roi_head=dynamic model.roi_head.interval=2 objectness_loss@model.rpn.cls_loss=focal trainer.accumulate=2",
}


def state_of(run: Path) -> dict[str, torch.Tensor]:
    state = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    return state["model"] | {f"ema.{name}": tensor for name, tensor in state["ema"].items()}


@pytest.mark.parametrize("words", TOGETHER.values(), ids=TOGETHER)
def test_a_run_with_ingredients_resumes_to_the_bit(words: str, run_tool, shapes_dataset, tmp_path):
    words = [*TINY, f"data.root={shapes_dataset}", "trainer.max_steps=4", "trainer.ema=0.9", *words.split()]
    straight = run_tool("train.py", *words, "run_dir=straight", "trainer.save_every=1 step", "trainer.keep_last=0")
    assert straight.returncode == 0, straight.stderr
    resumed = run_tool("train.py", *words, "run_dir=resumed", "resume=straight/checkpoints/step_00000003.pt")
    assert resumed.returncode == 0, resumed.stderr
    one, other = state_of(tmp_path / "straight"), state_of(tmp_path / "resumed")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    metrics = [json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("straight", "resumed")]
    assert metrics[0] == metrics[1]
