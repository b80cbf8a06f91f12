"""Look at data before training on it: python tools/check_data.py experiment=<name> [setting=value ...].

Reads annotations and pictures of all splits as training would, prints what is there and what is wrong, and writes it to
`output`: data_report.json for programs, data_report.html for people. Exit code 1 if training would refuse the data.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from rich.console import Console

from _check_data.coverage import cover
from _check_data.page import write_page
from _check_data.report import Report, notes, show
from fpn_det.annotations.findings import Finding
from fpn_det.annotations.overlap import find_shared
from fpn_det.annotations.reading import listed_paths
from fpn_det.cli.launch import launch
from fpn_det.data.config import DataConfig, SplitName
from fpn_det.runs.log import PLAIN_WIDTH, shown_path
from fpn_det.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class CheckSettings(TrainConfig):
    """Those of a training run, and where the report goes."""

    output: str = "data_report"  # folder


def check_data(settings: CheckSettings, words: Sequence[str]) -> None:
    """One report."""
    report = examine(settings.data)
    train = report.parts.get("train")
    coverage = None
    if train is not None and len(train.annotations):
        model = settings.build_model(train.annotations.num_classes)
        coverage = cover(
            train.annotations,
            model,
            settings.data.transforms(train=False),
        )
    folder = Path(settings.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data_report.json").write_text(json.dumps(report.as_json(), indent=1, default=str), encoding="utf-8")
    write_page(folder / "data_report.html", report, coverage)

    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    show(report, console)
    if coverage is not None:
        console.print(
            f"Of {len(coverage.ious)} objects, {coverage.learned_by_rescue} meet no anchor with IoU {coverage.threshold:g}, "
            f"and {coverage.out_of_reach} none with {coverage.background:g}."
        )
    console.print(f"{report.verdict} The report: {shown_path(folder / 'data_report.html')}")
    if not report.is_sound:
        sys.exit(1)


def examine(data: DataConfig) -> Report:
    """All splits that are there."""
    report, names = Report(data.on_error), data.classes
    for split in splits_of(data):
        try:
            part = data.examine(split, names)
        except ValueError as error:  # training does without a test set
            report.findings[split] = [Finding("cannot_be_read", str(error), "warning" if split == "test" else "fatal")]
            continue
        report.parts[split] = part
        report.findings[split] = part.findings + notes(part.annotations)
        names = names or list(part.annotations.class_names)
    for one, other in combinations(report.parts, 2):
        if getattr(data, one) != getattr(data, other):
            report.findings[one] += find_shared(report.parts[one], report.parts[other], other).values()
    return report


def splits_of(data: DataConfig) -> list[SplitName]:
    """The splits that training reads, and the test set if it is there."""
    splits: list[SplitName] = ["train"]
    if data.val_fraction is None:
        splits.append("val")
    if any(path is not None and Path(path).exists() for path in listed_paths(data.test.annotations)):
        splits.append("test")
    return splits


if __name__ == "__main__":
    launch(check_data, CheckSettings, "check_data")
