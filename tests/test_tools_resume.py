"""Resuming a run from the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import ROOT, SCRATCH, TINY

from fpn_det import api


def metrics(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text())


def weights_after(run: Path, step: int) -> dict:
    """All tensors of a checkpoint, by name."""
    state = torch.load(run / "checkpoints" / f"step_{step:08d}.pt", weights_only=True)
    optimizer = {
        f"{name}.{slot}": tensor
        for name, slots in state["optimizer"]["state"].items()
        for slot, tensor in slots.items()
    }
    return state["model"] | {f"ema.{name}": tensor for name, tensor in (state["ema"] or {}).items()} | optimizer


def last_step(run: Path) -> int:
    return torch.load(run / "checkpoints" / "last.pt", weights_only=True)["progress"]["step"]


def check_resume(run_tool, tmp_path: Path, words: list[str]) -> None:
    straight = run_tool("train.py", *words, "run_dir=straight", "trainer.save_every=1 steps", "trainer.keep_last=0")
    assert straight.returncode == 0, straight.stderr
    resumed = run_tool("train.py", *words, "run_dir=resumed", "resume=straight/checkpoints/step_00000003.pt")
    assert resumed.returncode == 0, resumed.stderr
    one, other = weights_after(tmp_path / "straight", 4), weights_after(tmp_path / "resumed", 4)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "resumed")


@pytest.mark.parametrize(
    ("workers", "settings"),
    [
        (2, ["precision=bf16", "trainer.accumulate=2"]),
        pytest.param(0, ["trainer.accumulate=1"], marks=pytest.mark.slow),
        pytest.param(1, ["data.tile.size=80"], marks=pytest.mark.slow),
    ],
)
def test_resumed_run_equals_the_uninterrupted_one_to_the_bit(run_tool, shapes_dataset, tmp_path, workers, settings):
    """8 images, 4 per step: step 3 is in the midst of the second epoch."""
    words = [
        *TINY,
        f"data.root={shapes_dataset}",
        "trainer.max_steps=4",
        "trainer.ema=0.9",
        f"data.num_workers={workers}",
        *settings,
    ]
    check_resume(run_tool, tmp_path, words)


@pytest.mark.slow
def test_a_run_with_a_backbone_of_timm_resumes_to_the_bit(run_tool, shapes_dataset, tmp_path):
    """Its stochastic depth draws from torch's generator."""
    pytest.importorskip("timm", reason="needs the extra timm")
    backbone = ("name=convnext_atto", "weights=null", "weights_by=name", "frozen_stages=0", "drop_path=0.5")
    words = [
        "experiment=finetune_small",
        *(f"model.backbone.{word}" for word in backbone),
        *(word for word in TINY if word not in SCRATCH),
        f"data.root={shapes_dataset}",
        "data.train_transforms.resize.sides=[96]",
        "data.eval_transforms.resize.sides=[96]",
        "schedule.warmup_steps=1",
        "trainer.max_steps=4",
        "trainer.ema=0.9",
    ]
    check_resume(run_tool, tmp_path, words)


@pytest.mark.slow
def test_torchrun_restarts_a_killed_run_and_it_resumes(shapes_dataset, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", "--max-restarts=1", "--standalone"]
    words = [
        *TINY,
        f"data.root={shapes_dataset}",
        "run_dir=run",
        "resume=auto",
        "set_aside=false",
        "trainer.max_steps=6",
        "trainer.save_every=1 steps",
    ]
    launcher = subprocess.Popen([*command, str(ROOT / "tools" / "train.py"), *words], cwd=tmp_path)
    while not (tmp_path / "run/checkpoints/last.pt").exists():
        assert launcher.poll() is None
        time.sleep(0.02)
    rank = int((tmp_path / "run/.lock").read_text().split()[1])
    os.kill(rank, signal.SIGKILL)
    assert launcher.wait(timeout=300) == 0
    assert "Resuming after step" in (tmp_path / "run/log.txt").read_text()
    assert metrics(tmp_path / "run")["step"] == 6


def test_resuming_takes_everything_from_the_run_and_tells_what_is_typed(run_tool, shapes_dataset, tmp_path):
    first = run_tool("train.py", *TINY, f"data.root={shapes_dataset}", "trainer.max_steps=1", "run_dir=runs/mine")
    assert first.returncode == 0, first.stderr
    more = run_tool("train.py", "resume=runs/mine", "trainer.max_steps=2")
    assert more.returncode == 0, more.stderr
    assert metrics(tmp_path / "runs/mine")["step"] == 2
    told = more.stdout[more.stdout.index("Settings have changed") :].splitlines()[2:3]
    assert [line.split() for line in told] == [["trainer.max_steps", "1", "2", "yes"]]


def test_a_start_that_fails_leaves_the_folders_as_they_were(run_tool, tmp_path):
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/log.txt").touch()
    failed = run_tool("train.py", *TINY, "data.root=nowhere", "run_dir=runs/mine", "set_aside=true")
    assert failed.returncode == 2 and len(failed.stderr.strip().splitlines()) == 1
    left = {str(path.relative_to(tmp_path)) for path in (tmp_path / "runs").rglob("*")}
    assert left - {"runs/mine/.lock"} == {"runs/mine", "runs/mine/log.txt"}


@pytest.mark.parametrize(("split", "kept"), [("train", False), ("val", True)])
def test_a_run_that_fails_is_kept_from_its_first_step_on(run_tool, shapes_dataset, tmp_path, split, kept):
    """The first batch cannot be read, or the first evaluation after a step; neither has saved a checkpoint."""
    data = shutil.copytree(shapes_dataset, tmp_path / "data")
    for image in (data / f"{split}2017").iterdir():
        image.write_bytes(image.read_bytes()[:100])
    words = [*TINY, "data.root=data", "data.check=false", "trainer.max_steps=3", "trainer.eval_every=1 steps"]
    failed = run_tool("train.py", *words, "trainer.save_every=null", "run_dir=runs/mine")
    assert failed.returncode in (1, 2) and len(failed.stderr.strip().splitlines()) == 1, failed.stderr
    assert (tmp_path / "runs/mine/log.txt").is_file() == kept and (tmp_path / "runs/mine").exists() == kept
    assert not (tmp_path / "runs/mine/checkpoints/last.pt").exists()


def test_a_run_that_started_from_weights_resumes_without_them(tmp_path, monkeypatch, shapes_dataset):
    monkeypatch.chdir(tmp_path)
    words = [*TINY, f"data.root={shapes_dataset}", "trainer.report=false"]
    source = api.train([*words, "trainer.max_steps=1", "run_dir=source"]) / "checkpoints" / "last.pt"
    started = [*words, f"init_from={source}", "run_dir=run", "resume=auto"]
    api.train([*started, "trainer.max_steps=1"])  # the command of a launcher that restarts: nothing to resume yet
    source.unlink()
    api.train([*started, "trainer.max_steps=2"])
    assert last_step(tmp_path / "run") == 2
    api.train([*words, "resume=run", "run_dir=run", "trainer.max_steps=3"])
    assert last_step(tmp_path / "run") == 3


def test_a_refused_resume_leaves_the_settings_of_the_run(tmp_path, monkeypatch, shapes_dataset):
    monkeypatch.chdir(tmp_path)
    words = [*TINY, f"data.root={shapes_dataset}", "trainer.report=false"]
    run = api.train([*words, "trainer.max_steps=1", "run_dir=run"])
    before = (run / "config.yaml").read_text(), (run / "overrides.txt").read_text()
    for changed in ("model.neck.channels=16", "optimizer=sgd optimizer.lr=0.01 optimizer.weight_decay=0"):
        with pytest.raises(ValueError, match=r"^resume: expected a checkpoint of "):
            api.train([*words, "trainer.max_steps=2", *changed.split(), "run_dir=run", "resume=auto"])
        assert ((run / "config.yaml").read_text(), (run / "overrides.txt").read_text()) == before
