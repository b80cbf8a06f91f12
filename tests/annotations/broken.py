"""Small data sets and faults to put into them, one at a time."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Document = dict[str, Any]
SIZES = [(48, 64), (64, 48), (40, 60), (48, 64), (60, 60), (48, 64)]  # (h, w)


def write_pictures(folder: Path) -> None:
    """`0.png` ... of SIZES, in smooth colors that differ."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(list(folder.name.encode()))  # other folders have other pictures
    for number, size in enumerate(SIZES):
        pixels = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size[::-1]).save(folder / f"{number}.png")


def clean() -> Document:
    """Sound annotations of the pictures: two objects on each, one crowd, none on the last; boxes in the right lower half."""
    images = [{"id": 10 * n + 7, "file_name": f"{n}.png", "width": w, "height": h} for n, (h, w) in enumerate(SIZES)]
    annotations = []
    for number, (height, width) in enumerate(SIZES[:-1]):
        for kind in (0, 1):
            box = [width // 2 + number, height // 2 - 3 * kind, 12 + number, 10 + kind]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 10 * number + 7,
                    "category_id": (3, 90)[kind],
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(number == 1 and kind == 1),
                }
            )
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 3, "name": "cat"}, {"id": 90, "name": "dog"}],
    }


Fault = Callable[[Document, Path], None]  # changes the document, or the pictures in the folder


def each(table: str, change: Callable[[dict], None]) -> Fault:
    """A fault in every record of a table."""

    def fault(document: Document, folder: Path) -> None:
        for record in document[table]:
            change(record)

    return fault


def one(table: str, row: int = 0, **values: Any) -> Fault:
    """Change values of one record; `...` deletes one."""

    def fault(document: Document, folder: Path) -> None:
        document[table][row].update(values)
        document[table][row] = {key: value for key, value in document[table][row].items() if value is not ...}

    return fault


def added(table: str, row: int = 0, **values: Any) -> Fault:
    """Append a copy of one record with other values."""

    def fault(document: Document, folder: Path) -> None:
        document[table].append(copy.deepcopy(document[table][row]) | values)

    return fault


def file(name: str, change: Callable[[bytes], bytes | None]) -> Fault:
    """Change the content of an image file, or delete it."""

    def fault(document: Document, folder: Path) -> None:
        content = change((folder / name).read_bytes())
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)

    return fault


def as_jpeg(content: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(content)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def turned(content: bytes) -> bytes:
    """Return the same upright image, stored rotated with an EXIF orientation of 6."""
    exif = Image.Exif()
    exif[0x112] = 6
    buffer = io.BytesIO()
    Image.open(io.BytesIO(content)).transpose(Image.Transpose.ROTATE_90).save(buffer, "JPEG", exif=exif, quality=95)
    return buffer.getvalue()


def both(*faults: Fault) -> Fault:
    def fault(document: Document, folder: Path) -> None:
        for change in faults:
            change(document, folder)

    return fault


def renamed(old: str, new: str) -> Fault:
    def fault(document: Document, folder: Path) -> None:
        (folder / old).rename(folder / new)

    return fault


def to_corners(record: dict) -> None:
    x, y, w, h = record["bbox"]
    record["bbox"] = [x, y, x + w, y + h]


def text_values(*keys: str) -> Callable[[dict], None]:
    def change(record: dict) -> None:
        record.update({key: str(record[key]) for key in keys})

    return change


def shift_categories(document: Document, folder: Path) -> None:
    """The ids of the categories start at 0 in the table, and at 1 in the annotations."""
    for number, record in enumerate(document["categories"]):
        record["id"] = number


def write(document: Document, path: Path) -> Path:
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


# name -> the fault, what the refusal has to say (kind, then place), and whether `fix` gives the clean set back:
# True; or False where the truth is lost and what is faulty is left out.
FAULTS: dict[str, tuple[Fault, tuple[str, ...], bool]] = {
    # files
    "file missing": (file("0.png", lambda _: None), ("image_file_missing", "image 7 (0.png)"), False),
    "file empty": (file("0.png", lambda _: b""), ("image_unreadable", "image 7 (0.png)", "empty"), False),
    "file truncated": (
        file("0.png", lambda content: content[: len(content) // 2]),
        ("image_unreadable", "image 7 (0.png)"),
        False,
    ),
    "jpeg truncated": (
        file("0.png", lambda content: as_jpeg(content)[:-40]),
        ("image_unreadable", "image 7 (0.png)"),
        False,
    ),
    "file is text": (
        file("0.png", lambda _: b"<html>404 not found</html>"),
        ("image_unreadable", "image 7 (0.png)"),
        False,
    ),
    "file is zeros": (
        file("0.png", lambda content: bytes(len(content))),
        ("image_unreadable", "image 7 (0.png)"),
        False,
    ),
    "header only": (file("0.png", lambda content: content[:33]), ("image_unreadable", "image 7 (0.png)"), False),
    "folder instead of a file": (
        both(file("0.png", lambda _: None), lambda d, f: (f / "0.png").mkdir()),
        ("image_unreadable", "image 7"),
        False,
    ),
    "file in another case": (renamed("0.png", "0.PNG"), ("image_file_missing", "image 7 (0.png)", "0.PNG"), True),
    "windows path": (one("images", file_name="C:\\data\\0.png"), ("image_file_missing", "image 7", "0.png"), True),
    "path of another machine": (
        one("images", file_name="/home/somebody/0.png"),
        ("image_file_missing", "image 7"),
        True,
    ),
    "path with the folder twice": (one("images", file_name="train/0.png"), ("image_file_missing", "image 7"), True),
    "file name missing": (one("images", file_name=...), ("image_file_unnamed", "image 7"), False),
    "file name null": (one("images", file_name=None), ("image_file_unnamed", "image 7"), False),
    "file name a number": (one("images", file_name=0), ("image_file_unnamed", "image 7"), False),
    # sizes
    "size differs": (one("images", width=65), ("image_size_differs", "image 7 (0.png)", "64 x 48"), True),
    "sides exchanged": (one("images", width=48, height=64), ("image_size_differs", "image 7 (0.png)"), True),
    "size doubled": (one("images", width=128, height=96), ("image_size_differs", "image 7 (0.png)"), True),
    "size halved": (one("images", width=32, height=24), ("image_size_differs", "image 7 (0.png)"), True),
    "size as before the EXIF rotation": (
        both(file("0.png", turned), one("images", width=48, height=64)),
        ("image_size_differs", "image 7 (0.png)", "EXIF"),
        True,
    ),
    "size missing": (one("images", width=...), ("image_size_missing", "image 7 (0.png)"), True),
    "size zero": (one("images", width=0, height=0), ("image_size_missing", "image 7 (0.png)"), True),
    "size negative": (one("images", width=-64), ("image_size_missing", "image 7 (0.png)"), True),
    "size as text": (one("images", width="64"), ("image_size_is_text", "image 7 (0.png)"), True),
    "size NaN": (one("images", width=float("nan")), ("image_size_missing", "image 7 (0.png)"), True),
    # image ids
    "image listed twice": (added("images"), ("image_id_duplicate", "image 7 (0.png)"), True),
    "file under two ids": (added("images", id=500), ("image_file_twice", "image 500 (0.png)", "image 7"), True),
    "two images of one id": (one("images", row=1, id=7), ("image_id_duplicate", "image 7 (1.png)"), False),
    "image id missing": (one("images", id=...), ("image_id_not_integer", "0.png"), False),
    "image id true": (one("images", id=True), ("image_id_not_integer", "0.png"), False),
    "image id 7.5": (one("images", id=7.5), ("image_id_not_integer", "0.png"), False),
    "image ids as text": (
        both(each("images", text_values("id")), each("annotations", text_values("image_id"))),
        ("image_id_is_text", "image 7 (0.png)", "'7'"),
        True,
    ),
    "image ids are names": (
        both(
            each("images", lambda record: record.update(id=f"picture {record['id']}")),
            each("annotations", lambda record: record.update(image_id=f"picture {record['image_id']}")),
        ),
        ("image_id_is_text", "image picture 7 (0.png)"),
        True,
    ),
    "image_id of another split": (
        one("annotations", image_id=4711),
        ("image_unknown", "image 4711", "annotation 1"),
        False,
    ),
    "image_id missing": (one("annotations", image_id=...), ("image_unknown", "annotation 1"), False),
    "image_id as text": (
        one("annotations", image_id="7"),
        ("image_id_is_text", "image 7 (0.png)", "annotation 1"),
        True,
    ),
    # annotation ids
    "annotation id 0": (one("annotations", id=0), ("annotation_id", "image 7 (0.png)", "annotation 0"), True),
    "all annotation ids 0": (
        each("annotations", lambda record: record.update(id=0)),
        ("annotation_id", "annotation 0"),
        True,
    ),
    "annotation ids from 0": (
        each("annotations", lambda record: record.update(id=record["id"] - 1)),
        ("annotation_id", "annotation 0"),
        True,
    ),
    "annotation id twice": (one("annotations", row=1, id=1), ("annotation_id", "annotation 1"), True),
    "annotation id missing": (one("annotations", id=...), ("annotation_id", "image 7 (0.png)"), True),
    "annotation id as text": (one("annotations", id="1"), ("annotation_id", "annotation 1"), True),
    "annotation id negative": (one("annotations", id=-1), ("annotation_id", "annotation -1"), True),
    "annotation id beyond all reason": (one("annotations", id=10**30), ("annotation_id", "image 7 (0.png)"), True),
    # boxes
    "box NaN": (
        one("annotations", bbox=[1, 2, float("nan"), 4]),
        ("box_not_numbers", "image 7 (0.png)", "annotation 1"),
        False,
    ),
    "box infinite": (one("annotations", bbox=[1, 2, float("inf"), 4]), ("box_not_numbers", "annotation 1"), False),
    "box of three": (one("annotations", bbox=[1, 2, 3]), ("box_not_numbers", "annotation 1"), False),
    "box missing": (one("annotations", bbox=...), ("box_not_numbers", "annotation 1"), False),
    "box as a table": (one("annotations", bbox={"x": 1}), ("box_not_numbers", "annotation 1"), False),
    "box as text": (one("annotations", bbox=["32", "24", "12", "10"]), ("box_is_text", "annotation 1"), True),
    "box without width": (one("annotations", bbox=[9, 9, 0, 9]), ("box_without_area", "annotation 1"), False),
    "box of negative height": (one("annotations", bbox=[9, 9, 9, -9]), ("box_without_area", "annotation 1"), False),
    "box outside": (one("annotations", bbox=[90, 9, 9, 9]), ("box_outside", "annotation 1"), False),
    "box partly outside": (one("annotations", bbox=[60, 40, 20, 20]), ("box_partly_outside", "annotation 1"), False),
    "box huge": (one("annotations", bbox=[0, 0, 1e99, 1e99]), ("box_partly_outside", "annotation 1"), False),
    "box beyond all reason": (one("annotations", bbox=[0, 0, 10**400, 1]), ("box_not_numbers", "annotation 1"), False),
    "boxes are corners": (
        each("annotations", to_corners),
        ("boxes_are_corners", "image 7 (0.png)", "annotation 1"),
        True,
    ),
    # area and crowd
    "area missing": (each("annotations", lambda record: record.pop("area")), ("area_missing", "annotation 1"), True),
    "area negative": (one("annotations", area=-1), ("area_missing", "annotation 1"), True),
    "area null": (one("annotations", area=None), ("area_missing", "annotation 1"), True),
    "area NaN": (one("annotations", area=float("nan")), ("area_missing", "annotation 1"), True),
    "iscrowd missing": (one("annotations", iscrowd=...), ("iscrowd_missing", "annotation 1"), True),
    "iscrowd as text": (each("annotations", text_values("iscrowd")), ("iscrowd_missing", "annotation 1"), True),
    "iscrowd 2": (one("annotations", iscrowd=2), ("iscrowd_missing", "annotation 1"), True),
    "iscrowd null": (one("annotations", iscrowd=None), ("iscrowd_missing", "annotation 1"), True),
    # classes
    "category_id out of range": (
        one("annotations", category_id=333),
        ("class_unknown", "image 7 (0.png)", "annotation 1", "333"),
        False,
    ),
    "category_id as text": (one("annotations", category_id="3"), ("category_id_is_text", "annotation 1"), True),
    "category_id missing": (one("annotations", category_id=...), ("class_unknown", "annotation 1"), False),
    "category_id true": (one("annotations", category_id=True), ("class_unknown", "annotation 1"), False),
    "category ids shifted": (shift_categories, ("class_unknown", "annotation 1"), False),
    "category ids as text": (each("categories", text_values("id")), ("category_id_is_text", "'cat'"), True),
    "class twice": (added("categories", id=91), ("class_duplicate", "'cat'", "[3, 91]"), True),
    # combinations
    "id 0, no area, no flag, wrong size": (
        both(
            one("annotations", id=0),
            each("annotations", lambda record: record.pop("area")),
            one("annotations", 2, iscrowd=...),
            one("images", 1, width=5),
        ),
        ("annotation_id", "area_missing", "iscrowd_missing", "image_size_differs"),
        True,
    ),
    "empty file and unknown class and NaN": (
        both(
            file("0.png", lambda _: b""),
            one("annotations", 2, category_id=5),
            one("annotations", 4, bbox=[1, 1, float("nan"), 1]),
        ),
        ("image_unreadable", "class_unknown", "annotation 3", "box_not_numbers", "annotation 5"),
        False,
    ),
    "corners and annotation ids from 0": (
        both(each("annotations", to_corners), each("annotations", lambda record: record.update(id=record["id"] - 1))),
        ("boxes_are_corners", "annotation_id"),
        True,
    ),
}

# Faults that change no number: they are reported and stop no run.
WARNINGS: dict[str, tuple[Fault, tuple[str, ...]]] = {
    "jpeg called png": (file("0.png", as_jpeg), ("image_mislabeled", "image 7 (0.png)", "JPEG")),
    "tiny box": (
        added("annotations", id=99, bbox=[3, 3, 1, 1], area=1),
        ("box_tiny", "image 7 (0.png)", "annotation 99"),
    ),
    "object twice": (added("annotations", id=99), ("box_twice", "image 7 (0.png)", "annotation 99")),
    "area beyond the box": (one("annotations", area=4000), ("area_beyond_box", "annotation 1")),
    "classes alike": (added("categories", id=4, name="Cat"), ("class_alike", "'cat'", "'Cat'")),
}
