"""A data set as its files have it, of whatever format: COCO's three tables, still of any values.

The readers of all formats (`coco`, `voc`, `yolo`, `csv_table`) make these, and `examine` judges them: so a fault is
found, named and repaired in one place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fpn_det.annotations.findings import Finding

Record = dict[str, Any]

OTHER_NAMES = {"train": ("training",), "val": ("valid", "validation"), "test": ("testing",)}  # of splits


@dataclass
class RawDataset:
    """What a reader found. Annotations may say `where` they stand, if their id is not in a file."""

    source: Path
    folder: Path | None  # where the file names start from; None = nobody looks for pictures
    images: list[Record]
    annotations: list[Record]
    categories: list[Record]
    states_classes: bool = True  # else the classes are those that happen to occur
    findings: list[Finding] = field(default_factory=list)  # what could not even become a record

    def add_box(
        self,
        image: Record,
        category_id: int | None,
        corners: list[float],
        where: str,
        offset: int = 0,
        iscrowd: int = 0,
    ) -> None:
        """Append an object that its format describes by corners x1, y1, x2, y2.

        Args:
            image: its record.
            category_id: None for a class without name.
            corners: NaN for what is no number; exchanged corners are put in order.
            where: file and line, or the like.
            offset: number of the first pixel. Equal corners are a slip of the mouse, not an object one pixel wide.
            iscrowd: as in COCO.
        """
        x1, y1, x2, y2 = corners
        if x1 > x2 or y1 > y2:
            message = f"expected x1 <= x2 and y1 <= y2, got {x1:g}, {y1:g}, {x2:g}, {y2:g}; exchanged"
            self.findings.append(
                Finding("box_corners_exchanged", message, "error", image["id"], image["file_name"], where=where)
            )
            x1, x2, y1, y2 = min(x1, x2), max(x1, x2), min(y1, y2), max(y1, y2)
        if x1 < x2 and y1 < y2:
            x1, y1 = x1 - offset, y1 - offset
        self.annotations.append(
            {
                "id": len(self.annotations) + 1,
                "image_id": image["id"],
                "category_id": category_id,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": max(x2 - x1, 0.0) * max(y2 - y1, 0.0),
                "iscrowd": iscrowd,
                "where": where,
            }
        )

    @property
    def class_names(self) -> list[str]:
        """By category id, as far as the file makes sense."""
        numbered = [record for record in self.categories if isinstance(parse_id(record.get("id")), int)]
        return list(
            dict.fromkeys(
                str(record.get("name")) for record in sorted(numbered, key=lambda record: parse_id(record["id"]) or 0)
            )
        )


def parse_id(value: Any) -> int | str | None:
    """An id as JSON may write it: 7 or 7.0; "7" too, as in `is_text`. Other text stays text, the rest is None."""
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            return value.strip() or None
    number = int(value) if isinstance(value, float) and value.is_integer() else value
    return number if type(number) is int and abs(number) < 2**63 else None


def parse_pixels(value: Any) -> int:
    """A number of pixels, or 0 for what is none."""
    number = parse_id(value)
    return max(number, 0) if isinstance(number, int) else 0


def parse_number(value: Any) -> float:
    """A number as JSON may write it, as text too; NaN for what is none, and for numbers beyond all reason."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return math.nan
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e100 else math.nan


def split_aliases(split: str) -> tuple[str, ...]:
    """What the folder of a split may be called."""
    return (split, *OTHER_NAMES.get(split, ()))


def read_text(path: Path) -> str:
    """A text file, whichever Unicode it is in; bytes that are none become question marks.

    Raises:
        ValueError: there is no such file, or it cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{path}: expected a file, got none that can be read: {error.strerror}. Check the path."
        ) from None
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    return content.decode(encoding, errors="replace")
