"""Check object records and turn them into the columns of Annotations: every fault is found, named, and repaired or left out.

Boxes become xyxy here. Crowd regions are kept: evaluation honors them, training leaves them out. All checks work on
whole columns.

Real data sets are never quite clean, so two kinds of faults are tolerated. A box that exceeds the border by at most
BORDER_TOLERANCE is clipped, because this is rounding. A kind of box fault that affects at most TOLERATED_SHARE of the
annotations is repaired with a warning: COCO's train2017 has 2 boxes without area among 860,001. With fewer than 100,000
boxes none is.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

from fpn_det.annotations.box_layout import detect_layout, to_corners, to_file_frame
from fpn_det.annotations.check_images import ImageTable
from fpn_det.annotations.classes import IGNORED_CLASS, UNKNOWN_CLASS, Classes
from fpn_det.annotations.findings import Finding, OnError, Severity
from fpn_det.annotations.parsing import parse_id
from fpn_det.annotations.raw import RawObjects
from fpn_det.structures import Annotations, offsets_of, pack_paths

FlaggedObjects = Literal["crowd", "keep", "drop"]  # crowd regions; ordinary objects; left out

BORDER_TOLERANCE = 1.0  # px
TOLERATED_SHARE = 1e-5
TINY_SIDE = 2.0  # px


def check_objects(
    records: RawObjects,
    images: ImageTable,
    classes: Classes,
    on_error: OnError,
    flagged_objects: FlaggedObjects,
    findings: list[Finding],
) -> Annotations:
    """Return the data set without objects that cannot be used, and append what is wrong to `findings`.

    Under `fail`, warnings change nothing: evaluation uses what the file says.

    Args:
        records: of the objects.
        images: usable images.
        classes: label of each category id.
        on_error: policy.
        flagged_objects: what to make of objects flagged as difficult or ignored.
        findings: is extended.
    """
    objects = _Objects(records, images, findings)
    labels = records.look_up("category_id", classes.labels, UNKNOWN_CLASS)
    flagged = records.numbers("ignore") == 1
    has_image = records.look_up("image_id", dict.fromkeys(images.left_out, 0), 1) == 1
    wanted = has_image & (labels != IGNORED_CLASS) & ~(flagged & (flagged_objects == "drop"))
    keep = wanted & (objects.rows >= 0) & (labels != UNKNOWN_CLASS)
    objects.report("image_unknown", wanted & (objects.rows < 0), "expected the id of an image", "image_id")
    unknown = wanted & (objects.rows >= 0) & (labels == UNKNOWN_CLASS)
    objects.report("class_unknown", unknown, "expected the id of a category", "category_id")
    for key in ("image_id", "category_id"):
        objects.report(f"{key}_is_text", keep & records.is_text(key), "expected a number", key)

    boxes, keep = _check_boxes(objects, keep, on_error)
    sides = boxes[:, 2:] - boxes[:, :2]
    tiny = keep & (sides < TINY_SIDE).any(axis=1)
    objects.report("box_tiny", tiny, f"expected sides of at least {TINY_SIDE:g} px", "bbox", "warning")

    numbers = records.integers("id")
    misnumbered = (numbers < 1) | _repeats(numbers) | records.is_text("id")
    objects.report("annotation_id", keep & misnumbered, "expected a positive integer that is used once", "id")

    area, box_area = records.numbers("area"), sides.prod(axis=1)
    no_area = ~(area >= 0)  # NaN too
    rounding = 2 * BORDER_TOLERANCE * sides.sum(axis=1)
    too_large = ~no_area & (area > 1.05 * box_area + rounding)
    objects.report("area_missing", keep & no_area, "expected a number that is not negative", "area")
    objects.report("area_beyond_box", keep & too_large, "expected no more than its box has", "area", "warning")

    crowd = records.numbers("iscrowd")
    no_crowd = ~np.isin(crowd, (0, 1)) | records.is_text("iscrowd")
    objects.report("iscrowd_missing", keep & no_crowd, "expected 0 or 1", "iscrowd")
    iscrowd = (crowd == 1) | (flagged & (flagged_objects == "crowd"))
    _report_flagged(int((flagged & has_image).sum()), flagged_objects, findings)

    copies = np.zeros(len(records), dtype=bool)
    copies[np.flatnonzero(keep)[_repeats(np.column_stack([objects.rows, labels, iscrowd, boxes])[keep])]] = True
    twice = "expected each object once; one with this class and box precedes it"
    objects.report("box_twice", copies, twice, "bbox", "warning")

    repairs = on_error != "fail"
    order = np.flatnonzero(keep & ~copies if repairs else keep)
    order = order[np.argsort(objects.rows[order], kind="stable")]
    area = np.where(no_area | (too_large & repairs), box_area, area)
    return Annotations(
        image_ids=torch.tensor(images.image_ids, dtype=torch.int64),
        **pack_paths(images.paths),
        sizes=torch.tensor(images.sizes, dtype=torch.int64).reshape(-1, 2),
        offsets=offsets_of(np.bincount(objects.rows[order], minlength=len(images.paths))),
        boxes=torch.from_numpy(boxes[order]),
        labels=torch.from_numpy(labels[order]),
        iscrowd=torch.from_numpy(iscrowd[order]),
        area=torch.from_numpy(area[order]),
        annotation_ids=torch.from_numpy(np.arange(1, len(order) + 1) if misnumbered[order].any() else numbers[order]),
        class_names=classes.names,
        category_ids=classes.category_ids,
    )


class _Objects:
    """Object records as columns, and the place of each for findings."""

    def __init__(self, records: RawObjects, images: ImageTable, findings: list[Finding]) -> None:
        self.records = records
        self.images = images
        self.findings = findings
        self.boxes: np.ndarray | None = None  # xyxy, before clipping; set by `_check_boxes`
        self.rows = records.look_up("image_id", images.row_of, -1)

    def report(
        self,
        kind: str,
        faulty: np.ndarray,
        message: str,
        key: str,
        severity: Severity = "error",
        tolerated: bool = False,
    ) -> None:
        """Append a finding for each faulty object. If `tolerated`, a rare kind is only a warning."""
        places = np.flatnonzero(faulty).tolist()
        if tolerated and len(places) <= TOLERATED_SHARE * len(self.records):
            severity = "warning"
        for index in places:
            self.add(kind, f"{message}, got {key} {_shorten(self.records.value(key, index))}", severity, index)

    def add(self, kind: str, message: str, severity: Severity, index: int) -> None:
        """Append a finding about one object."""
        row = self.rows[index]
        file_name = self.images.file_names[row] if row >= 0 else None
        box = None
        if self.boxes is not None and np.isfinite(self.boxes[index]).all():
            box = tuple(self.boxes[index].tolist())
        image_id, own_id = (parse_id(self.records.value(key, index)) for key in ("image_id", "id"))
        place = image_id, file_name, own_id, self.records.value("where", index)
        self.findings.append(Finding(kind, message, severity, *place, box))


def _check_boxes(objects: _Objects, keep: np.ndarray, on_error: OnError) -> tuple[np.ndarray, np.ndarray]:
    """Return boxes xyxy [T, 4] clipped to their images, and which objects are still kept."""
    images = objects.images
    numbers, is_text = objects.records.boxes(), objects.records.is_text("bbox")
    finite = np.isfinite(numbers).all(axis=1)
    objects.report("box_is_text", keep & is_text & finite, "expected four numbers", "bbox")

    stated_sizes = np.array([*images.stated_sizes, (0, 0)], dtype=np.int64)[objects.rows]  # row -1 is the last
    layout = detect_layout(numbers[keep], stated_sizes[keep])
    if layout != "xywh":
        first = int(np.flatnonzero(keep)[0])
        which = f"in all {keep.sum()} boxes, such as {numbers[first].tolist()}"
        if layout == "xyxy":
            message = f"expected x, y, width, height, got what looks like corners x1, y1, x2, y2 {which}"
            objects.add("boxes_are_corners", message, "error", first)
        else:
            message = f"expected px, got fractions of the sides {which}. Multiply them by width and height"
            objects.add("boxes_are_fractions", message, "fatal", first)
    boxes, moved = to_file_frame(to_corners(numbers, layout), objects.rows, images)
    objects.findings.extend(moved)
    objects.boxes = boxes

    sizes = np.array([*images.sizes, (0, 0)], dtype=np.int64)[objects.rows]
    clipped = np.clip(boxes, 0, sizes[:, [1, 0, 1, 0]])
    has_area = finite & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    inside = has_area & (clipped[:, 2:] > clipped[:, :2]).all(axis=1)
    cut = inside & (np.abs(clipped - boxes).max(axis=1, initial=0) > BORDER_TOLERANCE)
    flat, outside = keep & finite & ~has_area, keep & has_area & ~inside
    objects.report("box_not_numbers", keep & ~finite, "expected four finite numbers", "bbox")
    objects.report("box_without_area", flat, "expected a positive width and height", "bbox", tolerated=True)
    objects.report("box_outside", outside, "expected a box that touches the image", "bbox", tolerated=True)
    objects.report("box_partly_outside", keep & cut, "expected a box within the image", "bbox", tolerated=True)
    return clipped, keep & inside & ~(cut & (on_error == "skip"))


def _report_flagged(num_flagged: int, flagged_objects: FlaggedObjects, findings: list[Finding]) -> None:
    if num_flagged:
        outcome = {"crowd": "count as crowd regions", "keep": "count as ordinary objects", "drop": "are left out"}
        setting = f"data.flagged_objects={flagged_objects}"
        message = (
            f"{num_flagged} object(s) are flagged as difficult or ignored; they {outcome[flagged_objects]} ({setting})"
        )
        findings.append(Finding("objects_flagged", message, "warning"))


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _repeats(table: np.ndarray) -> np.ndarray:
    """Mark the rows of [T] or [T, n] that equal an earlier row, bool [T]."""
    columns = table if table.ndim == 2 else table[:, None]
    if not _may_repeat(columns):
        return np.zeros(len(table), dtype=bool)
    order = np.lexsort(columns.T)  # keeps the order of equal rows
    repeated = np.zeros(len(table), dtype=bool)
    repeated[order[1:]] = (columns[order[1:]] == columns[order[:-1]]).all(axis=1)
    return repeated


def _may_repeat(columns: np.ndarray) -> bool:
    """False if no row equals another, by a hash of each row: much faster than sorting by all columns."""
    bits = (np.ascontiguousarray(columns, np.float64) + 0.0).view(np.uint64)  # -0.0 becomes 0.0
    hashes = np.zeros(len(bits), np.uint64)
    for column in bits.T:
        hashes = (hashes ^ column) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(32)
    hashes.sort()
    return bool((hashes[1:] == hashes[:-1]).any())
