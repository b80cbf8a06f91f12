"""COCO JSON: the file states the three tables of a raw data set as they are.

Most files are read by msgspec with typed records, block by block, so that neither the whole text nor its masks are in
memory. A file for which that does not work, because it is damaged, has NaN or objects without a box, is read by Python's
parser, which accepts more and says at which place a text is no JSON.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from fpn_det.annotations.files import describe_foreign, open_file, read_file
from fpn_det.annotations.findings import Finding, one_line
from fpn_det.annotations.masks import mask_extent
from fpn_det.annotations.raw import (
    SPLIT_ALIASES,
    RawDataset,
    RawImage,
    RawObject,
    RawObjects,
    Record,
    no_collection,
    split_aliases,
)

TABLES = ("images", "annotations", "categories")
MAX_JSON_BYTES = 64 << 30
BLOCK_BYTES = 1 << 20

OBJECTS_START = re.compile(rb'"annotations"\s*:\s*\[')
OBJECTS_STOP = re.compile(rb"\}\s*\]")
NEXT_OBJECT = re.compile(rb"\}\s*,\s*\{")


class _Document(msgspec.Struct):
    images: list[RawImage]
    categories: list[Record]
    annotations: list[RawObject]


_decode_objects = msgspec.json.Decoder(list[RawObject]).decode


def load(source: Path, folder: Path | None) -> RawDataset:
    """Load a JSON file.

    The box of an object without one is computed from its mask. A file without `annotations` is a list of images.
    `coco_url` replaces a missing `file_name`.

    Args:
        source: the JSON file.
        folder: of the images.

    Raises:
        ValueError: the file is not JSON or lacks a table.
    """
    try:
        with open_file(source, MAX_JSON_BYTES) as file, no_collection():
            images, objects, categories = _read_in_blocks(file)
        raw = RawDataset(source, folder, images, objects, categories, str(source))
    except (msgspec.MsgspecError, ValueError, RecursionError, MemoryError):
        raw = _read_any(source, folder)
    _add_file_names(raw)
    return raw


def find_splits(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Return the JSON file and the folder of the images of each split of a folder.

    The layouts are COCO's (`annotations/instances_train2017.json` and `train2017`, the year is optional) and
    `train/_annotations.coco.json` beside the images.
    """
    found = {}
    for split in SPLIT_ALIASES:
        for name in split_aliases(split):
            files = [
                *sorted(folder.glob(f"annotations/instances_{name}*.json")),
                folder / name / "_annotations.coco.json",
            ]
            for file in (path for path in files if path.is_file() and split not in found):
                inner = file.stem.removeprefix("instances_") if file.parent.name == "annotations" else name
                images = [folder / inner, folder / "images" / inner, folder / name, folder / "images"]
                found[split] = file, next((path for path in images if path.is_dir()), images[0])
    return found


def _read_in_blocks(file: BinaryIO) -> tuple[list[RawImage], RawObjects, list[Record]]:
    """Read the tables with at most two blocks of `annotations` in memory.

    A block starts where an object starts. If its text up to a place between two objects is a list of objects, that place
    is not within one: so a wrong guess of the place cannot be decoded.

    Raises:
        MsgspecError, UnicodeDecodeError, RecursionError: the file is not such a document, or an object has no box.
    """
    text = bytearray()
    while (start := OBJECTS_START.search(text)) is None:
        text += _read_block(file, text)
    head, text = text[: start.end()], text[start.end() :]
    objects = RawObjects()
    while (stop := OBJECTS_STOP.search(text)) is None:
        if end := _last_boundary(text):
            _extend(objects, text[:end])
            del text[: text.index(b"{", end)]
        text += _read_block(file, text)
    _extend(objects, text[: stop.start() + 1])
    document = msgspec.json.decode(head + text[stop.start() + 1 :] + file.read(), type=_Document)
    if document.annotations:
        raise msgspec.DecodeError("another table within the document has that name")
    return document.images, objects, document.categories


def _read_block(file: BinaryIO, text: bytearray) -> bytes:
    """The next block; as long as the text that was searched in vain, which will be searched again."""
    block = file.read(max(BLOCK_BYTES, len(text)))
    if not block:
        raise msgspec.DecodeError("the table of objects has no start or end")
    return block


def _extend(objects: RawObjects, text: bytearray) -> None:
    records = _decode_objects(b"[" + text + b"]")
    if not all(record.bbox for record in records):
        raise msgspec.DecodeError("boxes are to be computed from masks")
    objects.extend(records)


def _last_boundary(text: bytearray) -> int:
    """Position after the last object that another one follows; 0 if there is none."""
    end = len(text)
    while (end := text.rfind(b"}", 0, end)) > 0:
        if NEXT_OBJECT.match(text, end):
            return end + 1
    return 0


def _read_any(source: Path, folder: Path | None) -> RawDataset:
    """Read a file with Python's parser, and say what is wrong with it.

    Raises:
        ValueError: the file is not JSON or lacks a table.
    """
    from_mask: list[Any] = []

    def convert(record: Record) -> Record:
        mask = record.pop("segmentation", None)  # masks are most of the memory
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
    images = [RawImage(**_known(RawImage, record)) for record in document["images"]]
    objects = RawObjects(RawObject(**_known(RawObject, record)) for record in document["annotations"])
    raw = RawDataset(source, folder, images, objects, document["categories"], str(source), is_labeled=is_labeled)
    if from_mask:
        message = f"{len(from_mask)} object(s) have no bbox; it is computed from the segmentation"
        raw.findings.append(Finding("box_from_mask", message, "warning", annotation_id=from_mask[0]))
    return raw


def _known(kind: type[msgspec.Struct], record: Record) -> Record:
    return {key: record[key] for key in kind.__struct_encode_fields__ if key in record}


def _add_file_names(raw: RawDataset) -> None:
    """Take missing file names from `coco_url`: its last part, or the last two where the images are in subfolders."""
    num_added = 0
    for image in raw.images:
        url = image.coco_url
        if image.file_name is None and isinstance(url, str) and "/" in url and "\0" not in url:
            *_, subfolder, name = url.split("/")
            in_subfolder = raw.folder is not None and os.path.exists(os.path.join(raw.folder, subfolder, name))
            image.file_name = f"{subfolder}/{name}" if in_subfolder else name
            num_added += 1
    if num_added:
        message = f"{num_added} image(s) have no file_name; it is taken from coco_url"
        raw.findings.append(Finding("file_name_from_url", message, "warning"))
