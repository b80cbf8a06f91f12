"""A table in a text file: a line for each object, corners in px."""

from __future__ import annotations

import csv
from pathlib import Path

from fpn_det.annotations.findings import Finding
from fpn_det.annotations.raw import RawDataset, Record, parse_number, read_text
from fpn_det.image_io import image_size

# How tools name the columns; the first is ours.
COLUMNS = {
    "file": ("file", "filename", "file_name", "image", "image_path", "path"),
    "x1": ("x1", "xmin", "x_min", "left"),
    "y1": ("y1", "ymin", "y_min", "top"),
    "x2": ("x2", "xmax", "x_max", "right"),
    "y2": ("y2", "ymax", "y_max", "bottom"),
    "class": ("class", "class_name", "label", "name", "category"),
    "width": ("width", "image_width", "w"),
    "height": ("height", "image_height", "h"),
}
OPTIONAL = ("width", "height")  # else the picture says


def load(source: Path, folder: Path | None) -> RawDataset:
    """A picture without objects has one line, empty from x1 on. The classes are those that occur, by name.

    Raises:
        ValueError: columns are missing.
    """
    lines = read_text(source).splitlines()
    header = lines[0] if lines else ""
    delimiter = max(",;\t", key=header.count)
    reader = csv.DictReader(lines, delimiter=delimiter)
    given = {name.strip().lower(): name for name in reader.fieldnames or ()}
    columns = {ours: next((given[name] for name in names if name in given), None) for ours, names in COLUMNS.items()}
    missing = [name for name, column in columns.items() if column is None and name not in OPTIONAL]
    if missing:
        raise ValueError(
            f"{source}: expected the columns {', '.join(COLUMNS)}, got none named {', '.join(missing)}. "
            f"Its first line is: {header[:80]!r}."
        )
    tables = RawDataset(source, folder, [], [], [], states_classes=False)
    image_of: dict[str, Record] = {}
    category_of: dict[str, int] = {}
    rows = []
    for cells in reader:
        row = {ours: (cells.get(column) or "").strip() for ours, column in columns.items() if column is not None}
        if any(row.values()):
            rows.append((reader.line_num, row))
    for number, name in enumerate(sorted({row["class"] for _, row in rows if row["class"]}), start=1):
        category_of[name] = number
        tables.categories.append({"id": number, "name": name})
    for line, row in rows:
        where = f"{source.name} line {line}"
        image = image_of.get(row["file"])
        size = {side: parse_number(row[side]) for side in OPTIONAL if row.get(side)}
        if image is None:
            image = {"id": len(image_of) + 1, "file_name": row["file"], **size}
            if len(size) < 2 and folder is not None:
                image["height"], image["width"] = image_size(folder / row["file"]) or (None, None)
            image_of[row["file"]] = image
            tables.images.append(image)
        elif any(image[side] != value for side, value in size.items()):
            message = f"expected the same size as before, got width {row['width']}, height {row['height']}"
            tables.findings.append(
                Finding("image_size_differs", message, image_id=image["id"], file_name=row["file"], where=where)
            )
        if row["class"] or row["x1"]:
            tables.add_box(
                image,
                category_of.get(row["class"]),
                [parse_number(row[side]) for side in ("x1", "y1", "x2", "y2")],
                where,
            )
    return tables
