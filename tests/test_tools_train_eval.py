"""The command line, as a person uses it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import ROOT, TINY

from fpn_det.runs.checkpoint import load_checkpoint, save_checkpoint


def read(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_train_then_eval_then_train_again_with_the_same_settings(run_tool, shapes_dataset, tmp_path):
    trained = run_tool("train.py", *TINY, f"data.root={shapes_dataset}", "trainer.ema=0.9")
    assert trained.returncode == 0, trained.stderr
    run = tmp_path / "runs" / "demo"
    assert {"config.yaml", "metrics.json", "metrics.jsonl", "predictions.json", "log.txt"} <= {
        item.name for item in run.iterdir()
    }
    assert {"last.pt", "best.pt", "step_00000002.pt"} <= {item.name for item in (run / "checkpoints").iterdir()}
    assert list(run.glob("events.out.tfevents.*"))
    assert "\r" not in trained.stdout + (run / "log.txt").read_text()
    assert "runs/demo" in trained.stdout and "tensorboard" in trained.stdout

    before = (run / "metrics.json").read_text()
    scored = run_tool("eval.py", "run=runs/demo")
    assert scored.returncode == 0, scored.stderr
    found, expected = read(run / "eval" / "best"), read(run)
    for name in ("AP", "AP50", "AR100", "per_class", "weights", "step"):
        assert found[name] == expected[name], name
    assert found["weights"] == "ema"
    assert (run / "metrics.json").read_text() == before

    assert found["changed_settings"] == expected["changed_settings"] == {}
    other = run_tool("eval.py", "run=runs/demo", "model.roi_head.test_filter.score_threshold=0.3", "data.num_workers=1")
    assert other.returncode == 0, other.stderr
    changed = read(run / "eval" / "best")["changed_settings"]
    assert changed == {"model.roi_head.test_filter.score_threshold": 0.3}
    run_tool("eval.py", "run=runs/demo")

    augmented = run_tool("eval.py", "run=runs/demo", "tta.scales=[0.5,1]", "tta.flip=true")
    assert augmented.returncode == 0, augmented.stderr
    assert read(run / "eval" / "best_tta")["AP"] is not None and read(run / "eval" / "best") == found

    tiled = run_tool("eval.py", "run=runs/demo", "tile.size=100")
    assert tiled.returncode == 0, tiled.stderr
    assert read(run / "eval" / "best_tile100")["num_images"] == 8 and read(run / "eval" / "best") == found

    other = run_tool(
        "eval.py",
        "checkpoint=runs/demo/checkpoints/last.pt",
        "weights=raw",
        "split=test",
        f"data.test.images={shapes_dataset}/val2017",
        f"data.test.annotations={shapes_dataset}/annotations/instances_val2017.json",
    )
    assert other.returncode == 0, other.stderr
    assert read(run / "eval" / "last_test")["weights"] == "raw"

    state = load_checkpoint(run / "checkpoints" / "last.pt")
    state["model"]["backbone.conv1.weight"][:] = float("nan")
    save_checkpoint(tmp_path / "broken.pt", state)
    broken = run_tool("eval.py", "checkpoint=broken.pt", "weights=raw")
    assert broken.returncode == 2
    assert "broken.pt: expected finite weights, got NaN or infinity in backbone.conv1.weight." in broken.stderr

    again = run_tool("train.py", "run=runs/demo", "run_dir=again", "trainer.ema=null", "trainer.max_steps=1")
    assert again.returncode == 0, again.stderr
    old, new = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (run, tmp_path / "again"))
    assert new["run"] == "runs/demo" and new["trainer"]["ema"] is None
    assert old["model"] == new["model"] and old["data"] == new["data"]

    refused = run_tool("train.py", "run=runs/demo", "run_dir=again")
    assert refused.returncode == 2 and "again" in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("tool", "arguments", "words"),
    [
        ("train.py", ["experiment=demo", "trainer.epoch=3"], "Did you mean trainer.epochs?"),
        ("train.py", ["experiment=demo", "data.root=nowhere"], "nowhere"),
        ("train.py", ["run=nowhere"], "run: expected the folder of a run, got nowhere"),
        ("eval.py", [], "expected either run=<folder> or checkpoint=<file>"),
        ("eval.py", ["checkpoint=."], "expected a file, got the folder .. Set run=<folder>"),
        ("eval.py", [f"run={__file__}"], f"got the file {__file__}. Set checkpoint=<file>"),
        ("eval.py", ["checkpoint=nowhere.pt"], "nowhere.pt: expected a checkpoint, got no such file."),
    ],
)
def test_a_mistake_ends_in_one_sentence_and_exit_code_2(run_tool, tmp_path, tool, arguments, words):
    result = run_tool(tool, *arguments)
    assert result.returncode == 2
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
def test_two_ranks_leave_one_run_folder_and_score_like_one_process(run_tool, shapes_dataset, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(ROOT / "tools" / "train.py")]
    subprocess.run([*command, *TINY, f"data.root={shapes_dataset}", "run_dir=null"], cwd=tmp_path, check=True)
    (run,) = (tmp_path / "runs" / "demo").iterdir()
    scored = run_tool("eval.py", f"run={run}")
    assert scored.returncode == 0, scored.stderr
    # the counts of detections may differ: after two steps a hundred equal scores compete for the last places
    one, two = read(run / "eval" / "best"), read(run)
    assert [one[name] for name in ("AP", "AP50", "AR100")] == [two[name] for name in ("AP", "AP50", "AR100")]


@pytest.mark.slow
def test_a_sweep_gives_every_job_a_folder(run_tool, shapes_dataset, tmp_path):
    settings = [f"data.root={shapes_dataset}", "trainer.max_steps=1", "optimizer.lr=0.01,0.02"]
    swept = run_tool("train.py", "-m", *TINY, *settings)
    assert swept.returncode == 0, swept.stderr
    (sweep,) = (tmp_path / "runs" / "sweeps").iterdir()
    configs = [yaml.safe_load((sweep / job / "config.yaml").read_text()) for job in "01"]
    assert [config["optimizer"]["lr"] for config in configs] == [0.01, 0.02]
    assert [line.split(",")[:2] for line in (sweep / "results.csv").read_text().splitlines()[1:]] == [
        ["0", "finished"],
        ["1", "finished"],
    ]
    listed = run_tool("runs.py")
    assert "optimizer.lr" in listed.stdout and f"{sweep.relative_to(tmp_path / 'runs')}/1" in listed.stdout


@pytest.mark.slow
def test_one_batch_can_be_overfitted(run_tool, tmp_path, shapes_dataset):
    trained = run_tool("train.py", "experiment=debug_overfit", f"data.root={shapes_dataset}", "run_dir=run")
    assert trained.returncode == 0, trained.stderr
    assert read(tmp_path / "run")["AP50"] > 0.9


def test_a_bad_image_costs_that_image_and_no_more(run_tool, shapes_dataset, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(shapes_dataset, data)
    (bad, *_) = sorted((data / "train2017").iterdir())
    bad.write_bytes(bad.read_bytes()[:100])
    command = (
        *TINY,
        f"data.root={data}",
        "data.check=false",
        "data.on_error=skip",
        "data.keep_empty=true",
        "data.num_workers=1",
    )
    skipped = run_tool("train.py", *command)
    assert skipped.returncode == 0, skipped.stderr
    run = tmp_path / "runs" / "demo"
    (line,) = (run / "bad_files.txt").read_text().splitlines()
    assert line.startswith(f"{bad}\t{bad}: expected a complete image")
    assert (run / "log.txt").read_text().count("skipped:") == 1
    (events,) = run.glob("events.out.tfevents.*")
    assert b"machine/bad_files" in events.read_bytes()
    (bad_val, *_) = sorted((data / "val2017").iterdir())
    bad_val.write_bytes(bad_val.read_bytes()[:100])
    evaluated = run_tool("eval.py", f"run={run}", "data.max_bad_fraction=0.2")
    assert evaluated.returncode == 0, evaluated.stderr
    assert f"skipped: {bad_val}" in evaluated.stdout
    (line,) = (run / "eval" / "best" / "bad_files.txt").read_text().splitlines()
    assert line.startswith(f"{bad_val}\t{bad_val}: expected a complete image")
    strict = run_tool("train.py", *command, "data.max_bad_fraction=0.01")
    assert strict.returncode == 2 and strict.stderr.startswith(
        "data.max_bad_fraction: expected at most 0.01 of 16 images"
    )
