"""A run with a weight that is not a number, and the replay of its dump."""

from __future__ import annotations

import shutil

import torch
from tiny import TINY

from fpn_det.runs.checkpoint import load_checkpoint, save_checkpoint


def test_replay_shows_losses_and_module_of_the_run(run_tool, shapes_dataset, tmp_path):
    data = shutil.copytree(shapes_dataset, tmp_path / "data")
    assert run_tool("train.py", *TINY, f"data.root={data}", "trainer.max_steps=1").returncode == 0
    path = tmp_path / "runs/demo/checkpoints/last.pt"
    state = load_checkpoint(path)
    state["model"]["roi_head.predictor.class_logits.weight"].view(-1)[0] = torch.nan
    save_checkpoint(path, {name: value for name, value in state.items() if name != "format"})

    failed = run_tool("train.py", *TINY, f"data.root={data}", "resume=auto", "run_dir=runs/demo")
    assert failed.returncode == 1
    assert failed.stderr.startswith("step 2: not finite: weight roi_head.predictor.class_logits.weight, roi_class=nan")
    assert (
        "First bad output: roi_head.predictor.class_logits." in failed.stderr
        and "fpn-det replay dump=runs/demo/nan_dump" in failed.stderr
    )
    assert len(failed.stderr.strip().splitlines()) == 1

    shutil.rmtree(data)
    replayed = run_tool("replay.py", "runs/demo/nan_dump")
    assert replayed.returncode == 0, replayed.stderr
    assert "step 2, rank 0 of 1, fp32" in replayed.stdout
    rows = [line.replace("\u2502", " ").split() for line in replayed.stdout.splitlines()]
    losses = {
        row[0]: row[1:] for row in rows if row and row[0] in ("rpn_objectness", "rpn_box", "roi_class", "roi_box")
    }
    assert len(losses) == 4 and all(then == now for then, now in losses.values())
    assert losses["roi_class"] == ["nan", "nan"] and losses["roi_box"][0] != "nan"

    refused = run_tool("replay.py", "nowhere")
    assert refused.returncode == 2 and "step.pt: expected a checkpoint, got no such file" in refused.stderr
