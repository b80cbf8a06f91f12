"""Fast R-CNN in two runs, as one types it: an RPN, its proposals on the training images, and a second stage on them."""

from __future__ import annotations

import json

from tiny import TINY


def test_a_second_stage_is_trained_on_the_proposals_of_an_rpn(shapes_dataset, run_tool, tmp_path):
    few = ["trainer.max_steps=1", "trainer.batch_size=2", "data.max_images=4", "data.eval_batch_size=4"]
    common = [*TINY, f"data.root={shapes_dataset}", "data.val=${data.train}", *few]
    rpn = ["run_dir=rpn", "model.roi_head=null", "evaluation=proposals", "trainer.best_metric=ARs300"]
    trained = run_tool("train.py", *common, *rpn)
    assert trained.returncode == 0, trained.stderr
    scored = run_tool("eval.py", "run=rpn", "evaluation=proposals", "split=train", "model.rpn.test_filter.post_nms=60")
    assert scored.returncode == 0, scored.stderr
    file = tmp_path / "rpn" / "eval" / "best_train_proposals" / "predictions.json"
    counts = [row["image_id"] for row in json.loads(file.read_text())]
    assert {counts.count(image_id) for image_id in (1, 2, 3, 4)} == {60} and len(counts) == 240
    predicted = run_tool("predict.py", "run=rpn", f"source={shapes_dataset / 'val2017'}", "score=0", "draw=false")
    assert predicted.returncode == 0, predicted.stderr
    assert "Set model.rpn.test_filter.post_nms=<number>" in predicted.stdout
    described = json.loads((tmp_path / "predictions" / "images.json").read_text())
    assert described["categories"] == [{"id": 1, "name": "object"}]

    files = f"data.proposals={{train: {file}, val: {file}, test: null, train_limit: 50, eval_limit: 50}}"
    trained = run_tool("train.py", *common, "run_dir=fast", "model.rpn=null", files)
    assert trained.returncode == 0, trained.stderr
    metrics = json.loads((tmp_path / "fast" / "metrics.json").read_text())
    assert metrics["AP"] is not None and metrics["num_images"] == 4
