"""The pictures of a data set: which records of images name a file that can be used, and of what size."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Literal

from fpn_det.annotations.findings import SHOWN_PER_KIND, Finding, near_matches
from fpn_det.annotations.image_inspection import ImageInfo, is_mislabeled
from fpn_det.annotations.raw import RawDataset, Record, parse_id, parse_pixels
from fpn_det.image_io import image_size

OnError = Literal["fail", "fix", "skip"]
ImageInspector = Callable[[Iterable[str], Path], Mapping[str, ImageInfo]]
Size = tuple[int, int]  # (h, w)


@dataclass
class ImageTable:
    """The usable images, a row each; and the ids of those that are not: nobody misses their annotations."""

    image_ids: list[int] = field(default_factory=list)
    file_names: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)  # of the file
    stated_sizes: list[Size] = field(
        default_factory=list
    )  # of the record: the frame in which its boxes may have been drawn
    orientations: list[int] = field(default_factory=list)  # EXIF, as far as somebody looked
    digests: list[str] = field(default_factory=list)  # of the file's bytes, or ""
    row_of: dict[int | str | None, int] = field(default_factory=dict)
    left_out: set[int | str | None] = field(default_factory=set)


def check_images(
    tables: RawDataset, policy: OnError, inspect: ImageInspector | None, findings: list[Finding]
) -> ImageTable:
    """Every image that can be used, once; what is wrong with the others goes to `findings`.

    Args:
        tables: where the records are and the folder that their names start from.
        policy: under `skip`, images whose size is missing or wrong are left out.
        inspect: looks into the files; None trusts the records.
    """
    folder = tables.folder
    keys = [parse_id(record.get("id")) for record in tables.images]
    files_of: dict[int | str | None, set[str]] = {}
    for key, record in zip(keys, tables.images, strict=True):
        files_of.setdefault(key, set()).add(str(record.get("file_name")))
    free = count(1 + max((key for key in keys if isinstance(key, int)), default=0))  # for ids that are no numbers
    listings = _Listings()
    paths = [_path(folder, record.get("file_name")) for record in tables.images]
    found = [path if folder is None or listings.has(path) else listings.meant(path, folder) for path in paths]
    looks = inspect((path for path in found if path), folder) if inspect and folder else {}
    pictures = ImageTable(left_out=set(files_of))
    row_of_path: dict[str, int] = {}
    missing = 0
    for record, key, wanted, path in zip(tables.images, keys, paths, found, strict=True):
        name = record.get("file_name")

        def report(kind: str, message: str, severity: str = "error", key=key, name=name) -> None:
            findings.append(Finding(kind, message, severity, key, str(name)))  # type: ignore[arg-type]

        if key is None:
            report("image_id_not_integer", f"image {name!r} has the id {record.get('id')!r}")
        elif len(files_of[key]) > 1:
            report("image_id_duplicate", f"{len(files_of[key])} different files have this id")
        elif key in pictures.row_of:
            report("image_id_duplicate", "this image is listed twice")
        elif not isinstance(name, str) or not name.strip():
            report("image_file_unnamed", f"expected a file_name, got {name!r}")
        elif path in row_of_path:
            report(
                "image_file_twice",
                f"the file is image {pictures.image_ids[row_of_path[path]]} already; they count as one",
            )
            pictures.row_of[key] = row_of_path[path]
            pictures.left_out.remove(key)
        else:
            if path != wanted:
                missing += 1
                hint = f", but {path}" if path else listings.similar(wanted) if missing <= SHOWN_PER_KIND else ""
                report("image_file_missing", f"no file {wanted}{hint}")
            if not path or (path != wanted and policy == "skip"):
                continue
            if isinstance(record.get("id"), str):
                report("image_id_is_text", f"expected a number as id, got {record['id']!r}")
            size = _size(record, path, looks.get(path), folder is not None, policy, report)
            if size is None:
                continue
            look = looks.get(path, ImageInfo())
            row_of_path[path] = pictures.row_of[key] = len(pictures.paths)
            pictures.image_ids.append(key if isinstance(key, int) else next(free))
            pictures.file_names.append(name)
            pictures.paths.append(path)
            pictures.sizes.append(size)
            stated = parse_pixels(record.get("height")), parse_pixels(record.get("width"))
            pictures.stated_sizes.append(stated if min(stated) else size)
            pictures.orientations.append(look.orientation)
            pictures.digests.append(look.digest)
            pictures.left_out.remove(key)
    return pictures


def _size(
    record: Record, path: str, look: ImageInfo | None, has_files: bool, policy: OnError, report: Callable[..., None]
) -> Size | None:
    """(h, w) of an image: of its file if somebody looked, else of its record. None leaves the image out."""
    if look is not None and look.fault:
        report("image_unreadable", f"{path}: {look.fault}")
        return None
    if look is not None and is_mislabeled(path, look):
        report("image_mislabeled", f"{path}: a {look.kind} by its content; it is read all the same", "warning")
    height, width = parse_pixels(record.get("height")), parse_pixels(record.get("width"))
    if not height or not width:
        report("image_size_missing", f"width {record.get('width')!r}, height {record.get('height')!r}")
        if policy == "skip" or not has_files:
            return None
        return (look.height, look.width) if look else image_size(Path(path))
    if isinstance(record["height"], str) or isinstance(record["width"], str):
        report("image_size_is_text", f"expected numbers, got width {record['width']!r}, height {record['height']!r}")
    if look is None or (look.height, look.width) == (height, width):
        return height, width
    turned = look.is_turned and (look.width, look.height) == (height, width)
    why = f" It is turned by its EXIF orientation {look.orientation}, which the annotations left out." if turned else ""
    report(
        "image_size_differs",
        f"expected the file's {look.width} x {look.height} px, got width {width}, height {height}.{why}",
    )
    return None if policy == "skip" else (look.height, look.width)


def _path(folder: Path | None, name: object) -> str:
    return os.path.join(folder or "", str(name))


class _Listings:
    """What is in which folder: one look into each instead of one at each file."""

    def __init__(self) -> None:
        self._names: dict[str, set[str]] = {}
        self._folded: dict[str, dict[str, str]] = {}

    def names(self, folder: str) -> set[str]:
        if folder not in self._names:
            try:
                self._names[folder] = set(os.listdir(folder))
            except (OSError, ValueError):
                self._names[folder] = set()
        return self._names[folder]

    def has(self, path: str) -> bool:
        parent, name = os.path.split(path)
        return name in self.names(parent)

    def meant(self, path: str, folder: Path) -> str:
        """The one file that must be meant by a path from another system, with another root or in other letters; or ""."""
        parts = [part for part in str(path).removeprefix(f"{folder}{os.sep}").replace("\\", "/").split("/") if part]
        for start in range(len(parts)):
            *inner, name = parts[start:]
            parent = os.path.join(folder, *inner)
            if parent not in self._folded:
                self._folded[parent] = {}
                for other in sorted(self.names(parent)):
                    self._folded[parent].setdefault(_fold(other), other)
            if _fold(name) in self._folded[parent]:
                return os.path.join(parent, self._folded[parent][_fold(name)])
        return ""

    def similar(self, path: str) -> str:
        """Names beside a path that look like it, as the end of a sentence."""
        parent, name = os.path.split(path)
        similar = near_matches(name, sorted(self.names(parent)))
        return f", but {' and '.join(similar)}" if similar else ""


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name.strip()).casefold()
