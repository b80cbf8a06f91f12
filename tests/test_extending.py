"""Parts of a user's own, exactly as docs/extending.md shows them: its files are written, and its commands are run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from tiny import ROOT

from fpn_det import api

PAGE = (ROOT / "docs" / "extending.md").read_text()
FEW = (
    "device=cpu",
    "data.num_workers=0",
    "trainer.max_steps=1",
    "trainer.batch_size=2",
    "data.max_images=2",
    "data.train_transforms.resize=null",
    "data.eval_transforms.resize=null",
    "run_dir=run",
)


def written(part: str, folder: Path) -> list[str]:
    """Write the files of a part into `folder`, and return the words of its command."""
    section = re.search(rf"## A {part}\n(.*?)(\n## |\Z)", PAGE, re.DOTALL)
    assert section is not None
    *texts, command = re.findall(r"```\w*\n(.*?)```", section[1], re.DOTALL)
    assert sum(len(text.splitlines()) for text in (*texts, command)) <= 30
    for name, text in zip(re.findall(r"`(my_\S+)`:\n", section[1]), texts, strict=True):
        path = folder / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    search, program, verb, *words = shlex.split(command)
    assert (search, program, verb) == ("PYTHONPATH=.", "fpn-det", "train")
    return [*words, *(word for word in FEW if word.split("=")[0] not in command)]


@pytest.mark.parametrize(
    ("part", "target"),
    [
        ("neck", "my_package.necks.Plain"),
        ("backbone", "my_package.backbones.Strided"),
        ("loss", "my_package.losses.SquaredDIoU"),
    ],
)
def test_a_part_is_added_by_the_files_and_the_command_of_the_page(
    part, target, tmp_path, monkeypatch, shapes_dataset, run_tool
):
    words = written(part, tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    trained = run_tool("train.py", *words, f"data.root={shapes_dataset}")
    assert trained.returncode == 0, trained.stderr
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["num_images"] == 2
    assert target in (tmp_path / "run" / "config.yaml").read_text()


def test_a_run_with_a_part_of_its_own_asks_for_it_again(tmp_path, monkeypatch, shapes_dataset, run_tool):
    words = written("neck", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert run_tool("train.py", *words, f"data.root={shapes_dataset}").returncode == 0
    refused = run_tool("eval.py", "run=run")
    assert refused.returncode == 2 and "allow_targets=[your_package]" in refused.stderr
    for tool, *more in (
        ("eval.py", "run=run"),
        ("predict.py", "run=run", f"source={shapes_dataset / 'val2017'}", "out=found"),
        ("train.py", "resume=run", "trainer.max_steps=2"),
    ):
        done = run_tool(tool, *more, "allow_targets=[my_package]")
        assert done.returncode == 0, done.stderr
    with pytest.raises(ValueError, match="allow_targets"):
        api.load("run", device="cpu")
    assert len(api.load("run", device="cpu", allow_targets=["my_package"]).class_names) == 6
