"""A neck of a user's own, exactly as the README shows it: its files are written as printed, and its command is run."""

from __future__ import annotations

import json
import re
import shlex

from tiny import ROOT, TINY


def test_a_neck_is_added_by_the_class_the_yaml_file_and_the_command_of_the_readme(
    tmp_path, monkeypatch, shapes_dataset, run_tool
):
    section = re.search(r"### Adding a neck\n(.*?)\n##", (ROOT / "README.md").read_text(), re.DOTALL)
    assert section is not None
    *texts, command = re.findall(r"```\w*\n(.*?)```", section[1], re.DOTALL)
    assert sum(len(text.splitlines()) for text in (*texts, command)) <= 25
    for name, text in zip(re.findall(r"`(my_\S+)`:\n", section[1]), texts, strict=True):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text(text)

    search, python, tool, *words = shlex.split(command)
    assert (search, python, tool) == ("PYTHONPATH=.", "python", "tools/train.py")
    monkeypatch.syspath_prepend(tmp_path)
    few = [
        "trainer.max_steps=1",
        "trainer.batch_size=2",
        "data.max_images=2",
        f"data.root={shapes_dataset}",
        "run_dir=run",
    ]
    trained = run_tool("train.py", *words, *TINY[:3], *few)
    assert trained.returncode == 0, trained.stderr
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["num_images"] == 2
    assert "my_package.necks.Plain" in (tmp_path / "run" / "config.yaml").read_text()
