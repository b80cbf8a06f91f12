"""tools/runs.py on folders that are damaged, hostile or read-only."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fpn_det.runs.overview import compare_runs, find_runs, write_results
from fpn_det.runs.records import read_records


def make_run(root: Path, name: str, config: str | bytes = "seed: 0\n", metrics: str = "") -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_bytes(config if isinstance(config, bytes) else config.encode())
    if metrics:
        (folder / "metrics.jsonl").write_text(metrics)
    return folder


SOUND = "".join(json.dumps({"step": step, "AP": ap}) + "\n" for step, ap in ((10, 0.25), (20, 0.125)))

BROKEN = {
    "a list": ("- seed\n", "expected settings by name, got list"),
    "a string": ("seed\n", "expected settings by name, got str"),
    "torn": ("seed: [1,\n", "expected plain YAML"),
    "other bytes": (b"seed: \xff\xfe\n", "expected UTF-8 text"),
    "a bomb": ("a: &a [x]\nb: [*a, *a]\n", "aliases are not allowed"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_one_broken_run_is_named_and_the_others_are_listed(run_tool, tmp_path, name):
    config, reason = BROKEN[name]
    make_run(tmp_path / "runs", "sound", metrics=SOUND)
    make_run(tmp_path / "runs", "broken", config)
    listed = run_tool("runs.py")
    assert listed.returncode == 0, listed.stderr
    assert "sound" in listed.stdout and "0.250" in listed.stdout
    (line,) = (line for line in listed.stdout.splitlines() if line.startswith("unreadable: "))
    assert "broken/config.yaml" in line and reason in line


def test_settings_with_markup_and_escapes_are_shown_literally(run_tool, tmp_path):
    for number, value in enumerate(("'[/red]'", '"\\e[2J"', "'[bold]x'")):
        make_run(tmp_path / "runs", f"run{number}", f"experiment: {value}\nseed: {number}\n")
    listed = run_tool("runs.py")
    assert listed.returncode == 0, listed.stderr
    assert "\x1b" not in listed.stdout and "experiment" not in listed.stderr
    assert all(text in listed.stdout for text in ("run0", "run1", "run2"))


def test_torn_lines_of_metrics_are_skipped(run_tool, tmp_path):
    assert [record["step"] for record in read_records(SOUND + '{"step": 30, "A')] == [10, 20]
    assert read_records("[1]\nnull\n{}\n\x00\n" + "[" * 10_000) == []
    make_run(tmp_path / "runs", "torn", metrics=SOUND + '{"step": 30, "AP": "high"}\n{"st')
    listed = run_tool("runs.py")
    assert listed.returncode == 0 and "0.250" in listed.stdout and " 30 " in listed.stdout


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_runs_on_a_read_only_disk_are_listed(run_tool, tmp_path):
    folder = make_run(tmp_path / "runs", "run", metrics=SOUND)
    (folder / ".lock").touch(mode=0o444)
    folder.chmod(0o555)
    listed = run_tool("runs.py")
    folder.chmod(0o755)
    assert listed.returncode == 0 and "0.250" in listed.stdout


def test_a_lock_that_cannot_be_opened_for_writing_does_not_end_the_list(run_tool, tmp_path, monkeypatch):
    make_run(tmp_path / "runs", "run", metrics=SOUND)
    opened = Path.open

    def read_only(self, mode="r", *args, **kwargs):
        if "+" in mode or "w" in mode or "a" in mode:
            raise OSError(30, "Read-only file system", str(self))
        return opened(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", read_only)
    assert [run.status for run in find_runs(tmp_path / "runs")] == ["stopped"]


def test_results_md_shows_html_and_bars_literally(tmp_path):
    for number, value in enumerate(("'<script>alert(1)</script>'", "'a | b'")):
        make_run(tmp_path, f"run{number}", f"model: {{x: {value}}}\n")
    write_results(tmp_path, *compare_runs(find_runs(tmp_path), tmp_path))
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert "&lt;script&gt;" in lines[2] and "<script>" not in lines[2]
    assert r"a \| b" in lines[3]
    assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1
