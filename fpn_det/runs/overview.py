"""Many runs at a glance: how each went, and in which settings they differ."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from fpn_det.runs.best import Best
from fpn_det.runs.folder import LOCK, NAN_DUMP, RunFolder
from fpn_det.runs.settings_diff import ABSENT, Flat, differing, is_harmless, read_settings

MAX_COLUMNS = 8  # of settings on the screen; files have them all


@dataclass(frozen=True)
class RunSummary:
    """How a run went, as its folder tells."""

    path: Path
    status: str  # running, finished, stopped, diverged
    step: int  # of the last evaluation or checkpoint
    best: Best
    settings: Flat


def find_runs(root: Path) -> list[RunSummary]:
    """All runs below `root`, in the order of their names."""
    return [summarize(file.parent) for file in sorted(root.rglob("config.yaml"))]


def summarize(path: Path) -> RunSummary:
    """What the folder of a run tells."""
    settings = read_settings((path / "config.yaml").read_text())
    history = path / "metrics.jsonl"
    records = [json.loads(line) for line in history.read_text().splitlines()] if history.is_file() else []
    best = Best(settings.get("trainer.best_metric", "AP"))
    for record in records:
        best.update(record["step"], {best.metric: record.get(best.metric)})
    checkpoints = RunFolder(path).checkpoints()
    saved = [int(file.stem.removeprefix("step_")) for file in checkpoints.files() if file.name.startswith("step_")]
    step = max([0, *saved, *(record["step"] for record in records)])
    if is_held(path):
        status = "running"
    elif checkpoints.is_finished():
        status = "finished"
    else:
        status = "diverged" if (path / NAN_DUMP).is_dir() else "stopped"
    return RunSummary(path, status, step, best, settings)


def is_held(path: Path) -> bool:
    """Whether another process writes in this folder."""
    if not (path / LOCK).is_file():
        return False
    with (path / LOCK).open("r+") as file:
        try:
            os.lockf(file.fileno(), os.F_TEST, 0)
        except OSError:
            return True
    return False


def compare(runs: Sequence[RunSummary], root: Path) -> tuple[list[str], list[list[str]]]:
    """A table of runs: the names of its columns, and a row per run. Settings that differ come last."""
    names = [name for name in differing([run.settings for run in runs]) if not is_harmless(name)]
    metrics = list(dict.fromkeys(run.best.metric for run in runs))
    rows = []
    for run in runs:
        values = [
            "n/a" if run.best.value is None else f"{run.best.value:.3f}" if run.best.metric == metric else ""
            for metric in metrics
        ]
        settings = [str(run.settings.get(name, ABSENT)) for name in names]
        rows.append(
            [str(run.path.relative_to(root)), run.status, str(run.step), *values, str(run.best.step), *settings]
        )
    return ["run", "status", "step", *(f"best {metric}" for metric in metrics), "at step", *names], rows


def runs_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """The same for the screen, as far as it is wide."""
    fixed = names.index("at step") + 1
    shown = fixed + MAX_COLUMNS
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in names[:shown]:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row[:shown])
    if len(names) > shown:
        table.caption = f"and {len(names) - shown} more settings differ"
    return table


def write_results(folder: Path, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Leave the table as `results.csv` and `results.md`."""
    with (folder / "results.csv").open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    lines = [names, ["---"] * len(names), *rows]
    (folder / "results.md").write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))
