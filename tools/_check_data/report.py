"""What a data set holds and what is wrong with it, as plain values and as tables on the screen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fpn_det.annotations.findings import Finding, group
from fpn_det.annotations.image_records import Policy
from fpn_det.annotations.reading import Examined
from fpn_det.structures import Annotations

ORDER = ("fatal", "error", "warning", "note")
COLORS = {"fatal": "bold red", "error": "red", "warning": "yellow", "note": "cyan"}
SHOWN_CLASSES = 30


@dataclass
class Report:
    """All that was found, split by split."""

    policy: Policy  # of the training that is planned
    parts: dict[str, Examined] = field(default_factory=dict)
    findings: dict[str, list[Finding]] = field(default_factory=dict)

    def _has(self, *severities: str) -> bool:
        return any(finding.severity in severities for findings in self.findings.values() for finding in findings)

    @property
    def is_sound(self) -> bool:
        """Whether training would start."""
        return not self._has("fatal", "error") if self.policy == "fail" else not self._has("fatal")

    @property
    def verdict(self) -> str:
        if not self.is_sound:
            return "Not sound: training would stop."
        return f"Sound after what data.on_error={self.policy} does." if self._has("error") else "Sound."

    def all(self) -> list[tuple[str, Finding]]:
        """(split, finding), the worst first."""
        pairs = [(split, finding) for split, findings in self.findings.items() for finding in findings]
        return sorted(pairs, key=lambda pair: ORDER.index(pair[1].severity))

    def as_json(self) -> dict[str, Any]:
        counts: dict[str, int] = {}
        for _, finding in self.all():
            counts[finding.kind] = counts.get(finding.kind, 0) + 1
        return {
            "sound": self.is_sound,
            "counts": counts,
            "splits": {split: summary(part.annotations) for split, part in self.parts.items()},
            "findings": [{"split": split, **asdict(finding)} for split, finding in self.all()],
        }


def summary(annotations: Annotations) -> dict[str, Any]:
    """The numbers of one split that a person should know."""
    objects = np.diff(annotations.offsets.numpy())
    most = int(objects.argmax()) if len(objects) else None
    counts = np.bincount(annotations.labels.numpy(), minlength=annotations.num_classes).tolist()
    return {
        "images": len(annotations),
        "images_without_boxes": int((objects == 0).sum()),
        "boxes": len(annotations.boxes),
        "crowd": int(annotations.iscrowd.sum()),
        "most_boxes": int(objects.max(initial=0)),
        "image_with_most_boxes": None if most is None else str(annotations.path(most)),
        "classes": dict(zip(annotations.class_names, counts, strict=True)),
    }


def notes(annotations: Annotations) -> list[Finding]:
    """What is no fault, but good to know: images without boxes, classes without any."""
    found = []
    for row in np.flatnonzero(np.diff(annotations.offsets.numpy()) == 0).tolist():
        image_id, name = int(annotations.image_ids[row]), annotations.path(row).name
        found.append(Finding("image_without_boxes", "nothing is drawn on it", "note", image_id, name))
    for name, count in summary(annotations)["classes"].items():
        if not count:
            found.append(Finding("class_without_boxes", f"class {name!r} has no boxes", "note"))
    return found


def show(report: Report, console: Console) -> None:
    """The tables on the screen."""
    summaries = {split: summary(part.annotations) for split, part in report.parts.items()}
    console.print(_overview(summaries))
    if summaries:
        console.print(_classes(summaries))
    console.print(_findings(report))


def _overview(summaries: Mapping[str, dict[str, Any]]) -> Table:
    table = _table("split", "images", "without boxes", "boxes", "crowd", "most boxes", "in")
    for split, row in summaries.items():
        numbers = [str(row[name]) for name in ("images", "images_without_boxes", "boxes", "crowd", "most_boxes")]
        table.add_row(split, *numbers, escape(str(row["image_with_most_boxes"])))
    return table


def _classes(summaries: Mapping[str, dict[str, Any]]) -> Table:
    table = _table("class", *summaries)
    names = list(dict.fromkeys(name for row in summaries.values() for name in row["classes"]))
    for name in names[:SHOWN_CLASSES]:
        table.add_row(escape(name), *(str(row["classes"].get(name, 0)) for row in summaries.values()))
    if len(names) > SHOWN_CLASSES:
        table.add_row(f"... and {len(names) - SHOWN_CLASSES} more", *("" for _ in summaries))
    return table


def _findings(report: Report) -> Table:
    table = _table("", "split", "kind", "count", "the first one")
    table.columns[4].no_wrap = False
    table.columns[4].justify = "left"
    for split, findings in report.findings.items():
        for kind, members in group(sorted(findings, key=lambda finding: ORDER.index(finding.severity))).items():
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
