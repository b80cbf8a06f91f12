"""Check image records: which of them name a file that can be used, and of what size it is."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from fpn_det.annotations.files import FolderListings
from fpn_det.annotations.findings import SHOWN_PER_KIND, Finding, OnError
from fpn_det.annotations.image_inspection import ImageInfo, ImageInspector, is_mislabeled
from fpn_det.annotations.parsing import parse_id, parse_pixels
from fpn_det.annotations.raw import RawDataset, Record
from fpn_det.image_io import image_size

Size = tuple[int, int]  # (h, w)
Report = Callable[..., None]  # (kind, message, severity="error"): adds a finding about one image


@dataclass
class ImageTable:
    """The usable images as columns, one row each, and the ids of those that are left out with their annotations."""

    image_ids: list[int] = field(default_factory=list)
    file_names: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)  # of the file
    stated_sizes: list[Size] = field(default_factory=list)  # of the record: its boxes may be in this frame
    orientations: list[int] = field(default_factory=list)  # EXIF; 1 for files that were not inspected
    digests: list[str] = field(default_factory=list)  # of the file's bytes; "" for files that were not inspected
    row_of: dict[int | str | None, int] = field(default_factory=dict)  # by the id of the file
    left_out: set[int | str | None] = field(default_factory=set)  # ids


def check_images(
    raw: RawDataset, on_error: OnError, inspect: ImageInspector | None, findings: list[Finding]
) -> ImageTable:
    """Return every usable image once, and append what is wrong with the others to `findings`.

    Args:
        raw: records, and the folder that their file names start from.
        on_error: `skip` leaves out images whose size or file name is missing or wrong.
        inspect: inspects the files; None trusts the records.
        findings: is extended.
    """
    folder = raw.folder
    keys = [parse_id(record.get("id")) for record in raw.images]
    names_of: dict[int | str | None, set[str]] = {}
    for key, record in zip(keys, raw.images, strict=True):
        names_of.setdefault(key, set()).add(str(record.get("file_name")))
    # Image ids that are strings get numbers above all others.
    free = count(1 + max((key for key in keys if isinstance(key, int)), default=0))
    listings = FolderListings()
    wanted_paths = [_join(folder, record.get("file_name")) for record in raw.images]
    paths = [
        path if folder is None or not path or listings.has(path) else listings.find_renamed(path, folder)
        for path in wanted_paths
    ]
    infos = inspect((path for path in paths if path), folder) if inspect and folder else {}
    table = ImageTable(left_out=set(names_of))
    row_of_path: dict[str, int] = {}
    num_missing = 0
    for record, key, wanted, path in zip(raw.images, keys, wanted_paths, paths, strict=True):
        name = record.get("file_name")

        def report(kind: str, message: str, severity: str = "error", key=key, name=name) -> None:
            findings.append(Finding(kind, message, severity, key, str(name)))  # type: ignore[arg-type]

        if key is None:
            report("image_id_not_integer", f"image {name!r} has the id {record.get('id')!r}")
        elif len(names_of[key]) > 1:
            report("image_id_duplicate", f"{len(names_of[key])} different files have this id")
        elif key in table.row_of:
            report("image_id_duplicate", "this image is listed twice")
        elif not wanted:
            report("image_file_unnamed", f"expected a file_name, got {name!r}")
        elif (file := os.path.normpath(path)) in row_of_path and path:
            row = row_of_path[file]
            report("image_file_twice", f"the file is image {table.image_ids[row]} already; they count as one")
            table.row_of[key] = row
            table.left_out.remove(key)
        else:
            if path != wanted:
                num_missing += 1
                report("image_file_missing", f"no file {wanted}{_hint(path, wanted, listings, num_missing)}")
            if not path or (path != wanted and on_error == "skip"):
                continue
            if isinstance(record.get("id"), str):
                report("image_id_is_text", f"expected a number as id, got {record['id']!r}")
            size = _check_size(record, path, infos.get(path), folder is not None, on_error, report)
            if size is None:
                continue
            info = infos.get(path, ImageInfo())
            row_of_path[file] = table.row_of[key] = len(table.paths)
            table.image_ids.append(key if isinstance(key, int) else next(free))
            table.file_names.append(str(name))
            table.paths.append(path)
            table.sizes.append(size)
            stated = parse_pixels(record.get("height")), parse_pixels(record.get("width"))
            table.stated_sizes.append(stated if min(stated) else size)
            table.orientations.append(info.orientation)
            table.digests.append(info.digest)
            table.left_out.remove(key)
    return table


def _join(folder: Path | None, name: object) -> str:
    """The path of a file name; empty if the value cannot be one."""
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        return ""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # a lone surrogate, which JSON can write
        return ""
    return os.path.join(folder or "", name)


def _hint(path: str, wanted: str, listings: FolderListings, num_missing: int) -> str:
    """Name the files that resemble a missing one, as the end of a sentence; searches for the first few only."""
    if path:
        return f", but {path}"
    similar = listings.similar(wanted) if num_missing <= SHOWN_PER_KIND else []
    return f", but {' and '.join(similar)}" if similar else ""


def _check_size(
    record: Record, path: str, info: ImageInfo | None, has_files: bool, on_error: OnError, report: Report
) -> Size | None:
    """Return (h, w) of the file if it was inspected, else of the record; None leaves the image out."""
    if info is not None and info.fault:
        report("image_unreadable", f"{path}: {info.fault}")
        return None
    if info is not None and is_mislabeled(path, info):
        report("image_mislabeled", f"{path}: the content is {info.kind}; it is read all the same", "warning")
    height, width = parse_pixels(record.get("height")), parse_pixels(record.get("width"))
    if not height or not width:
        report("image_size_missing", f"width {record.get('width')!r}, height {record.get('height')!r}")
        if on_error == "skip" or not has_files:
            return None
        return (info.height, info.width) if info else image_size(Path(path))
    if isinstance(record["height"], str) or isinstance(record["width"], str):
        report("image_size_is_text", f"expected numbers, got width {record['width']!r}, height {record['height']!r}")
    if info is None or (info.height, info.width) == (height, width):
        return height, width
    turned = info.is_turned and (info.width, info.height) == (height, width)
    why = f" The annotations ignore its EXIF orientation {info.orientation}." if turned else ""
    found = f"the file's {info.width} x {info.height} px, got width {width}, height {height}"
    report("image_size_differs", f"expected {found}.{why}")
    return None if on_error == "skip" else (info.height, info.width)
