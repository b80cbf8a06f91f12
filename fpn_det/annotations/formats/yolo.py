"""YOLO: one label file per image with lines `class cx cy w h`, as fractions of the image's sides."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, TypeVar

from fpn_det.annotations.files import (
    FolderListings,
    near_matches,
    non_empty_lines,
    read_text,
    walk_files,
)
from fpn_det.annotations.findings import Finding
from fpn_det.annotations.parsing import parse_id, parse_number
from fpn_det.annotations.raw import RawDataset, RawImage, split_aliases
from fpn_det.image_io import IMAGE_SUFFIXES, image_size, only_images
from fpn_det.safe_yaml import load_yaml

PathT = TypeVar("PathT", bound=PurePath)

SPLITS = ("train", "val", "test")
LAYOUTS = ("images/{}", "{}/images", "{}")  # folders of the images of a split
EMPTY_VALUES = ("", "null", "~")  # of a key without a value
QUAD_COLUMNS = 9  # class and four corners: oriented boxes and quadrangles


@dataclass(frozen=True)
class Description:
    """Content of data.yaml, or of classes.txt."""

    file: Path
    class_names: list[str]
    splits: dict[str, list[str]]  # name of a split -> its entries: folders, or text files that list images
    root: str = "."  # of the entries, relative to the folder of the file
    num_keypoint_columns: int | None = None  # after the box; None if not stated


def load(source: Path, folder: Path | None, split: str) -> RawDataset:
    """Load the images of a split and their labels, in the same path with `labels` for `images`, or beside the image.

    An image without a label file has no objects. A polygon counts as the box around it.

    Args:
        source: `data.yaml`, or the folder of one or of `classes.txt`.
        folder: of the images; None is where `data.yaml` has the split, else `images/<split>` or `<split>/images`.
        split: part to read.

    Raises:
        ValueError: there are no class names, or no images of the split; says what was looked for.
    """
    file = find_description(source) if source.is_dir() else source
    if file is None:
        raise ValueError(f"{source}: expected data.yaml or classes.txt, got neither.")
    description = _read_description(file)
    files, image_list = _find_images(description, folder, split)
    if not files:
        raise ValueError(
            f"{file}: expected images of the split {split}, got none in {folder or image_list or file.parent}. "
            f"Set data.{split}.images."
        )
    base = folder or Path(os.path.commonpath([os.path.abspath(file.parent) for file in files]))
    raw = RawDataset(file, base, image_list=image_list)
    raw.categories.extend({"id": number, "name": name} for number, name in enumerate(description.class_names))
    listings = FolderListings()
    existing = {path: _existing(path, base, listings) for path in files}
    label_file_of = {path: _label_file(existing[path], listings) for path in files}
    shared = _shared_label_files(label_file_of, listings)
    labeled: list[tuple[RawImage, str, list[list[float]]]] = []
    num_label_files = 0
    for path in files:
        labels = label_file_of[path]
        if labels in shared:
            names = ", ".join(sorted(shared[labels]))
            message = f"expected a label file of its own, got {labels.name} for {names}; left out. Rename one of them"
            raw.findings.append(Finding("label_file_shared", message, file_name=path.name))
            continue
        rows: list[list[float]] | None = []
        if listings.has(str(labels)):
            num_label_files += 1
            rows = _read_labels(labels, raw)
        if rows is not None:
            name = os.path.relpath(os.path.abspath(path), base).replace(os.sep, "/")
            labeled.append((raw.add_image(name, image_size(existing[path])), labels.name, rows))
    if not num_label_files:
        message = f"expected label files such as {label_file_of[files[0]]}, got none for {len(files)} image(s)"
        raw.findings.append(Finding("no_label_files", message, "warning"))
    _add_objects(labeled, description, raw)
    _report_labels_without_image(label_file_of, listings, raw)
    return raw


def find_splits(source: Path) -> list[str]:
    """Return the splits that `load` finds in a folder or data.yaml; empty if all images are one set."""
    file = find_description(source) if source.is_dir() else source
    if file is None:
        return []
    stated = _read_description(file).splits
    folder = file.parent

    def exists(split: str) -> bool:
        names = split_aliases(split)
        if stated:
            return any(name in stated for name in names)
        return any((folder / layout.format(name)).is_dir() for name in names for layout in LAYOUTS)

    return [split for split in SPLITS if exists(split)]


def find_description(folder: Path) -> Path | None:
    """Return the file of a folder that states the class names."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    others = [name for name in names if name.lower().endswith((".yaml", ".yml"))]
    files = [folder / name for name in ("data.yaml", "data.yml", "dataset.yaml", *others, "classes.txt")]
    return next((file for file in files if file.is_file()), None)


def _read_description(file: Path) -> Description:
    if file.suffix.lower() == ".txt":
        return Description(file, non_empty_lines(file), {})
    # Scalars stay strings: the class `no` is not False, and `1e3` is not 1000.
    content = load_yaml(read_text(file), str(file), as_strings=True)
    if not isinstance(content, dict) or "names" not in content:
        raise ValueError(f"{file}: expected 'names' with the names of the classes, got none.")
    splits = {}
    for key in (alias for split in SPLITS for alias in split_aliases(split)):
        value = content.get(key, "")
        if value not in EMPTY_VALUES:
            entries = [value] if isinstance(value, str) else value
            if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
                raise ValueError(f"{file}: expected {key!r} as a path or a list of paths, got {str(value)[:80]}.")
            splits[key] = entries
    root = content.get("path", ".")
    if not isinstance(root, str):
        raise ValueError(f"{file}: expected 'path' as a folder, got {str(root)[:80]}.")
    root = "." if root in EMPTY_VALUES else root
    return Description(file, _class_names(file, content), splits, root, _keypoint_columns(file, content))


def _class_names(file: Path, content: dict[str, Any]) -> list[str]:
    names = content["names"]
    if isinstance(names, dict):
        numbers = {parse_id(key): name for key, name in names.items()}
        missing = next((number for number in range(len(names)) if number not in numbers), None)
        if missing is not None:
            raise ValueError(
                f"{file}: expected 'names' as a list or a table that counts from 0, got no class {missing}."
            )
        names = [numbers[number] for number in range(len(names))]
    if not isinstance(names, list):
        raise ValueError(f"{file}: expected 'names' as a list or a table that counts from 0, got {str(names)[:80]!r}.")
    wrong = [name for name in names if not isinstance(name, str) or not name.strip()]
    if wrong:
        raise ValueError(f"{file}: expected a name for each class, got {str(wrong[0])[:80]!r}.")
    stated = content.get("nc", "")
    if stated not in EMPTY_VALUES and parse_id(stated) != len(names):
        raise ValueError(
            f"{file}: expected as many names as 'nc' says, got nc {str(stated)[:20]} and {len(names)} names. Correct one of them."
        )
    return names


def _keypoint_columns(file: Path, content: dict[str, Any]) -> int | None:
    shape = content.get("kpt_shape", "")
    if shape in EMPTY_VALUES:
        return None
    values = [parse_id(value) for value in shape] if isinstance(shape, list) else []
    if len(values) != 2 or not isinstance(values[0], int) or values[0] < 1 or values[1] not in (2, 3):
        raise ValueError(f"{file}: expected 'kpt_shape' as [keypoints, 2 or 3], got {str(shape)[:80]}.")
    return values[0] * values[1]


def _find_images(description: Description, folder: Path | None, split: str) -> tuple[list[Path], str | None]:
    """Return the images of a split, and the folder or entry that defines it; None if all images of the set are taken.

    Raises:
        ValueError: the split is not stated while others are, or its path does not exist.
    """
    file = description.file
    if folder is not None:
        return _images_below(folder), str(folder)
    aliases = split_aliases(split)
    entries = next((description.splits[name] for name in aliases if name in description.splits), None)
    if entries is not None:
        return _images_of_entries(description, entries), f"{file}: {', '.join(entries)}"
    if description.splits:
        raise ValueError(
            f"{file}: expected {' or '.join(aliases)} with the images of the split, got {', '.join(description.splits)}. "
            f"Add it, or set data.{split}.images."
        )
    tried = [layout.format(name) for name in aliases for layout in LAYOUTS]
    found = next((inner for inner in tried if (file.parent / inner).is_dir()), None)
    if found is not None:
        return _images_below(file.parent / found), str(file.parent / found)
    all_aliases = [alias for other in SPLITS for alias in split_aliases(other)]
    others = [
        inner.format(name) for name in all_aliases for inner in LAYOUTS if (file.parent / inner.format(name)).is_dir()
    ]
    if others:
        raise ValueError(
            f"{file}: expected the folder {' or '.join(tried[:2])}, got {', '.join(others)}. Set data.{split}.images."
        )
    inner = file.parent / "images"
    return _images_below(inner if inner.is_dir() else file.parent), None


def _images_of_entries(description: Description, entries: Sequence[str]) -> list[Path]:
    files: list[Path] = []
    for entry in entries:
        place = _resolve(description, entry)
        if place.is_dir():
            files += _images_below(place)
        elif place.suffix.lower() == ".txt":
            lines = non_empty_lines(place)
            if not lines:
                raise ValueError(f"{place}: expected the path of an image in each line, got an empty list.")
            files += [_resolve_line(line, place, description) for line in lines]
        else:
            raise ValueError(
                f"{description.file}: expected a folder or a .txt file that lists images, got {entry[:200]!r}."
            )
    return files


def _resolve_line(line: str, list_file: Path, description: Description) -> Path:
    """The image that a line names, relative to the list or to the data set; lists of other systems have backslashes."""
    starts = (list_file.parent, description.file.parent / description.root, description.file.parent)
    paths = [Path(os.path.normpath(start / text)) for text in (line, line.replace("\\", "/")) for start in starts]
    return next((path for path in paths if os.path.exists(path)), paths[0])


def _resolve(description: Description, entry: str) -> Path:
    """The path of an entry: from `path`, from the folder of data.yaml, or without the `../` that some exports begin with."""
    parent = description.file.parent
    tried = [
        start / name for start in (parent / description.root, parent) for name in (entry, entry.removeprefix("../"))
    ]
    found = next((path for path in tried if os.path.exists(path)), None)
    if found is None:
        similar = near_matches(Path(entry).name, sorted(path.name for path in parent.iterdir()))
        hint = f" There is {', '.join(similar)}." if similar else ""
        raise ValueError(
            f"{description.file}: expected a path that exists, got {entry[:200]!r}, that is {str(tried[0].absolute())[:500]}.{hint}"
        )
    return found


def _images_below(folder: Path) -> list[Path]:
    return only_images(walk_files(folder))


def _existing(image: Path, folder: Path, listings: FolderListings) -> Path:
    """The file that an entry of a list means; `check_images` reports and takes the same one."""
    found = "" if listings.has(str(image)) else listings.find_renamed(str(image), folder)
    return Path(found) if found else image


def _label_file(image: Path, listings: FolderListings) -> Path:
    """The label file of an image: in the path with `labels` in the place of `images`, or beside it."""
    beside = _with_text_suffix(image.parent, image.stem, listings)
    folder = label_folder(image.parent)
    if folder == image.parent:
        return beside
    other = _with_text_suffix(folder, image.stem, listings)
    return beside if listings.has(str(beside)) and not listings.has(str(other)) else other


def label_folder(folder: PathT) -> PathT:
    """The folder of the label files of the images in `folder`: `labels` in the place of its last part `images`."""
    parts = list(folder.parts)
    positions = [i for i, part in enumerate(parts) if part.lower() == "images"]
    if not positions:
        return folder
    spelling = parts[positions[-1]]
    parts[positions[-1]] = {"images": "labels", "IMAGES": "LABELS"}.get(spelling, "Labels")
    return type(folder)(*parts)


def _with_text_suffix(folder: Path, stem: str, listings: FolderListings) -> Path:
    """`<folder>/<stem>.txt`, in the spelling of the ending that exists."""
    names = listings.with_stem(folder, stem)
    return folder / next((name for name in names if name.lower().endswith(".txt")), f"{stem}.txt")


def _shared_label_files(label_file_of: Mapping[Path, Path], listings: FolderListings) -> dict[Path, set[str]]:
    """Label files that belong to several images whose names differ by their ending only, and the names of these."""
    names_of: dict[Path, set[str]] = {}
    for image, labels in label_file_of.items():
        names_of.setdefault(labels, set()).add(image.name)
    return {labels: names for labels, names in names_of.items() if len(names) > 1 and listings.has(str(labels))}


def _read_labels(labels: Path, raw: RawDataset) -> list[list[float]] | None:
    """The numbers of each line; empty for an empty line, and for one that has other words, which is reported.

    None for a file that cannot be read, which is reported too.
    """
    try:
        lines = read_text(labels).split("\n")
    except ValueError as error:
        reason = str(error).removeprefix(f"{labels}: ").rstrip(".")
        message = f"{reason}; its image is left out"
        raw.findings.append(Finding("annotation_file_unreadable", message, file_name=labels.name))
        return None
    rows = []
    for number, line in enumerate(lines, start=1):
        rows.append([parse_number(word) for word in line.split()])
        if any(map(math.isnan, rows[-1])):
            message = f"expected numbers separated by blanks, got '{line.strip()[:80]}'; left out"
            raw.findings.append(Finding("label_columns", message, where=f"{labels.name} line {number}"))
            rows[-1] = []
    return rows


def _add_objects(
    labeled: Sequence[tuple[RawImage, str, list[list[float]]]], description: Description, raw: RawDataset
) -> None:
    """Append an object for each line; lines that are no box are reported."""
    extra = description.num_keypoint_columns
    ambiguous = extra is None and _may_be_keypoints([row for _, _, rows in labeled for row in rows if len(row) >= 7])
    for image, file_name, rows in labeled:
        for number, values in enumerate(rows, start=1):
            if not values:
                continue
            where = f"{file_name} line {number}"
            box, problem = _box_of(values, extra, ambiguous)
            if problem:
                place = {"image_id": image.id, "file_name": image.file_name, "where": where}
                raw.findings.append(Finding("label_columns", problem, **place))
            if box is None:
                continue
            x, y, w, h = box
            height, width = image.height or 0, image.width or 0
            corners = [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
            category_id = int(values[0]) if values[0] % 1 == 0 else values[0]
            raw.add_box(image, category_id, corners, where)


def _box_of(values: list[float], keypoint_columns: int | None, ambiguous: bool) -> tuple[list[float] | None, str]:
    """Return cx, cy, w, h of a line, or None; and what is wrong with the line, or nothing."""
    if len(values) == 5 or (keypoint_columns is not None and len(values) == 5 + keypoint_columns):
        return values[1:5], ""
    shown = " ".join(f"{value:g}" for value in values[:8]) + (" ..." if len(values) > 8 else "")
    if len(values) == 6:
        return values[1:5], f"expected class cx cy w h, got a sixth value in '{shown}'; left out"
    if keypoint_columns is not None and len(values) >= 7:
        expected = f"{5 + keypoint_columns} values by kpt_shape"
        return None, f"expected {expected}, got {len(values)} in '{shown}'; left out"
    if len(values) < 7 or len(values) % 2 == 0:
        return None, f"expected class cx cy w h, got '{shown}'; left out"
    if ambiguous:
        return None, (
            f"expected class cx cy w h or a polygon, got {len(values)} values that may be a box and keypoints: '{shown}'; "
            "left out. State kpt_shape: [keypoints, 2 or 3] in data.yaml"
        )
    x, y = values[1::2], values[2::2]
    return [(min(x) + max(x)) / 2, (min(y) + max(y)) / 2, max(x) - min(x), max(y) - min(y)], ""


def _may_be_keypoints(rows: list[list[float]]) -> bool:
    """True if long lines can be a box and keypoints as well as a polygon.

    Keypoints come in the same number in each line, after a box that lies within the image. A closed polygon or a
    quadrangle is neither.
    """
    widths = {len(row) for row in rows}
    if len(widths) != 1 or widths == {QUAD_COLUMNS}:
        return False
    is_closed = all(row[1:3] == row[-2:] for row in rows)
    return not is_closed and all(
        side / 2 - 0.01 <= center <= 1.01 - side / 2 and side > 0
        for row in rows
        for center, side in ((row[1], row[3]), (row[2], row[4]))
    )


def _report_labels_without_image(label_file_of: Mapping[Path, Path], listings: FolderListings, raw: RawDataset) -> None:
    """Report label files whose image does not exist or has an ending that is not read; other splits may own the rest."""
    known = set(label_file_of.values())
    image_folder_of = {labels.parent: image.parent for image, labels in label_file_of.items()}
    for folder in sorted(image_folder_of):
        for name in sorted(listings.names(folder)):
            path = folder / name
            is_label = name.lower().endswith(".txt") and not name.startswith(".") and name != "classes.txt"
            if not is_label or path in known or folder == image_folder_of[folder]:
                continue
            images = [
                other
                for place in {image_folder_of[folder], folder}
                for other in listings.with_stem(place, path.stem)
                if not other.lower().endswith(".txt")
            ]
            if any(Path(other).suffix.lower() in IMAGE_SUFFIXES for other in images):
                continue
            got = f"{images[0]}, whose ending is not that of an image" if images else "none"
            message = f"expected the image of {path}, got {got}"
            raw.findings.append(Finding("image_file_missing", message, file_name=name))
