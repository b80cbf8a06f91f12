from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from fpn_det.annotations.config import SplitConfig
from fpn_det.cli.help import COMMANDS
from fpn_det.cli.launch import argument
from fpn_det.data.config import DataConfig
from fpn_det.runs.folder import RunFolder
from fpn_det.training.next_steps import next_steps


@pytest.fixture
def data(shapes_dataset, tmp_path) -> DataConfig:
    root = shutil.copytree(shapes_dataset, tmp_path / "shapes")
    splits = {
        split: SplitConfig(str(root / f"{split}2017"), str(root / "annotations" / f"instances_{split}2017.json"))
        for split in ("train", "val", "test")
    }
    return DataConfig(str(root), **splits)


def test_commands_that_follow_exist_and_are_ready_to_paste(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = next_steps(tmp_path / "runs" / "my demo", data, {})
    assert commands[0] == "fpn-det eval 'run=runs/my demo'"  # there is no test split
    names = [command.split()[1] for command in commands]
    assert names == ["eval", "report", "predict", "export"] and set(names) <= set(COMMANDS)


@pytest.mark.parametrize("name", ["rü ns/f3", "runs (2)", "~a", "a=b,c", "it's", "[x]", "7"])
def test_commands_for_any_folder_are_understood_when_pasted(name, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = RunFolder(Path(name))
    for command, setting in [(next_steps(folder.path, data, {})[0], "run"), (folder.resume_command(), "resume")]:
        monkeypatch.setattr(sys, "argv", shlex.split(command)[1:])
        assert argument(setting) == name


@pytest.mark.parametrize(
    ("absent", "commands"), [("rpn", ["eval", "report"]), ("roi_head", ["eval", "predict", "export"])]
)
def test_what_half_a_detector_cannot_do_is_left_out(absent, commands, data, tmp_path):
    assert [step.split()[1] for step in next_steps(tmp_path, data, {absent: None})] == commands


@pytest.mark.parametrize("absent", ["", "rpn"])
def test_the_export_is_left_out_where_it_refuses_the_images(absent, data, tmp_path):
    other = dataclasses.replace(data, channels=4, dtype="uint16")
    names = [step.split()[1] for step in next_steps(tmp_path, other, {absent: None})]
    assert names == ["eval", "report", *["predict"] * (not absent)]


def test_a_test_split_with_annotations_is_evaluated_next(data, tmp_path):
    val, test = (tmp_path / "shapes" / "annotations" / f"instances_{split}2017.json" for split in ("val", "test"))
    shutil.copy(val, test)
    shutil.copytree(tmp_path / "shapes" / "val2017", tmp_path / "shapes" / "test2017")
    steps = next_steps(tmp_path, data, {})
    assert [step.endswith(" split=test") for step in steps] == [True, True, False, False]
    document = json.loads(test.read_text())
    test.write_text(json.dumps({name: document[name] for name in ("images", "categories")}))
    assert not data.has_annotations("test")


def test_images_of_all_splits_in_one_folder_are_no_test_split(tmp_path):
    (tmp_path / "data.yaml").write_text("path: .\ntrain: images\nval: images\nnames: [cell]\n")
    (tmp_path / "images").mkdir()
    source = SplitConfig(annotations=str(tmp_path))
    assert not DataConfig(str(tmp_path), source, source, source).has_annotations("test")
