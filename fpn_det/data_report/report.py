"""Contents and faults of a data set, split by split."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fpn_det.annotations.findings import SEVERITIES, Finding, OnError, group_by_kind, stopping_findings
from fpn_det.annotations.reading import CheckedDataset, as_list
from fpn_det.annotations.splits import are_same_images, find_overlap
from fpn_det.data.config import DataConfig, SplitName
from fpn_det.image_io import MAX_PIXELS
from fpn_det.structures import Annotations


@dataclass
class Report:
    """Annotations and findings by split.

    Attributes:
        policy: `data.on_error` of the planned training.
        parts: of the splits that could be read.
        findings: of all splits.
        training: images and boxes that training would use; None if the training set cannot be read.
        max_pixels: largest width * height of an image.
    """

    policy: OnError
    parts: dict[str, CheckedDataset] = field(default_factory=dict)
    findings: dict[str, list[Finding]] = field(default_factory=dict)
    training: Annotations | None = None
    max_pixels: int = MAX_PIXELS

    def _has(self, *severities: str) -> bool:
        return any(finding.severity in severities for findings in self.findings.values() for finding in findings)

    @property
    def is_sound(self) -> bool:
        """True if training would accept the data."""
        return not any(stopping_findings(findings, self.policy) for findings in self.findings.values())

    @property
    def verdict(self) -> str:
        if not self.is_sound:
            return "Not sound: training would stop."
        return f"Sound after what data.on_error={self.policy} does." if self._has("error") else "Sound."

    def all_findings(self) -> list[tuple[str, Finding]]:
        """(split, finding), the worst first."""
        pairs = [(split, finding) for split, findings in self.findings.items() for finding in findings]
        return sorted(pairs, key=lambda pair: SEVERITIES.index(pair[1].severity))

    def as_json(self) -> dict[str, Any]:
        counts: dict[str, int] = {}
        for _, finding in self.all_findings():
            counts[finding.kind] = counts.get(finding.kind, 0) + 1
        return {
            "sound": self.is_sound,
            "counts": counts,
            "splits": {split: summarize(part.annotations) for split, part in self.parts.items()},
            "training": None
            if self.training is None
            else {"images": len(self.training), "boxes": len(self.training.boxes)},
            "findings": [{"split": split, **asdict(finding)} for split, finding in self.all_findings()],
        }


def inspect_data(data: DataConfig, seed: int = 0) -> Report:
    """Read every split that training reads, and the test split if its annotations exist.

    Args:
        data: settings of the planned training.
        seed: of the training; it determines the images held out by `val_fraction`.
    """
    report, class_names = Report(data.on_error, max_pixels=data.max_image_pixels), data.classes
    for split in _splits(data):
        try:
            part = data.check_split(split, class_names)
        except ValueError as error:  # training does not need the test split
            report.findings[split] = [Finding("cannot_be_read", str(error), "warning" if split == "test" else "fatal")]
            continue
        report.parts[split] = part
        report.findings[split] = list(part.findings)
        class_names = class_names or list(part.annotations.class_names)
    together = {split: part for split, part in report.parts.items() if split != "test"}
    if "train" in together:
        trained = data.check_together(together, seed)
        report.findings |= trained.findings
        report.training = trained.train
    test = report.parts.get("test")
    if test is not None:
        for name, part in together.items():
            if not are_same_images(part, test):
                overlap = find_overlap(part, test, "data.test").values()
                report.findings[name] += [replace(finding, severity="warning") for finding in overlap]
    for name, part in report.parts.items():
        report.findings[name] += find_notes(part.annotations)
    return report


@dataclass(frozen=True)
class Repair:
    """A way out of faults that stop training, which has been tried."""

    command: str  # that checks the repaired data
    effect: str  # on what training would use


def find_repair(data: DataConfig, report: Report, words: Sequence[str], seed: int = 0) -> Repair | None:
    """Try `data.on_error=fix`; None if the data are sound or have faults that it does not repair.

    Args:
        data: settings that the report was made with.
        report: of the data.
        words: of the command line.
        seed: of the training.
    """
    if report.is_sound or data.on_error != "fail":
        return None
    fixed = inspect_data(replace(data, on_error="fix"), seed)
    if not fixed.is_sound or fixed.training is None:
        return None
    kept = [word for word in words if not word.startswith("data.on_error=")]
    faults = [finding for _, finding in report.all_findings() if finding.severity == "error"]
    kinds = ", ".join(f"{len(members)} {kind}" for kind, members in group_by_kind(faults).items())
    training = fixed.training
    return Repair(
        f"fpn-det check-data {shlex.join([*kept, 'data.on_error=fix'])}",
        f"It repairs in memory, or leaves out, {kinds}; the files stay as they are. Training then uses {len(training)} images "
        f"with {len(training.boxes)} boxes.",
    )


def _splits(data: DataConfig) -> list[SplitName]:
    splits: list[SplitName] = ["train"]
    if data.val_fraction is None:
        splits.append("val")
    if any(path is not None and Path(path).exists() for path in as_list(data.test.annotations)):
        splits.append("test")
    return splits


def summarize(annotations: Annotations) -> dict[str, Any]:
    """Counts of images, boxes and classes of one split."""
    boxes_per_image = annotations.boxes_per_image.numpy()
    most = int(boxes_per_image.argmax()) if len(boxes_per_image) else None
    counts = np.bincount(annotations.labels.numpy(), minlength=annotations.num_classes).tolist()
    return {
        "images": len(annotations),
        "images_without_boxes": int((boxes_per_image == 0).sum()),
        "boxes": len(annotations.boxes),
        "crowd": int(annotations.iscrowd.sum()),
        "most_boxes": int(boxes_per_image.max(initial=0)),
        "image_with_most_boxes": None if most is None else str(annotations.path(most)),
        "classes": dict(zip(annotations.class_names, counts, strict=True)),
    }


def count_classes(report: Report) -> dict[str, list[int]]:
    """Number of boxes of each class in each split that could be read; the most frequent class first."""
    counts = [summarize(part.annotations)["classes"] for part in report.parts.values()]
    names = dict.fromkeys(name for row in counts for name in row)
    table = {name: [row.get(name, 0) for row in counts] for name in names}
    return dict(sorted(table.items(), key=lambda item: -sum(item[1])))


def find_notes(annotations: Annotations) -> list[Finding]:
    """Images without boxes and classes without boxes: no faults, but often unintended."""
    found = []
    for row in np.flatnonzero(annotations.boxes_per_image.numpy() == 0).tolist():
        image_id, name = int(annotations.image_ids[row]), annotations.path(row).name
        found.append(Finding("image_without_boxes", "no boxes are annotated", "note", image_id, name))
    for name, count in summarize(annotations)["classes"].items():
        if not count:
            found.append(Finding("class_without_boxes", f"class {name!r} has no boxes", "note"))
    return found
