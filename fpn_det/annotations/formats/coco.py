"""COCO's JSON as tables: they are what the file holds already."""

from __future__ import annotations

import json
from pathlib import Path

from fpn_det.annotations.raw import RawDataset, Record

TABLES = ("images", "annotations", "categories")


def load(source: Path, folder: Path | None) -> RawDataset:
    """Masks are dropped while parsing: nobody reads them, and they are most of the memory.

    Raises:
        ValueError: the file is not JSON, or lacks a table.
    """

    def drop_mask(record: Record) -> Record:
        record.pop("segmentation", None)
        return record

    try:
        content = source.read_bytes()
        if not content.strip():
            raise ValueError(f"it is empty ({len(content)} bytes)")
        document = json.loads(content, object_hook=drop_mask)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{source}: expected a JSON file, got one that cannot be read: {error}.") from error
    for table in TABLES:
        records = document.get(table) if isinstance(document, dict) else None
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            found = ", ".join(document) if isinstance(document, dict) else f"a {type(document).__name__}"
            raise ValueError(
                f"{source}: expected COCO's tables images, annotations and categories, got no table {table!r} (found: {found})."
            )
    return RawDataset(source, folder, *(document[table] for table in TABLES))
