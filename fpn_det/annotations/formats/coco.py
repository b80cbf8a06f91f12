"""COCO JSON: the file states the three tables of a raw data set as they are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fpn_det.annotations.files import describe_foreign, read_file
from fpn_det.annotations.findings import Finding, one_line
from fpn_det.annotations.masks import mask_extent
from fpn_det.annotations.raw import RawDataset, Record

TABLES = ("images", "annotations", "categories")
MAX_JSON_BYTES = 64 << 30


def load(source: Path, folder: Path | None) -> RawDataset:
    """Load a JSON file.

    Masks are dropped while parsing, because they are most of the memory; the box of an object without one is computed
    from its mask. A file without `annotations` is a list of images. `coco_url` replaces a missing `file_name`.

    Args:
        source: the JSON file.
        folder: of the images.

    Raises:
        ValueError: the file is not JSON or lacks a table.
    """
    from_mask: list[Any] = []

    def convert(record: Record) -> Record:
        mask = record.pop("segmentation", None)
        if mask and not record.get("bbox") and "image_id" in record:
            extent = mask_extent(mask)
            if extent is not None:
                record["bbox"] = extent
                from_mask.append(record.get("id"))
        return record

    try:
        content = read_file(source, MAX_JSON_BYTES)
        if not content.strip():
            raise ValueError(f"it is empty ({len(content)} bytes)")
        if kind := describe_foreign(content):
            raise ValueError(kind)
        document = json.loads(content, object_hook=convert)
    except (ValueError, RecursionError, MemoryError) as error:
        reason = str(error).removeprefix(f"{source}: ") or "it does not fit into memory"
        raise ValueError(f"{source}: expected a JSON file, got one that cannot be read: {one_line(reason)}.") from error
    is_labeled = not isinstance(document, dict) or "annotations" in document or "images" not in document
    if not is_labeled:
        document["annotations"] = []
    for table in TABLES:
        records = document.get(table) if isinstance(document, dict) else None
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            found = ", ".join(list(document)[:10]) if isinstance(document, dict) else f"a {type(document).__name__}"
            raise ValueError(
                f"{source}: expected COCO's tables images, annotations and categories, got no table {table!r} "
                f"(found: {one_line(found[:200])})."
            )
    images, annotations, categories = (document[table] for table in TABLES)
    raw = RawDataset(source, folder, images, annotations, categories, str(source), is_labeled=is_labeled)
    if from_mask:
        message = f"{len(from_mask)} object(s) have no bbox; it is computed from the segmentation"
        raw.findings.append(Finding("box_from_mask", message, "warning", annotation_id=from_mask[0]))
    _add_file_names(raw)
    return raw


def _add_file_names(raw: RawDataset) -> None:
    """Take missing file names from `coco_url`: its last part, or the last two where the images are in subfolders."""
    num_added = 0
    for image in raw.images:
        url = image.get("coco_url")
        if image.get("file_name") is None and isinstance(url, str) and "/" in url and "\0" not in url:
            *_, subfolder, name = url.split("/")
            in_subfolder = raw.folder is not None and os.path.exists(os.path.join(raw.folder, subfolder, name))
            image["file_name"] = f"{subfolder}/{name}" if in_subfolder else name
            num_added += 1
    if num_added:
        message = f"{num_added} image(s) have no file_name; it is taken from coco_url"
        raw.findings.append(Finding("file_name_from_url", message, "warning"))
