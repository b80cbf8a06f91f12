from __future__ import annotations

import csv
import json
import re

from tiny import TINY


def test_report_of_a_run_and_against_itself(run_tool, shapes_dataset, tmp_path):
    trained = run_tool("train.py", *TINY, f"data.root={shapes_dataset}", "trainer.max_steps=1", "run_dir=run")
    assert trained.returncode == 0, trained.stderr
    done = run_tool("report.py", "run=run", "against=run")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run" / "report"
    page = (folder / "index.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "http" not in page.replace("http-equiv", "")
    assert "not distinguishable" in page and "Confusion matrix" in page
    classes = list(csv.DictReader((folder / "per_class.csv").open()))
    for row in classes:
        assert int(row["hits"]) + int(row["missed"]) == int(row["objects"])
        assert int(row["hits"]) + int(row["false"]) == int(row["detections"])
    errors = list(csv.DictReader((folder / "errors.csv").open()))
    assert {row["by"] for row in errors} == {"all", "size", "level", "class"}
    suspects = json.loads((folder / "suspects.json").read_text())
    assert len(suspects["annotations"]) == len(list(csv.DictReader((folder / "suspects.csv").open())))


def test_a_mistake_ends_in_one_sentence(run_tool):
    refused = run_tool("report.py", "checkpoint=nowhere.pt")
    assert refused.returncode == 2 and refused.stderr.strip() == "nowhere.pt: expected a checkpoint, got no such file."
