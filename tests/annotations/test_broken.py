"""Broken data: `fail` names each fault with file and id, and a data set repaired by `fix` scores as the clean one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from broken import FAULTS, WARNINGS, clean, write, write_pictures

from fpn_det.annotations.image_inspection import inspect_images
from fpn_det.annotations.reading import read_annotations
from fpn_det.evaluation.coco import score
from fpn_det.evaluation.config import EvaluationConfig
from fpn_det.evaluation.detection_table import DetectionTable
from fpn_det.structures import Annotations


@pytest.fixture
def folder(tmp_path) -> Path:
    write_pictures(tmp_path / "train")
    return tmp_path / "train"


def read(folder: Path, document: dict, on_error: str) -> Annotations:
    return read_annotations(
        write(document, folder.parent / "train.json"), folder, on_error=on_error, inspect=inspect_images
    )  # type: ignore[arg-type]


def perfect_detections(folder: Path) -> dict[str, list[tuple]]:
    """Return the ground truth of the clean set as detections, by file: (box, label)."""
    truth = read(folder, clean(), "fail")
    return {
        truth.path(row).stem: list(
            zip(truth.boxes[truth.rows(row)].tolist(), truth.labels[truth.rows(row)].tolist(), strict=True)
        )
        for row in range(len(truth))
    }


def ap_of(perfect: dict[str, list[tuple]], annotations: Annotations) -> float | None:
    rows = [(row, *box, label) for row in range(len(annotations)) for box, label in perfect[annotations.path(row).stem]]
    columns = np.array(rows, dtype=np.float64).reshape(-1, 6)
    table = DetectionTable(columns[:, 0].astype(int), columns[:, 1:5], np.ones(len(columns)), columns[:, 5].astype(int))
    return score(annotations, table, np.arange(len(annotations)), EvaluationConfig()).metrics["AP"]


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_named_and_repaired_or_left_out(name, folder, caplog):
    perfect = perfect_detections(folder)
    fault, words, is_repaired = FAULTS[name]
    document = clean()
    fault(document, folder)
    with pytest.raises(ValueError) as refusal:
        read(folder, document, "fail")
    for word in ("train.json", "data.on_error=fix", *words):
        assert word in str(refusal.value), str(refusal.value)

    fixed = read(folder, document, "fix")
    for word in words:
        assert word in caplog.text
    if is_repaired:
        assert (len(fixed), len(fixed.boxes)) == (6, 10)
        assert ap_of(perfect, fixed) == pytest.approx(1)
    else:
        assert len(fixed.boxes) < 10 or name in ("box partly outside", "box huge")
    assert len(read(folder, document, "skip").boxes) <= len(fixed.boxes)


@pytest.mark.parametrize("name", WARNINGS)
def test_warning_is_accepted_under_fail_and_repaired_under_fix(name, folder, caplog):
    perfect = perfect_detections(folder)
    fault, words = WARNINGS[name]
    document = clean()
    fault(document, folder)
    read(folder, document, "fail")
    for word in words:
        assert word in caplog.text
    if name != "tiny box" and name != "classes alike":
        assert ap_of(perfect, read(folder, document, "fix")) == pytest.approx(1)


def test_boxes_that_are_fractions_cannot_be_repaired(folder):
    document = clean()
    for record in document["annotations"]:
        record["bbox"] = [0.5, 0.5, 0.2, 0.1]
    for policy in ("fail", "fix", "skip"):
        with pytest.raises(ValueError, match=r"boxes_are_fractions(?s:.*)image 7 \(0.png\), annotation 1: .*Multiply"):
            read(folder, document, policy)
