"""Check image records: which of them name a file that can be used, and of what size it is."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from fpn_det.annotations.files import FolderListings
from fpn_det.annotations.findings import SHOWN_PER_KIND, Finding, OnError
from fpn_det.annotations.image_inspection import ImageInfo, ImageInspector, is_mislabeled
from fpn_det.annotations.parsing import parse_id, parse_pixels
from fpn_det.annotations.raw import RawDataset, RawImage
from fpn_det.image_io import RGB, image_size

MAX_SIDE = 1 << 31  # px; larger numbers are no size of an image

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

    def add(
        self,
        key: int | str,
        image_id: int,
        file_name: str,
        path: str,
        size: Size,
        stated_size: Size,
        info: ImageInfo,
    ) -> int:
        """Append an image, which `key` stands for in the file, and return its row."""
        row = self.row_of[key] = len(self.paths)
        self.left_out.remove(key)
        self.image_ids.append(image_id)
        self.file_names.append(file_name)
        self.paths.append(path)
        self.sizes.append(size)
        self.stated_sizes.append(stated_size)
        self.orientations.append(info.orientation)
        self.digests.append(info.digest)
        return row


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
    keys = [parse_id(record.id) for record in raw.images]
    names_of = _names_of_repeated(keys, raw.images)
    # Image ids that are strings get numbers above all others.
    free = count(1 + max((key for key in keys if isinstance(key, int)), default=0))
    listings = FolderListings()
    in_folder = set() if folder is None else listings.names(folder)
    prefix = "" if folder is None else str(folder)
    wanted_paths, paths = [], []
    for record in raw.images:
        wanted = _join(prefix, record.file_name)
        is_there = folder is None or not wanted or record.file_name in in_folder or listings.has(wanted)
        wanted_paths.append(wanted)
        paths.append(wanted if is_there or folder is None else listings.find_renamed(wanted, folder))
    infos = inspect((path for path in paths if path), folder) if inspect and folder else {}
    table = ImageTable(left_out=set(keys))
    _note_channels(infos, findings)
    row_of_path: dict[str, int] = {}
    num_missing = 0
    for record, key, wanted, path in zip(raw.images, keys, wanted_paths, paths, strict=True):
        name, info = record.file_name, infos.get(path, ImageInfo())
        file = os.path.normpath(path)
        size = record.height, record.width
        if (
            record.id is key
            and type(key) is int
            and key not in names_of
            and path
            and path == wanted
            and file not in row_of_path
            and _is_plain(size)
            and (path not in infos or _agrees(info, size, path))
        ):
            row_of_path[file] = table.add(key, key, name, path, size, size, info)
            continue

        def report(kind: str, message: str, severity: str = "error", key=key, name=name) -> None:
            findings.append(Finding(kind, message, severity, key, str(name)))  # type: ignore[arg-type]

        if key is None:
            report("image_id_not_integer", f"image {name!r} has the id {record.id!r}")
        elif len(names_of.get(key, ())) > 1:
            report("image_id_duplicate", f"{len(names_of[key])} different files have this id")
        elif key in table.row_of:
            report("image_id_duplicate", "this image is listed twice")
        elif not wanted:
            report("image_file_unnamed", f"expected a file_name, got {name!r}")
        elif file in row_of_path and path:
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
            if isinstance(record.id, str):
                report("image_id_is_text", f"expected a number as id, got {record.id!r}")
            checked = _check_size(record, path, infos.get(path), folder is not None, on_error, report)
            if checked is None:
                continue
            stated = parse_pixels(record.height), parse_pixels(record.width)
            image_id = key if isinstance(key, int) else next(free)
            row_of_path[file] = table.add(
                key, image_id, str(name), path, checked, stated if min(stated) else checked, info
            )
    return table


def _note_channels(infos: Mapping[str, ImageInfo], findings: list[Finding]) -> None:
    """Count the channels that the files have, unless all are pictures of three."""
    counts = Counter(info.channels for info in infos.values() if not info.fault)
    if set(counts) - {str(RGB)}:
        for channels, number in counts.most_common():
            first = next(path for path, info in infos.items() if info.channels == channels and not info.fault)
            message = f"{number} image(s) have {channels}; data.channels and data.dtype say what is read of them"
            findings.append(Finding("image_channels", message, "note", file_name=os.path.basename(first)))


def _names_of_repeated(keys: list, records: list[RawImage]) -> dict[int | str | None, set[str]]:
    """The file names of each id that more than one record has."""
    repeated = {key for key, number in Counter(keys).items() if number > 1}
    names_of: dict[int | str | None, set[str]] = {key: set() for key in repeated}
    if repeated:
        for key, record in zip(keys, records, strict=True):
            if key in repeated:
                names_of[key].add(str(record.file_name))
    return names_of


def _is_plain(size: tuple[Any, Any]) -> bool:
    return type(size[0]) is type(size[1]) is int and 0 < size[0] < MAX_SIDE and 0 < size[1] < MAX_SIDE


def _agrees(info: ImageInfo, size: Size, path: str) -> bool:
    return not info.fault and (info.height, info.width) == size and not is_mislabeled(path, info)


def _join(folder: str, name: object) -> str:
    """The path of a file name; empty if the value cannot be one."""
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        return ""
    if not name.isascii():
        try:
            os.fsencode(name)
        except UnicodeEncodeError:  # a lone surrogate, which JSON can write
            return ""
    return os.path.join(folder, name)


def _hint(path: str, wanted: str, listings: FolderListings, num_missing: int) -> str:
    """Name the files that resemble a missing one, as the end of a sentence; searches for the first few only."""
    if path:
        return f", but {path}"
    similar = listings.similar(wanted) if num_missing <= SHOWN_PER_KIND else []
    return f", but {' and '.join(similar)}" if similar else ""


def _check_size(
    record: RawImage, path: str, info: ImageInfo | None, has_files: bool, on_error: OnError, report: Report
) -> Size | None:
    """Return (h, w) of the file if it was inspected, else of the record; None leaves the image out."""
    if info is not None and info.fault:
        report("image_unreadable", f"{path}: {info.fault}")
        return None
    if info is not None and is_mislabeled(path, info):
        report("image_mislabeled", f"{path}: the content is {info.kind}; it is read all the same", "warning")
    height, width = parse_pixels(record.height), parse_pixels(record.width)
    if not height or not width:
        report("image_size_missing", f"width {record.width!r}, height {record.height!r}")
        if on_error == "skip" or not has_files:
            return None
        return (info.height, info.width) if info else image_size(Path(path))
    if isinstance(record.height, str) or isinstance(record.width, str):
        report("image_size_is_text", f"expected numbers, got width {record.width!r}, height {record.height!r}")
    if info is None or (info.height, info.width) == (height, width):
        return height, width
    turned = info.is_turned and (info.width, info.height) == (height, width)
    why = f" The annotations ignore its EXIF orientation {info.orientation}." if turned else ""
    found = f"the file's {info.width} x {info.height} px, got width {width}, height {height}"
    report("image_size_differs", f"expected {found}.{why}")
    return None if on_error == "skip" else (info.height, info.width)
