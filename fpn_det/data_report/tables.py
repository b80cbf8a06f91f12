"""The data report as tables on the screen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fpn_det.annotations.findings import group_by_kind
from fpn_det.data_report.report import Report, count_classes, summarize
from fpn_det.terminal import Shortened

COLORS = {"fatal": "bold red", "error": "red", "warning": "yellow", "note": "cyan"}
SHOWN_CLASSES = 30
COUNTS = {"images": "images", "empty": "images_without_boxes", "boxes": "boxes", "crowd": "crowd", "most": "most_boxes"}


def print_report(report: Report, console: Console) -> None:
    """Print the splits, the classes and the findings."""
    summaries = {split: summarize(part.annotations) for split, part in report.parts.items()}
    console.print(_splits_table(summaries))
    if summaries:
        console.print(_classes_table(report))
    _print_findings(report, console)


def _splits_table(summaries: Mapping[str, dict[str, Any]]) -> Table:
    table = _table("split", *COUNTS)
    table.add_column("in image")
    for split, row in summaries.items():
        path = row["image_with_most_boxes"]
        table.add_row(split, *(str(row[name]) for name in COUNTS.values()), Shortened(Path(path) if path else ""))
    return table


def _classes_table(report: Report) -> Table:
    table, counts = _table("class", *report.parts), count_classes(report)
    for name, row in list(counts.items())[:SHOWN_CLASSES]:
        table.add_row(Shortened(name), *map(str, row))
    if rest := list(counts.values())[SHOWN_CLASSES:]:
        table.add_row(f"... and {len(rest)} more", *map(str, np.sum(rest, axis=0).tolist()))
    return table


def _print_findings(report: Report, console: Console) -> None:
    """Print a line for every kind, and its first place below it, which may need several lines."""
    for split, findings in report.findings.items():
        for kind, members in group_by_kind(findings).items():
            severity = members[0].severity
            console.print(Text.assemble((f"{severity:<7}", COLORS[severity]), f" {split}: {kind} ({len(members)})"))
            console.print(Padding(Text(str(members[0])), (0, 0, 0, 4)))


def _table(*names: str) -> Table:
    table = Table(box=box.SIMPLE)
    for position, name in enumerate(names):
        table.add_column(name, justify="right" if position else "left", no_wrap=True)
    return table
