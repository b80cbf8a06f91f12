"""CSV: one line per object, with corners in px."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from fpn_det.annotations.files import read_text
from fpn_det.annotations.findings import Finding
from fpn_det.annotations.parsing import parse_number
from fpn_det.annotations.raw import SPLIT_ALIASES, RawDataset, RawImage, split_aliases
from fpn_det.image_io import image_size

# Names of the columns in the files of other tools; the first is ours.
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
OPTIONAL = ("width", "height")  # of the image; both or none
CORNERS = ("x1", "y1", "x2", "y2")


def load(source: Path, folder: Path | None) -> RawDataset:
    """Load a table. An image without objects has one line that is empty from x1 on. Classes are those that occur.

    Args:
        source: the table, separated by commas, semicolons or tabs.
        folder: of the images.

    Raises:
        ValueError: the file is no table, or columns are missing.
    """
    raw = RawDataset(source, folder, image_list=str(source), lists_classes=False)
    rows = _read_rows(source, raw)
    names = sorted({row["class"] for _, row in rows if row["class"]})
    category_of = {name: number for number, name in enumerate(names, start=1)}
    raw.categories.extend({"id": number, "name": name} for name, number in category_of.items())
    image_of: dict[str, RawImage] = {}
    for line, row in rows:
        where = f"{source.name} line {line}"
        image = image_of.get(row["file"])
        sides = [parse_number(row[side]) for side in OPTIONAL if row.get(side)]
        size = (sides[0], sides[1]) if len(sides) == 2 else None
        if image is None:
            from_file = image_size(folder / row["file"]) if not size and folder is not None and row["file"] else None
            image = image_of[row["file"]] = raw.add_image(row["file"], from_file)
            if size:
                image.width, image.height = size
        elif size and (image.width, image.height) != size:
            message = f"expected the same size as before, got width {row['width']}, height {row['height']}"
            raw.findings.append(
                Finding("image_size_differs", message, image_id=image.id, file_name=row["file"], where=where)
            )
        if row["class"] or any(row[side] for side in CORNERS):
            stated = [row[side] for side in CORNERS]
            corners = list(map(parse_number, stated))
            raw.add_box(image, category_of.get(row["class"]), corners, where, stated=stated)
    return raw


def find_splits(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Return the table of each split of a folder, `train.csv`, and the folder that its file names start from."""
    files = {split: [folder / f"{name}.csv" for name in split_aliases(split)] for split in SPLIT_ALIASES}
    return {split: (file, folder) for split, some in files.items() for file in reversed(some) if file.is_file()}


def _read_rows(source: Path, raw: RawDataset) -> list[tuple[int, dict[str, str]]]:
    """Return (line number, our column -> cell) of every line; lines with too many cells are left out and reported."""
    text = read_text(source)
    header = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=header.count)
    # The csv module limits the length of a field, but not that of a file, which `read_text` does.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        lines = [(reader.line_num, cells) for cells in reader]
    except csv.Error as error:
        raise ValueError(
            f"{source}: expected a table, got line {reader.line_num} that cannot be read: {error}."
        ) from None
    names = [name.strip().lower() for name in (lines[0][1] if lines else [])]
    columns = {ours: next((n for n in theirs if n in names), None) for ours, theirs in COLUMNS.items()}
    missing = [name for name, column in columns.items() if column is None and name not in OPTIONAL]
    if missing:
        raise ValueError(
            f"{source}: expected the columns {', '.join(COLUMNS)}, got none named {', '.join(missing)}. "
            f"Its first line is: {header[:80]!r}."
        )
    repeated = [column for column in columns.values() if column is not None and names.count(column) > 1]
    if repeated:
        raise ValueError(f"{source}: expected each column once, got {repeated[0]} more than once. Rename one.")
    position_of = {ours: names.index(column) for ours, column in columns.items() if column is not None}
    rows = []
    for number, cells in lines[1:]:
        extra = [cell for cell in cells[len(names) :] if cell.strip()]
        if extra:
            message = f"expected {len(names)} values, got {len(cells)}; left out. Quote values that hold {delimiter!r}"
            raw.findings.append(Finding("label_columns", message, where=f"{source.name} line {number}"))
            continue
        row = {ours: cells[i].strip() if i < len(cells) else "" for ours, i in position_of.items()}
        if any(row.values()):
            rows.append((number, row))
    return rows
