"""The commands `export`, `predict` and `eval`, one after the other, on an ONNX file."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny import TINY

from fpn_det import api


def columns(rows: list[dict]) -> np.ndarray:
    """Image, category, box and score of each detection, f64 [D, 7]."""
    return np.array([[row["image_id"], row["category_id"], *row["bbox"], row["score"]] for row in rows])


@pytest.mark.slow
def test_an_exported_file_is_predicted_and_evaluated_like_its_checkpoint(run_tool, shapes_dataset, tmp_path):
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    low = "model.roi_head.test_filter.score_threshold=0.01"
    # sides of at least 97 px, which a file does not pad to a canvas of its own
    resize = "data.eval_transforms.resize={_target_: fpn_det.data.transforms.ResizeShortestSide, sides: [128], max_side: 192}"
    api.train(
        [*TINY, f"data.root={shapes_dataset}", f"run_dir={tmp_path / 'run'}", "data.eval_batch_size=3", low, resize]
    )
    assert run_tool("export.py", "run=run").returncode == 0
    (exported,) = (tmp_path / "run").rglob("*.onnx")
    source = f"source={shapes_dataset / 'val2017'}"
    rows, metrics = {}, {}
    for name, checkpoint in (("torch", "run=run"), ("onnx", f"checkpoint={exported}")):
        result = run_tool("predict.py", checkpoint, source, "score=0", "draw=false", f"out={name}", "device=cpu")
        assert result.returncode == 0, result.stderr
        rows[name] = json.loads((tmp_path / name / "predictions.json").read_text())
        result = run_tool("eval.py", checkpoint, "device=cpu")
        assert result.returncode == 0, result.stderr
        folder = exported.name if name == "onnx" else "best"
        metrics[name] = json.loads((tmp_path / "run" / "eval" / folder / "metrics.json").read_text())
    (one, other) = (columns(rows[name]) for name in ("torch", "onnx"))
    tolerance = np.array([0, 0, 0.01, 0.01, 0.01, 0.01, 1e-4])
    same = (abs(one[:, None] - other) <= tolerance).all(axis=2)
    # scores of two steps are so close that another order of equal ones may exchange a few at the limit of detections
    assert len(one) == len(other) > 100 and same.any(axis=0).mean() > 0.98 and same.any(axis=1).mean() > 0.98
    assert metrics["onnx"]["weights"] == "exported"
    assert metrics["onnx"]["AP"] == pytest.approx(metrics["torch"]["AP"], abs=1e-4)
