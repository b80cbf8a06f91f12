"""A table of runs: state, best metric, and the settings in which they differ."""

from __future__ import annotations

import csv
import html
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from fpn_det.runs.best_metric import BestMetric
from fpn_det.runs.folder import LOCK, NAN_DUMP, RunFolder
from fpn_det.runs.settings_diff import ABSENT, Flat, affects_results, differing, read_settings
from fpn_det.terminal import printable

MAX_COLUMNS = 8  # of settings shown on the screen; files contain all


@dataclass(frozen=True)
class RunSummary:
    """State and best metric of a run."""

    path: Path
    status: str  # running, finished, stopped, diverged, unreadable
    step: int  # of the last evaluation or checkpoint
    best: BestMetric
    settings: Flat
    error: str | None = None  # of an unreadable run


def find_runs(root: Path) -> list[RunSummary]:
    """Summarize all runs below `root`, sorted by path. A run that cannot be read is listed with the reason."""
    return [summarize(file.parent) for file in sorted(root.rglob("config.yaml"))]


def summarize(path: Path) -> RunSummary:
    """Read state and best metric from the folder of a run."""
    try:
        return _summarize(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return RunSummary(
            path, "unreadable", 0, BestMetric("AP"), {}, f"{path}: {reason}".replace(f"{path}: {path}", str(path))
        )


def _summarize(path: Path) -> RunSummary:
    settings = read_settings(_read_text(path / "config.yaml"), str(path / "config.yaml"))
    history = path / "metrics.jsonl"
    records = read_records(_read_text(history)) if history.is_file() else []
    best = BestMetric(str(settings.get("trainer.best_metric", "AP")))
    for record in records:
        value = record.get(best.metric)
        best.update(record["step"], {best.metric: value if isinstance(value, float | int) else None})
    checkpoints = RunFolder(path).checkpoints()
    names = [file.stem.removeprefix("step_") for file in checkpoints.files() if file.name.startswith("step_")]
    step = max([0, *(int(name) for name in names if name.isdigit()), *(record["step"] for record in records)])
    if is_locked(path):
        status = "running"
    elif checkpoints.is_finished():
        status = "finished"
    else:
        status = "diverged" if (path / NAN_DUMP).is_dir() else "stopped"
    return RunSummary(path, status, step, best, settings)


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected UTF-8 text, got other bytes ({error.reason}).") from None


def read_records(text: str) -> list[dict[str, Any]]:
    """Parse the evaluations of `metrics.jsonl`. A line that a killed run left incomplete is skipped."""
    records = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def is_locked(path: Path) -> bool:
    """Return whether another process uses this run folder. False where locks cannot be tested, as on a read-only disk."""
    try:
        with (path / LOCK).open("r+") as file:
            try:
                os.lockf(file.fileno(), os.F_TEST, 0)
            except OSError:
                return True
    except OSError:
        return False
    return False


def compare_runs(runs: Sequence[RunSummary], root: Path) -> tuple[list[str], list[list[str]]]:
    """Return column names and one row per run. The last columns are the settings that differ and affect results."""
    names = [name for name in differing([run.settings for run in runs if run.error is None]) if affects_results(name)]
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
    """Format the table for the screen, with at most MAX_COLUMNS settings."""
    fixed = names.index("at step") + 1
    shown = fixed + MAX_COLUMNS
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in names[:shown]:
        table.add_column(Text(name), overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row[:shown]))
    if len(names) > shown:
        table.caption = f"and {len(names) - shown} more settings differ"
    return table


def write_results(folder: Path, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write the table as `results.csv` and `results.md`."""
    with (folder / "results.csv").open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        csv.writer(file).writerows([names, *rows])
    lines = [names, ["---"] * len(names), *rows]
    (folder / "results.md").write_text(
        "".join(f"| {' | '.join(map(_markdown_cell, line))} |\n" for line in lines), encoding="utf-8"
    )


def _markdown_cell(text: str) -> str:
    """Escape a string so that Markdown shows it literally within a table cell."""
    escaped = html.escape(printable(text), quote=False).replace("\n", " ")
    return re.sub(r"([\\|`*\[\]])", r"\\\1", escaped)
