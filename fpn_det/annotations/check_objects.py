"""From the records of objects to the columns of Annotations: every fault found, named, and repaired or left out.

Boxes become xyxy here, the first of their five hops. Crowd regions stay: evaluation honors them, training leaves them
out. Work is done on whole columns at once.

Real sets are never quite clean, so two things are let pass. A box that passes the border by at most BORDER_TOLERANCE
is a matter of rounding and is clipped. And a kind of box fault that is as rare as TOLERATED_SHARE of the annotations is
repaired with a warning: COCO's train2017 has 2 boxes without area among 860,001. Under 100,000 boxes nothing is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fpn_det.annotations.box_layout import corners, detect_layout, to_file_frame
from fpn_det.annotations.check_images import ImageTable, OnError
from fpn_det.annotations.classes import LEFT_OUT, UNKNOWN, Classes
from fpn_det.annotations.findings import Finding, Severity
from fpn_det.annotations.raw import Record, parse_id, parse_number
from fpn_det.annotations.subsets import offsets_of
from fpn_det.structures import Annotations

BORDER_TOLERANCE = 1.0  # px
TOLERATED_SHARE = 1e-5
TINY_SIDE = 2.0  # px


def check_objects(
    records: list[Record], pictures: ImageTable, classes: Classes, policy: OnError, findings: list[Finding]
) -> Annotations:
    """The data set without what cannot be used; what was wrong goes to `findings`.

    Under `fail`, warnings change nothing: what is scored is what the file says.
    """
    found = _Objects(records, pictures, findings)
    labels = np.array(
        [classes.labels.get(parse_id(record.get("category_id")), UNKNOWN) for record in records], dtype=np.int64
    )
    wanted = np.array([image_id not in pictures.left_out for image_id in found.image_ids], dtype=bool) & (
        labels != LEFT_OUT
    )
    keep = wanted & (found.rows >= 0) & (labels != UNKNOWN)
    found.report("image_unknown", wanted & (found.rows < 0), "expected the id of an image", "image_id")
    found.report(
        "class_unknown",
        wanted & (found.rows >= 0) & (labels == UNKNOWN),
        "expected the id of a category",
        "category_id",
    )
    for key in ("image_id", "category_id"):
        found.report(f"{key}_is_text", keep & found.is_text(key), "expected a number", key)

    boxes, keep = _boxes(found, keep, policy)
    sides = boxes[:, 2:] - boxes[:, :2]
    found.report(
        "box_tiny",
        keep & (sides < TINY_SIDE).any(axis=1),
        f"expected sides of at least {TINY_SIDE:g} px",
        "bbox",
        "warning",
    )

    numbers = np.array([value if isinstance(value, int) else 0 for value in found.ids], dtype=np.int64)
    misnumbered = (numbers < 1) | _repeats(numbers) | found.is_text("id")
    found.report("annotation_id", keep & misnumbered, "expected a positive integer that is used once", "id")

    area, box_area = found.column("area"), sides.prod(axis=1)
    no_area = ~(area >= 0)  # NaN too
    rounding = 2 * BORDER_TOLERANCE * sides.sum(axis=1)
    too_much = ~no_area & (area > 1.05 * box_area + rounding)
    found.report("area_missing", keep & no_area, "expected a number that is not negative", "area")
    found.report("area_beyond_box", keep & too_much, "expected no more than its box has", "area", "warning")

    flags = found.column("iscrowd")
    no_crowd = ~np.isin(flags, (0, 1)) | found.is_text("iscrowd")
    found.report("iscrowd_missing", keep & no_crowd, "expected 0 or 1", "iscrowd")

    copies = np.zeros(len(records), dtype=bool)
    copies[np.flatnonzero(keep)[_repeats(np.column_stack([found.rows, labels, flags == 1, boxes])[keep])]] = True
    found.report(
        "box_twice", copies, "expected each object once; its class and box have come before", "bbox", "warning"
    )

    repairs = policy != "fail"
    order = np.flatnonzero(keep & ~copies if repairs else keep)
    order = order[np.argsort(found.rows[order], kind="stable")]
    area = np.where(no_area | (too_much & repairs), box_area, area)
    return Annotations(
        image_ids=torch.tensor(pictures.image_ids, dtype=torch.int64),
        **_pack_paths(pictures.paths),
        sizes=torch.tensor(pictures.sizes, dtype=torch.int64).reshape(-1, 2),
        offsets=offsets_of(np.bincount(found.rows[order], minlength=len(pictures.paths))),
        boxes=torch.from_numpy(boxes[order]),
        labels=torch.from_numpy(labels[order]),
        iscrowd=torch.from_numpy(flags[order] == 1),
        area=torch.from_numpy(area[order]),
        annotation_ids=torch.from_numpy(np.arange(1, len(order) + 1) if misnumbered[order].any() else numbers[order]),
        class_names=classes.names,
        category_ids=classes.category_ids,
    )


class _Objects:
    """The records as columns, and where each of them is."""

    def __init__(self, records: list[Record], pictures: ImageTable, findings: list[Finding]) -> None:
        self.records = records
        self.pictures = pictures
        self.findings = findings
        self.boxes: np.ndarray | None = None  # xyxy, once they are known
        self.ids = [parse_id(record.get("id")) for record in records]
        self.image_ids = [parse_id(record.get("image_id")) for record in records]
        self.rows = np.array([pictures.row_of.get(image_id, -1) for image_id in self.image_ids], dtype=np.int64)

    def column(self, key: str) -> np.ndarray:
        return np.array([parse_number(record.get(key)) for record in self.records], dtype=np.float64)

    def is_text(self, key: str) -> np.ndarray:
        return np.array([isinstance(record.get(key), str) for record in self.records], dtype=bool)

    def report(
        self,
        kind: str,
        faulty: np.ndarray,
        message: str,
        key: str,
        severity: Severity = "error",
        tolerated: bool = False,
    ) -> None:
        """One finding for each faulty object; a tolerated kind that is rare is only a warning."""
        places = np.flatnonzero(faulty).tolist()
        if tolerated and len(places) <= TOLERATED_SHARE * len(self.records):
            severity = "warning"
        for index in places:
            self.add(kind, f"{message}, got {key} {_shown(self.records[index].get(key))}", severity, index)

    def add(self, kind: str, message: str, severity: Severity, index: int) -> None:
        """A finding about one object."""
        row, record = self.rows[index], self.records[index]
        file_name = self.pictures.file_names[row] if row >= 0 else None
        box = (
            None
            if self.boxes is None or not np.isfinite(self.boxes[index]).all()
            else tuple(self.boxes[index].tolist())
        )
        place = self.image_ids[index], file_name, self.ids[index], record.get("where")
        self.findings.append(Finding(kind, message, severity, *place, box))


def _boxes(found: _Objects, keep: np.ndarray, policy: OnError) -> tuple[np.ndarray, np.ndarray]:
    """Boxes xyxy [T, 4] within their images, and which objects are still kept."""
    pictures = found.pictures
    written = [_four(record.get("bbox")) for record in found.records]
    numbers = np.array([list(map(parse_number, four)) for four in written], dtype=np.float64).reshape(-1, 4)
    is_text = np.array([any(isinstance(value, str) for value in four) for four in written], dtype=bool)
    finite = np.isfinite(numbers).all(axis=1)
    found.report("box_is_text", keep & is_text & finite, "expected four numbers", "bbox")

    stated = np.array([*pictures.stated_sizes, (0, 0)], dtype=np.int64)[found.rows]  # row -1 is the last
    layout = detect_layout(numbers[keep], stated[keep])
    if layout != "xywh":
        first = int(np.flatnonzero(keep)[0])
        such = f"in all {keep.sum()} boxes, such as {numbers[first].tolist()}"
        if layout == "xyxy":
            found.add(
                "boxes_are_corners",
                f"expected x, y, width, height, got what looks like corners x1, y1, x2, y2 {such}",
                "error",
                first,
            )
        else:
            message = f"expected px, got fractions of the sides {such}. Multiply them by width and height"
            found.add("boxes_are_fractions", message, "fatal", first)
    boxes, carried = to_file_frame(corners(numbers, layout), found.rows, pictures)
    found.findings.extend(carried)
    found.boxes = boxes

    sizes = np.array([*pictures.sizes, (0, 0)], dtype=np.int64)[found.rows]
    clipped = np.clip(boxes, 0, sizes[:, [1, 0, 1, 0]])
    solid = finite & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    inside = solid & (clipped[:, 2:] > clipped[:, :2]).all(axis=1)
    cut = inside & (np.abs(clipped - boxes).max(axis=1, initial=0) > BORDER_TOLERANCE)
    found.report("box_not_numbers", keep & ~finite, "expected four finite numbers", "bbox")
    found.report(
        "box_without_area", keep & finite & ~solid, "expected a positive width and height", "bbox", tolerated=True
    )
    found.report("box_outside", keep & solid & ~inside, "expected a box that touches the image", "bbox", tolerated=True)
    found.report("box_partly_outside", keep & cut, "expected a box within the image", "bbox", tolerated=True)
    return clipped, keep & inside & ~(cut & (policy == "skip"))


def _four(bbox: Any) -> list:
    """What should be the four numbers of a box; NaN for anything else."""
    return bbox if isinstance(bbox, list) and len(bbox) == 4 else [math.nan] * 4


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _repeats(table: np.ndarray) -> np.ndarray:
    """Which rows of [T] or [T, n] have come before."""
    columns = table if table.ndim == 2 else table[:, None]
    order = np.lexsort(columns.T)  # keeps the order of equal rows
    repeated = np.zeros(len(table), dtype=bool)
    repeated[order[1:]] = (columns[order[1:]] == columns[order[:-1]]).all(axis=1)
    return repeated


def _pack_paths(paths: Iterable[str]) -> dict[str, Tensor]:
    encoded = [path.encode(errors="surrogateescape") for path in paths]
    joined = np.frombuffer(b"".join(encoded), dtype=np.uint8).copy()
    return {"path_bytes": torch.from_numpy(joined), "path_offsets": offsets_of([len(path) for path in encoded])}
