"""From COCO JSON to Annotations: whole columns at once, every fault found and named.

Boxes become xyxy here, the first of their five hops. Crowd regions stay: evaluation honors them, training leaves them
out.

Real sets are never quite clean, so two things are let pass. A box that passes the border by at most BORDER_TOLERANCE
is a matter of rounding and is clipped. And a kind of box fault that is as rare as TOLERATED_SHARE of the annotations is
repaired with a warning: COCO's train2017 has 2 boxes without area among 860,001. Under 100,000 boxes nothing is.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fpn_det.data.classes import LEFT_OUT, UNKNOWN, Classes, match_classes
from fpn_det.data.findings import SHOWN_PER_KIND, Finding, describe_findings, existing_path, near_matches
from fpn_det.data.images import image_size
from fpn_det.structures import Annotations

BORDER_TOLERANCE = 1.0  # px
TOLERATED_SHARE = 1e-5

Record = dict[str, Any]
logger = logging.getLogger(__name__)


def read_coco(
    annotations: str | Path,
    images: str | Path | None,
    class_names: Sequence[str] | None = None,
    subset: bool = False,
    on_error: Literal["fail", "fix", "skip"] = "fail",
) -> Annotations:
    """Read a COCO JSON file. What is wrong with it stops here or is repaired in memory, and is said in either case.

    Args:
        annotations: the JSON file.
        images: the folder its file names start from; None keeps the names as they are and looks for no file.
        class_names: the classes and their order, from the training set; None takes them from the file, by category id.
        subset: the file may hold more classes than `class_names`; their objects are left out.
        on_error: `fail` raises with everything found. `fix` clips, fills and renumbers, and leaves out what cannot be
            repaired. `skip` also leaves out boxes that `fix` would clip, and images whose size it would look up.

    Raises:
        ValueError: the file is no COCO JSON or holds no usable image, or it holds faults under `fail`.
    """
    if on_error not in ("fail", "fix", "skip"):
        raise ValueError(f"data.on_error: expected fail, fix or skip, got {on_error!r}.")
    result, findings = examine_coco(annotations, images, class_names, subset, skip=on_error == "skip")
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors and on_error == "fail":
        raise ValueError(
            f"{annotations}: expected sound annotations, got {len(errors)} fault(s). Correct the file, or set "
            f"data.on_error=fix (repairs in memory) or data.on_error=skip (leaves out).\n{describe_findings(errors)}"
        )
    if findings:
        logger.warning("%s: repaired in memory or left out:\n%s", annotations, describe_findings(findings))
    if not len(result):
        raise ValueError(f"{annotations}: expected at least one usable image, got none.\n{describe_findings(findings)}")
    return result


def examine_coco(
    annotations: str | Path,
    images: str | Path | None,
    class_names: Sequence[str] | None = None,
    subset: bool = False,
    skip: bool = False,
) -> tuple[Annotations, list[Finding]]:
    """The data set after repair, and all that had to be repaired or left out. Arguments as in `read_coco`."""
    source = existing_path(annotations, "annotations")
    folder = None if images is None else existing_path(images, "images")
    document = _load(source)
    classes, findings = match_classes(document["categories"], class_names, subset, source.name)
    pictures = _read_pictures(document["images"], folder, skip, findings)
    return _read_objects(document["annotations"], pictures, classes, skip, findings), findings


def select_images(annotations: Annotations, rows: Tensor) -> Annotations:
    """The data set with only the images of `rows` (i64 [N]), in that order."""
    objects, offsets = _select_ragged(annotations.offsets, rows)
    characters, path_offsets = _select_ragged(annotations.path_offsets, rows)
    return replace(
        annotations,
        image_ids=annotations.image_ids[rows],
        path_bytes=annotations.path_bytes[characters],
        path_offsets=path_offsets,
        sizes=annotations.sizes[rows],
        offsets=offsets,
        boxes=annotations.boxes[objects],
        labels=annotations.labels[objects],
        iscrowd=annotations.iscrowd[objects],
        area=annotations.area[objects],
        annotation_ids=annotations.annotation_ids[objects],
    )


def drop_empty(annotations: Annotations) -> Annotations:
    """The data set without images that show nothing to learn: no object, or crowd regions only."""
    images = torch.repeat_interleave(torch.arange(len(annotations)), annotations.offsets.diff())
    counts = torch.bincount(images[~annotations.iscrowd], minlength=len(annotations))
    return select_images(annotations, counts.nonzero().flatten())


def split_images(annotations: Annotations, val_fraction: float, seed: int) -> tuple[Annotations, Annotations]:
    """Part the images at random into training and validation, each in the order of the file.

    Raises:
        ValueError: one of the two would be empty.
    """
    held_out = round(len(annotations) * val_fraction)
    if not 0 < held_out < len(annotations):
        raise ValueError(
            f"data.val_fraction: expected a share that leaves images on both sides, got {val_fraction} of {len(annotations)} image(s)."
        )
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(annotations)))
    return select_images(annotations, order[held_out:].sort().values), select_images(annotations, order[:held_out].sort().values)


def _select_ragged(offsets: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Where the elements of `rows` lie in a ragged array, and the offsets of the array made of them."""
    counts = offsets.diff()[rows]
    selected = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    shift = torch.repeat_interleave(offsets[:-1][rows] - selected[:-1], counts)
    return torch.arange(len(shift)) + shift, selected


def _load(source: Path) -> dict[str, list[Record]]:
    """The tables of the file. Masks are dropped while parsing: nobody reads them, and they are most of the memory."""

    def drop_mask(record: Record) -> Record:
        record.pop("segmentation", None)
        return record

    try:
        document = json.loads(source.read_text(encoding="utf-8-sig"), object_hook=drop_mask)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: expected a JSON file, got one that cannot be read: {error}.") from error
    for table in ("images", "annotations", "categories"):
        records = document.get(table) if isinstance(document, dict) else None
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            found = ", ".join(document) if isinstance(document, dict) else f"a {type(document).__name__}"
            raise ValueError(f"{source}: expected COCO's tables images, annotations and categories, got no table {table!r} (found: {found}).")
    return document


def _integer(value: Any) -> int | None:
    """An id as JSON may write it (7 or 7.0), or None."""
    whole = int(value) if isinstance(value, float) and value.is_integer() else value
    return whole if type(whole) is int and abs(whole) < 2**63 else None


def _number(value: Any) -> float:
    """A number as JSON may write it, or NaN; numbers beyond all reason are none."""
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e100 else math.nan


@dataclass(frozen=True)
class _Pictures:
    """The usable images, and the ids of those that are not: nobody misses their annotations."""

    image_ids: list[int]
    file_names: list[str]
    paths: list[str]
    sizes: list[tuple[int, int]]
    left_out: set[int | None]


def _read_pictures(records: list[Record], folder: Path | None, skip: bool, findings: list[Finding]) -> _Pictures:
    files_of: dict[int | None, set[str]] = {}
    for record in records:
        files_of.setdefault(_integer(record.get("id")), set()).add(str(record.get("file_name")))
    listings: dict[str, set[str]] = {}  # one look into each folder instead of one at each file
    pictures = _Pictures([], [], [], [], set(files_of))
    missing = 0
    for record in records:
        image_id, file_name = _integer(record.get("id")), record.get("file_name")
        path = os.path.join(folder or "", str(file_name))
        height, width = _integer(record.get("height")) or 0, _integer(record.get("width")) or 0
        fault = None
        if image_id is None:
            fault = "image_id_not_integer", f"image {file_name!r} has the id {record.get('id')!r}"
        elif len(files_of[image_id]) > 1:
            fault = "image_id_duplicate", f"{len(files_of[image_id])} different files have this id"
        elif image_id not in pictures.left_out:
            fault = "image_id_duplicate", "this image is listed twice"
        elif not isinstance(file_name, str) or not file_name:
            fault = "image_file_unnamed", "no file_name"
        elif folder is not None and not _is_listed(path, listings):
            missing += 1
            fault = "image_file_missing", f"no file {path}{_similar(path, listings) if missing <= SHOWN_PER_KIND else ''}"
        elif height < 1 or width < 1:
            fault = "image_size_missing", f"width {record.get('width')!r}, height {record.get('height')!r}"
            height, width = (0, 0) if skip or folder is None else image_size(Path(path)) or (0, 0)
        if fault is not None:
            kind, message = fault
            findings.append(Finding(kind, message, image_id=image_id, file_name=str(file_name)))
            if kind != "image_size_missing" or not height:
                continue
        assert image_id is not None
        pictures.image_ids.append(image_id)
        pictures.file_names.append(str(file_name))
        pictures.paths.append(path)
        pictures.sizes.append((height, width))
        pictures.left_out.remove(image_id)
    return pictures


def _is_listed(path: str, listings: dict[str, set[str]]) -> bool:
    parent, name = os.path.split(path)
    if parent not in listings:
        listings[parent] = set(os.listdir(parent)) if os.path.isdir(parent) else set()
    return name in listings[parent]


def _similar(path: str, listings: dict[str, set[str]]) -> str:
    parent, name = os.path.split(path)
    similar = near_matches(name, sorted(listings[parent]))
    return f", but {' and '.join(similar)}" if similar else ""


def _read_objects(
    records: list[Record], pictures: _Pictures, classes: Classes, skip: bool, findings: list[Finding]
) -> Annotations:
    ids = [_integer(record.get("id")) for record in records]
    image_ids = [_integer(record.get("image_id")) for record in records]
    row_of: dict[int | None, int] = {image_id: row for row, image_id in enumerate(pictures.image_ids)}
    rows = np.array([row_of.get(image_id, -1) for image_id in image_ids], dtype=np.int64)
    labels = np.array([classes.labels.get(_integer(record.get("category_id")), UNKNOWN) for record in records], dtype=np.int64)
    wanted = np.array([image_id not in pictures.left_out for image_id in image_ids], dtype=bool) & (labels != LEFT_OUT)
    placed = wanted & (rows >= 0)

    def report(kind: str, faulty: np.ndarray, message: str, key: str, tolerated: bool = False) -> None:
        found = np.flatnonzero(faulty).tolist()
        rare = tolerated and len(found) <= TOLERATED_SHARE * len(records)
        for index in found:
            file_name = pictures.file_names[rows[index]] if rows[index] >= 0 else None
            text = f"{message}, got {key} {records[index].get(key)!r}"
            findings.append(Finding(kind, text, "warning" if rare else "error", image_ids[index], file_name, ids[index]))

    report("image_unknown", wanted & (rows < 0), "expected the id of an image", "image_id")
    report("class_unknown", placed & (labels == UNKNOWN), "expected the id of a category", "category_id")

    boxes = np.array([_corners(record.get("bbox")) for record in records], dtype=np.float64).reshape(-1, 4)
    sizes = np.array(pictures.sizes, dtype=np.int64).reshape(-1, 2)
    limits = np.vstack([sizes, [[0, 0]]])[rows][:, [1, 0, 1, 0]]  # (w, h, w, h); row -1 is the last
    clipped = np.clip(boxes, 0, limits)
    finite = np.isfinite(boxes).all(axis=1)
    solid = finite & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    inside = solid & (clipped[:, 2:] > clipped[:, :2]).all(axis=1)
    cut = inside & (np.abs(clipped - boxes).max(axis=1, initial=0) > BORDER_TOLERANCE)
    report("box_not_numbers", placed & ~finite, "expected four finite numbers", "bbox")
    report("box_without_area", placed & finite & ~solid, "expected a positive width and height", "bbox", tolerated=True)
    report("box_outside", placed & solid & ~inside, "expected a box that touches the image", "bbox", tolerated=True)
    report("box_partly_outside", placed & cut, "expected a box within the image", "bbox", tolerated=True)

    keep = placed & (labels != UNKNOWN) & inside & ~(cut & skip)
    numbers = np.array([value or 0 for value in ids], dtype=np.int64)
    misnumbered = (numbers < 1) | _repeats(numbers)
    area = np.array([_number(record.get("area")) for record in records], dtype=np.float64)
    no_area = ~(area >= 0)  # NaN too
    crowd = [record.get("iscrowd") for record in records]
    no_crowd = np.array([value not in (0, 1) for value in crowd], dtype=bool)
    report("annotation_id", keep & misnumbered, "expected a positive integer that is used once", "id")
    report("area_missing", keep & no_area, "expected a number that is not negative", "area")
    report("iscrowd_missing", keep & no_crowd, "expected 0 or 1", "iscrowd")

    order = np.flatnonzero(keep)
    order = order[np.argsort(rows[order], kind="stable")]
    kept = clipped[order]
    return Annotations(
        image_ids=torch.tensor(pictures.image_ids, dtype=torch.int64),
        **_pack_paths(pictures.paths),
        sizes=torch.from_numpy(sizes),
        offsets=_offsets(np.bincount(rows[order], minlength=len(sizes))),
        boxes=torch.from_numpy(kept),
        labels=torch.from_numpy(labels[order]),
        iscrowd=torch.tensor([crowd[index] == 1 for index in order.tolist()], dtype=torch.bool),
        area=torch.from_numpy(np.where(no_area[order], (kept[:, 2:] - kept[:, :2]).prod(axis=1), area[order])),
        annotation_ids=torch.from_numpy(np.arange(1, len(order) + 1) if misnumbered[order].any() else numbers[order]),
        class_names=classes.names,
        category_ids=classes.category_ids,
    )


def _corners(bbox: Any) -> tuple[float, float, float, float]:
    """COCO's (x, y, width, height) as corners; NaN for anything that is not four numbers."""
    if not isinstance(bbox, list) or len(bbox) != 4:
        return math.nan, math.nan, math.nan, math.nan
    x, y, width, height = map(_number, bbox)
    return x, y, x + width, y + height


def _repeats(values: np.ndarray) -> np.ndarray:
    """Which values have come before."""
    repeated = np.ones(len(values), dtype=bool)
    repeated[np.unique(values, return_index=True)[1]] = False
    return repeated


def _pack_paths(paths: Iterable[str]) -> dict[str, Tensor]:
    encoded = [path.encode() for path in paths]
    joined = np.frombuffer(b"".join(encoded), dtype=np.uint8).copy()
    return {"path_bytes": torch.from_numpy(joined), "path_offsets": _offsets([len(path) for path in encoded])}


def _offsets(counts: Any) -> Tensor:
    """Where each run of a ragged array starts, and where the last one ends."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), torch.as_tensor(counts, dtype=torch.int64).cumsum(0)])
