"""The data report as tables on the screen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fpn_det.annotations.findings import group_by_kind
from fpn_det.data_report.report import Report, summarize

COLORS = {"fatal": "bold red", "error": "red", "warning": "yellow", "note": "cyan"}
SHOWN_CLASSES = 30


def print_report(report: Report, console: Console) -> None:
    """Print the splits, the classes and the findings."""
    summaries = {split: summarize(part.annotations) for split, part in report.parts.items()}
    console.print(_splits_table(summaries))
    if summaries:
        console.print(_classes_table(summaries))
    console.print(_findings_table(report))


def _splits_table(summaries: Mapping[str, dict[str, Any]]) -> Table:
    table = _table("split", "images", "without boxes", "boxes", "crowd", "most boxes", "in")
    for split, row in summaries.items():
        numbers = [str(row[name]) for name in ("images", "images_without_boxes", "boxes", "crowd", "most_boxes")]
        table.add_row(split, *numbers, escape(str(row["image_with_most_boxes"])))
    return table


def _classes_table(summaries: Mapping[str, dict[str, Any]]) -> Table:
    table = _table("class", *summaries)
    names = list(dict.fromkeys(name for row in summaries.values() for name in row["classes"]))
    for name in names[:SHOWN_CLASSES]:
        table.add_row(escape(name), *(str(row["classes"].get(name, 0)) for row in summaries.values()))
    if len(names) > SHOWN_CLASSES:
        table.add_row(f"... and {len(names) - SHOWN_CLASSES} more", *("" for _ in summaries))
    return table


def _findings_table(report: Report) -> Table:
    table = _table("", "split", "kind", "count", "first finding")
    table.columns[4].no_wrap = False
    table.columns[4].justify = "left"
    for split, findings in report.findings.items():
        for kind, members in group_by_kind(findings).items():
            severity = members[0].severity
            table.add_row(f"[{COLORS[severity]}]{severity}[/]", split, kind, str(len(members)), escape(str(members[0])))
    if not table.row_count:
        table.add_row("", "", "nothing", "0", "")
    return table


def _table(*names: str) -> Table:
    table = Table(box=box.SIMPLE)
    for position, name in enumerate(names):
        table.add_column(name, justify="right" if position else "left", no_wrap=True)
    return table
