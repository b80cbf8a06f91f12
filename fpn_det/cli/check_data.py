"""Check a data set before training on it.

Reads annotations and images of all splits as training would, prints what they hold and what is wrong with them, and
writes data_report.json and data_report.html to the folder `output`. Exit code 1 if training would refuse the data.

Examples:
  fpn-det check-data experiment=small data=yolo data.root=datasets/my_data
  fpn-det check-data experiment=r50_fpn data.on_error=fix
  fpn-det check-data experiment=small data=voc data.root=voc output=report
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fpn_det.cli.launch import launch
from fpn_det.data_report.anchor_coverage import measure_coverage
from fpn_det.data_report.page import anchor_advice, write_page
from fpn_det.data_report.report import find_repair, inspect_data
from fpn_det.data_report.tables import print_report
from fpn_det.terminal import say, shown_path, standard_console
from fpn_det.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class CheckDataConfig(TrainConfig):
    """Settings of the planned training, and the folder of the report."""

    output: str = "data_report"  # folder of the report


def main() -> None:
    """Check the data of the settings on the command line."""
    launch(check_data, CheckDataConfig, "check_data")


def check_data(config: CheckDataConfig, words: Sequence[str]) -> None:
    """Print and write the report; exit with code 1 if training would refuse the data."""
    report = inspect_data(config.data, config.seed)
    train = report.parts.get("train")
    coverage = None
    if train is not None and len(train.annotations):
        model = config.build_model(train.annotations.num_classes)
        coverage = measure_coverage(
            train.annotations, model, config.data.transforms(train=False), config.data.tile.size
        )
    repair = find_repair(config.data, report, words, config.seed)
    console = standard_console()
    print_report(report, console)
    if coverage is not None:
        console.print(anchor_advice(coverage), markup=False)
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data_report.json").write_text(json.dumps(report.as_json(), indent=1, default=str), encoding="utf-8")
    write_page(folder / "data_report.html", report, repair, coverage)
    console.print(report.verdict)
    if repair is not None:
        say(console, f"The way out:\n  {repair.command}\n{repair.effect}")
    say(console, f"Report: {shown_path(folder / 'data_report.html')}")
    if not report.is_sound:
        sys.exit(1)
    training = [word for word in words if not word.startswith("output=")]
    say(console, f"To train on it:\n  fpn-det train {shlex.join(training)}")
