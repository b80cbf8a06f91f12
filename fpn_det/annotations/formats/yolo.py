"""YOLO: a text file of labels for each picture, `class cx cy w h`, as parts of the picture's sides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from fpn_det.annotations.findings import Finding, near_matches
from fpn_det.annotations.raw import RawDataset, parse_number, read_text, split_aliases
from fpn_det.image_io import IMAGE_SUFFIXES, image_size


def load(source: Path, folder: Path | None, split: str) -> RawDataset:
    """The pictures of a split and their labels, found under the same path with `labels` for `images`, or beside them.

    A picture without a file of labels has no objects.

    Args:
        source: `data.yaml`, or the folder of one or of `classes.txt`.
        folder: of the pictures; None is where `data.yaml` has the split, else `images/<split>` or `<split>/images`.
        split: which part.

    Raises:
        ValueError: there are no class names, or no pictures of that split.
    """
    described = description(source) if source.is_dir() else source
    if described is None:
        raise ValueError(f"{source}: expected data.yaml or classes.txt, got neither.")
    content = _content(described)
    names = _names(described, content)
    files = _pictures(described, content, folder, split)
    if not files:
        raise ValueError(
            f"{described}: expected pictures of the split {split}, got none in {folder or described.parent}. Set data.{split}.images."
        )
    base = folder or _common(files)
    tables = RawDataset(described, base, [], [], [{"id": number, "name": name} for number, name in enumerate(names)])
    for file in files:
        height, width = image_size(file) or (0, 0)
        image = {
            "id": len(tables.images) + 1,
            "file_name": file.relative_to(base).as_posix(),
            "height": height,
            "width": width,
        }
        tables.images.append(image)
        labels = _labels_of(file)
        for number, line in enumerate(read_text(labels).splitlines() if labels.is_file() else [], start=1):
            where = f"{labels.name} line {number}"
            place: dict[str, Any] = {"image_id": image["id"], "file_name": file.name, "where": where}
            values = [parse_number(word) for word in line.split()]
            if not values:
                continue
            if len(values) == 6:
                tables.findings.append(
                    Finding(
                        "label_columns", f"expected class cx cy w h, got a sixth value in '{line}'; left out", **place
                    )
                )
                values = values[:5]
            box = _extent(values[1:]) if len(values) >= 7 and len(values) % 2 else values[1:]
            if len(box) != 4:
                tables.findings.append(
                    Finding("label_columns", f"expected class cx cy w h, got '{line[:80]}'; left out", **place)
                )
                continue
            x, y, w, h = box
            category_id = int(values[0]) if values[0] % 1 == 0 else None
            tables.add_box(
                image,
                category_id,
                [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height],
                where,
            )
    _report_lonely_labels(files, tables)
    return tables


def description(folder: Path) -> Path | None:
    """The file of a folder that has the names of the classes."""
    files = [
        folder / "data.yaml",
        folder / "data.yml",
        folder / "dataset.yaml",
        *sorted(folder.glob("*.yaml")),
        folder / "classes.txt",
    ]
    return next((file for file in files if file.is_file()), None)


def _content(described: Path) -> dict[str, Any]:
    if described.suffix == ".txt":
        return {"names": [line.strip() for line in read_text(described).splitlines() if line.strip()]}
    try:
        content = yaml.safe_load(read_text(described))
    except yaml.YAMLError as error:
        raise ValueError(f"{described}: expected YAML, got {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict) or "names" not in content:
        raise ValueError(f"{described}: expected 'names' with the names of the classes, got none.")
    return content


def _names(described: Path, content: dict[str, Any]) -> list[str]:
    names = content["names"]
    try:
        names = [names[number] for number in range(len(names))]  # a list, or a table from 0
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{described}: expected 'names' as a list or a table that counts from 0, got {error}."
        ) from error
    stated = content.get("nc", len(names))
    if stated != len(names):
        raise ValueError(
            f"{described}: expected as many names as 'nc' says, got nc {stated} and {len(names)} names. Correct one of them."
        )
    return [str(name) for name in names]


def _pictures(described: Path, content: dict[str, Any], folder: Path | None, split: str) -> list[Path]:
    if folder is not None:
        return _under(folder)
    aliases = split_aliases(split)
    stated = next((content[name] for name in aliases if content.get(name)), None)
    if stated is None:
        tried = [described.parent / inner for name in aliases for inner in (f"images/{name}", f"{name}/images")]
        stated = [path for path in [*tried, described.parent / "images"] if path.is_dir()][:1]
    files: list[Path] = []
    for entry in [stated] if isinstance(stated, str) else stated:
        place = _resolve(described, content, str(entry))
        if place.suffix == ".txt":
            lines = [line.strip() for line in read_text(place).splitlines() if line.strip()]
            files += [path if (path := Path(line)).is_absolute() else (place.parent / line) for line in lines]
        else:
            files += _under(place)
    return files


def _resolve(described: Path, content: dict[str, Any], entry: str) -> Path:
    """Where an entry of data.yaml leads: from its `path`, from its folder, or without the `../` that some exports begin with."""
    stated = Path(str(content.get("path") or "."))
    starts = [described.parent / stated, described.parent]
    tried = [start / name for start in starts for name in (entry, entry.removeprefix("../"))]
    found = next((path for path in tried if path.exists()), None)
    if found is None:
        parent = described.parent
        similar = near_matches(Path(entry).name, sorted(path.name for path in parent.iterdir()))
        hint = f" There is {', '.join(similar)}." if similar else ""
        raise ValueError(
            f"{described}: expected a path that exists, got {entry!r}, that is {tried[0].absolute()}.{hint}"
        )
    return found


def _under(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)


def _common(files: list[Path]) -> Path:
    """The folder that holds all files."""
    parents = [set((file.parent, *file.parent.parents)) for file in files]
    return max(set.intersection(*parents), key=lambda path: len(path.parts))


def _labels_of(file: Path) -> Path:
    """The file of labels that belongs to a picture: in the place of `images` it says `labels`, or it lies beside."""
    beside, parts = file.with_suffix(".txt"), list(file.parts)
    if "images" not in parts[:-1]:
        return beside
    parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    other = Path(*parts).with_suffix(".txt")
    return beside if beside.is_file() and not other.is_file() else other


def _extent(polygon: list[float]) -> list[float]:
    """The box (cx, cy, w, h) around a polygon x1 y1 x2 y2 ..., as segmentation labels have it."""
    x1, x2, y1, y2 = min(polygon[::2]), max(polygon[::2]), min(polygon[1::2]), max(polygon[1::2])
    return [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]


def _report_lonely_labels(files: list[Path], tables: RawDataset) -> None:
    """Labels whose picture is not there, in the folders of the labels that were looked for."""
    known = {_labels_of(file) for file in files}
    for folder in sorted({path.parent for path in known}):
        for path in sorted(folder.glob("*.txt")):
            if path not in known and path.name != "classes.txt" and "labels" in path.parts:
                message = f"expected the picture of {path}, got none"
                tables.findings.append(Finding("image_file_missing", message, file_name=path.name))
