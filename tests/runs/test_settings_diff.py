from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.multiprocessing

from fpn_det.runs.folder import RunFolder
from fpn_det.runs.overview import as_json, compare_runs, find_runs, runs_table, write_results
from fpn_det.runs.settings_diff import changes_table, differing, flatten, read_settings, typed_settings


def test_flatten_gives_dotted_names():
    assert flatten({"a": 1, "b": {"c": [1, {"d": 2}], "e": {}}}) == {"a": 1, "b.c": [1, {"d": 2}], "b.e": {}}
    assert read_settings("") == {"": {}}


def test_differing_returns_names_of_unequal_values():
    assert differing([{"a": 1, "b": 2, "c": None}, {"a": 1, "b": 3, "d": 1}]) == ["b", "c", "d"]
    assert differing([{"a": True}, {"a": 1}]) == ["a"]


def test_changes_table_states_the_effect_on_results():
    before = {"optimizer.lr": 0.1, "trainer.log_every": 20, "seed": 0}
    table = changes_table(before, {**before, "optimizer.lr": 0.2, "trainer.log_every": 5})
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert rows == [("optimizer.lr", "0.1", "0.2", "yes"), ("trainer.log_every", "20", "5", "no")]
    assert changes_table(before, before) is None


def make_run(path: Path, lr: float, aps: list[float | None], finished: bool = False) -> None:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(
        f"run_dir: {path}\nseed: 0\noptimizer:\n  lr: {lr}\ntrainer:\n  best_metric: AP\n"
    )
    records = [{"step": 10 * number, "AP": ap} for number, ap in enumerate(aps, start=1)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    RunFolder(path).checkpoints().save({"progress": {"step": 30}}, 30, is_best=False, finished=finished)


@pytest.fixture
def root(tmp_path) -> Path:
    make_run(tmp_path / "demo" / "a", 0.1, [0.2, 0.4, 0.3], finished=True)
    make_run(tmp_path / "demo" / "b", 0.2, [None])
    make_run(tmp_path / "demo" / "c", 0.2, [])
    (tmp_path / "demo" / "c" / "nan_dump").mkdir()
    return tmp_path


def test_compare_runs_lists_state_metrics_and_differing_settings(root):
    names, rows = compare_runs(find_runs(root), root)
    assert names == ["run", "status", "step", "best AP", "at step", "optimizer.lr"]
    assert rows == [
        ["demo/a", "finished", "30", "0.400", "20", "0.1"],
        ["demo/b", "stopped", "30", "n/a", "10", "0.2"],
        ["demo/c", "diverged", "30", "n/a", "0", "0.2"],
    ]


def _status(root: Path, answer) -> None:
    answer.put([run.status for run in find_runs(root)])


def test_a_locked_run_is_running(root):
    context = torch.multiprocessing.get_context("fork")
    answer = context.Queue()
    with RunFolder(root / "demo" / "b").locked():  # the lock is one of processes
        other = context.Process(target=_status, args=(root, answer))
        other.start()
        assert answer.get(timeout=60) == ["finished", "running", "diverged"]
        other.join()


def test_results_are_written_and_shown(root):
    names, rows = compare_runs(find_runs(root), root)
    write_results(root, names, rows)
    assert (root / "results.csv").read_text().splitlines()[1] == "demo/a,finished,30,0.400,20,0.1"
    assert (root / "results.md").read_text().splitlines()[:2] == [
        "| run | status | step | best AP | at step | optimizer.lr |",
        "| --- | --- | --- | --- | --- | --- |",
    ]


def test_runs_are_listed_in_a_line_each_with_the_typed_words_that_differ(root):
    for name, words in (("a", ["seed=0", "optimizer.lr=0.1"]), ("b", ["seed=0", "optimizer.lr=0.2", "run_dir=b"])):
        (root / "demo" / name / "overrides.txt").write_text("".join(f"{word}\n" for word in words))
    (root / "demo" / "a" / "log.txt").write_text("2026-01-02 10:00:00  one\ntable\n2026-01-02 10:04:51  two\n")
    runs = find_runs(root)
    header, first, typed, second, other, third = runs_table(runs, root, 80)
    assert header.split() == ["run", "state", "step", "best", "AP", "started", "took"]
    assert first.split() == ["demo/a", "finished", "30", "0.400", "2026-01-02", "10:00", "0:04:51"]
    assert [typed.split(), other.split()] == [["seed=0", "optimizer.lr=0.1"], ["seed=0", "optimizer.lr=0.2"]]
    assert second.split() == ["demo/b", "stopped", "30", "n/a"]
    assert third.split() == ["demo/c", "diverged", "30", "n/a"]
    assert runs_table(runs[:2], root, 80)[2].strip() == "optimizer.lr=0.1"  # both were told seed=0
    (root / "demo" / "a" / "overrides.txt").write_text("optimizer.lr=0.1\ntrainer.eval_every=2 steps\n")
    lines = runs_table(find_runs(root), root, 46)  # the words do not fit in one line, and a word is not broken
    assert lines[2:4] == ["    optimizer.lr=0.1", "    trainer.eval_every=2 steps"]
    described = json.loads(as_json(runs))
    assert [run["best"] for run in described] == [0.4, None, None]
    assert described[0]["seconds"] == 291 and described[0]["typed"] == ["seed=0", "optimizer.lr=0.1"]


def test_long_names_of_runs_are_shortened_in_the_middle(tmp_path):
    name = "a_rather_long_name_of_an_experiment/2026-01-02_10-00-00"
    make_run(tmp_path / name, 0.1, [0.5])
    (tmp_path / name / "log.txt").write_text("2026-01-02 10:00:00  one\n")
    header, line = runs_table(find_runs(tmp_path), tmp_path, 80)
    assert max(len(header), len(line)) <= 80 and line.startswith("a_") and "...26-01-02" not in line
    assert "10-00-00  stopped" in line


def test_typed_settings_are_those_of_the_command_line():
    settings = {"optimizer.lr": 0.1, "seed": 0}
    words = ["data=yolo", "optimizer.lr=0.1", "run_dir=x", "+trainer.extra=1"]
    assert typed_settings(words, settings) == {"data": "yolo", "optimizer.lr": 0.1, "trainer.extra": "1"}


def test_settings_of_older_versions_are_compared_by_their_present_names():
    old = "model: {neck: {_target_: fpn_det.models.neck.FPN, extra_level: true}, roi_head: {score_threshold: 0.1}}"
    settings = read_settings(old)
    assert settings["model.neck._target_"] == "fpn_det.models.necks.fpn.FPN"
    assert settings["model.neck.extra_levels"] == 1
    assert settings["model.roi_head.test_filter.score_threshold"] == 0.1
