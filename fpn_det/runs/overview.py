"""Tables of runs: state, best metric, and what differs in them: the words typed on the screen, all settings in files."""

from __future__ import annotations

import csv
import datetime
import html
import json
import os
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fpn_det.runs.best_metric import BestMetric
from fpn_det.runs.folder import LOCK, NAN_DUMP, RunFolder
from fpn_det.runs.records import read_records
from fpn_det.runs.settings_diff import ABSENT, OF_A_START, Flat, affects_results, differing, read_settings
from fpn_det.runs.step_lines import clock
from fpn_det.terminal import printable, shorten

STAMP = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)  ", re.MULTILINE)  # of a line of log.txt
NO_BREAK = "\u00a0"  # in place of the blanks of a word, where no line is broken
NAME_WIDTH = 20  # characters of a run's name on the screen, below which it is not shortened
# Words of the command line that say how a run is started, in which all runs differ.
NOT_TYPED = tuple(f"{name}=" for name in OF_A_START)


@dataclass(frozen=True)
class RunSummary:
    """State and best metric of a run."""

    path: Path
    status: str  # running, finished, stopped, diverged, unreadable
    step: int  # of the last evaluation or checkpoint
    best: BestMetric
    settings: Flat
    typed: tuple[str, ...] = ()  # words of its command line
    started: datetime.datetime | None = None
    seconds: float | None = None  # from the first to the last line of its log
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
            path,
            "unreadable",
            0,
            BestMetric("AP"),
            {},
            error=f"{path}: {reason}".replace(f"{path}: {path}", str(path)),
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
    started, seconds = _read_times(path / "log.txt")
    typed = path / "overrides.txt"
    words = _read_text(typed).splitlines() if typed.is_file() else []
    return RunSummary(path, status, step, best, settings, tuple(words), started, seconds)


def _read_times(log: Path) -> tuple[datetime.datetime | None, float | None]:
    """The time of the first line of a log, and the seconds from there to the last."""
    stamps = STAMP.findall(log.read_text(encoding="utf-8", errors="replace")) if log.is_file() else []
    try:
        first, last = (datetime.datetime.fromisoformat(stamps[at]) for at in (0, -1))
    except (IndexError, ValueError):
        return None, None
    return first, (last - first).total_seconds()


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected UTF-8 text, got other bytes ({error.reason}).") from None


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


def typed_differences(runs: Sequence[RunSummary]) -> list[list[str]]:
    """The words typed for each run that were not typed for all of them."""
    words = [[word for word in run.typed if not word.startswith(NOT_TYPED)] for run in runs]
    common = set.intersection(*map(set, words)) if len(words) > 1 else set()
    return [[word for word in one if word not in common] for one in words]


def runs_table(runs: Sequence[RunSummary], root: Path, width: int) -> list[str]:
    """Lines for the screen: one for each run, and below it the typed words that not all runs have.

    Args:
        runs: to be listed, at least one.
        root: folder that their names start from.
        width: characters of a line.
    """
    metrics = {run.best.metric for run in runs}
    title = f"best {metrics.pop()}" if len(metrics) == 1 else "best"
    names = [str(run.path.relative_to(root)) for run in runs]
    rows = [("run", "state", "step", title, "started", "took")]
    for name, run in zip(names, runs, strict=True):
        best = "n/a" if run.best.value is None else f"{run.best.value:.3f}"
        rows.append(
            (
                name,
                run.status,
                str(run.step),
                best if title != "best" else f"{best} {run.best.metric}",
                f"{run.started:%Y-%m-%d %H:%M}" if run.started else "",
                "" if run.seconds is None else clock(run.seconds),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    widths[0] = max(min(widths[0], width - sum(widths[1:]) - 2 * len(widths[1:])), min(widths[0], NAME_WIDTH))
    lines = []
    for row, words in zip(rows, [[], *typed_differences(runs)], strict=True):
        left = [shorten(row[0], widths[0]).ljust(widths[0]), row[1].ljust(widths[1])]
        right = [text.rjust(width) for text, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join([*left, *right]).rstrip())
        text = "  ".join(word.replace(" ", NO_BREAK) for word in words)
        wrapped = textwrap.wrap(text, width, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
        lines += [line.replace(NO_BREAK, " ") for line in wrapped]
    return lines


def as_json(runs: Sequence[RunSummary]) -> str:
    """All that is known of the runs, as JSON; `typed` are all words of a command line."""
    rows = [
        {
            "run": str(run.path),
            "state": run.status,
            "step": run.step,
            "metric": run.best.metric,
            "best": run.best.value,
            "best_step": run.best.step,
            "started": run.started.isoformat() if run.started else None,
            "seconds": run.seconds,
            "typed": list(run.typed),
            "error": run.error,
        }
        for run in runs
    ]
    return json.dumps(rows, indent=1)


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
