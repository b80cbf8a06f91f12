from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

from tiny import TINY

from fpn_det.run_report import name_of


def test_report_of_a_run_and_against_itself(run_tool, shapes_dataset, tmp_path):
    trained = run_tool("train.py", *TINY, f"data.root={shapes_dataset}", "trainer.max_steps=1", "run_dir=run")
    assert trained.returncode == 0, trained.stderr
    folder = tmp_path / "run" / "report"
    page = (folder / "index.html").read_text()  # of the last evaluation
    assert all(title in page for title in ("Losses over the step", "Learning rate over the step", "Versions and speed"))
    done = run_tool("report.py", "run=run", "against=run")
    assert done.returncode == 0, done.stderr
    page = (folder / "index.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "http" not in page.replace("http-equiv", "")
    assert "not distinguishable" in page and "Confusion matrix" in page
    classes = list(csv.DictReader((folder / "per_class.csv").open()))
    for row in classes:
        assert int(row["hits"]) + int(row["missed"]) == int(row["objects"])
        assert int(row["hits"]) + int(row["false"]) == int(row["detections"])
    errors = list(csv.DictReader((folder / "errors.csv").open()))
    assert {row["by"] for row in errors} == {"all", "size", "level", "proposed by", "class"}
    levels = list(csv.DictReader((folder / "levels.csv").open()))
    assert [row["level"] for row in levels] == ["P2", "P3", "P4", "P5", "P6"]
    assert sum(int(row["proposed: hits"]) for row in levels) == sum(int(row["hits"]) for row in classes)
    suspects = json.loads((folder / "suspects.json").read_text())
    assert suspects["annotations"] and "proposed by the detector" in page
    assert len(suspects["annotations"]) == len(list(csv.DictReader((folder / "suspects.csv").open())))

    shutil.copytree(tmp_path / "run" / "checkpoints", tmp_path / "copy" / "run" / "checkpoints")
    done = run_tool("report.py", "run=run", "against=copy/run", "evaluation.max_dets=[1,10,50]", "tta.flip=true")
    assert done.returncode == 0, done.stderr
    assert all(f"results in {run}/eval/best_tta\n" in done.stdout for run in ("run", "copy/run"))
    assert done.stdout.count("AR50") == 2  # of both
    assert "AP of run - AP of copy/run is +0.000, on 8 images" in (page := (folder / "index.html").read_text())
    assert "<td>evaluation.max_dets=[1,10,50] tta.flip=true</td>" in page.replace(' class="text"', "")
    refused = run_tool("report.py", "run=run", "against=nowhere")
    assert refused.returncode == 2 and "got nowhere, which does not exist" in refused.stderr and not refused.stdout


def test_a_run_has_a_name_from_within_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert name_of(Path()) == name_of(Path("deep/..")) == tmp_path.name and name_of(Path("runs/demo")) == "demo"


def test_a_report_that_fails_does_not_end_the_run(run_tool, shapes_dataset, tmp_path, monkeypatch):
    def fail(*arguments: object) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr("fpn_det.run_report.write_run_report", fail)
    trained = run_tool("train.py", *TINY, f"data.root={shapes_dataset}", "trainer.max_steps=1", "run_dir=run")
    assert trained.returncode == 0, trained.stderr
    assert "The report could not be written: RuntimeError: no room" in (tmp_path / "run" / "log.txt").read_text()


def test_a_mistake_ends_in_one_sentence(run_tool):
    refused = run_tool("report.py", "checkpoint=nowhere.pt")
    assert refused.returncode == 2 and refused.stderr.strip() == "nowhere.pt: expected a checkpoint, got no such file."
