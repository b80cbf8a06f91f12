"""A data set as its files state it, in any format: COCO's three tables with unchecked values.

The readers in `formats/` make a `RawDataset`; `reading.check_raw` checks it, so each kind of fault is found, named and
repaired in one place.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fpn_det.annotations.findings import Finding
from fpn_det.annotations.parsing import parse_id

Record = dict[str, Any]

SPLIT_ALIASES = {"train": ("training",), "val": ("valid", "validation"), "test": ("testing",)}


@dataclass
class RawDataset:
    """Images, objects and classes with the values of the files.

    A record of an object may have `where` (file and line), if its format has no annotation ids, and `ignore` 1, if it is
    flagged as difficult or ignored.
    """

    source: Path  # file or folder it was read from, for messages
    folder: Path | None  # folder that file names start from; None = image files are not looked for
    images: list[Record]  # id, file_name, height, width
    annotations: list[Record]  # id, image_id, category_id, bbox as x, y, w, h, area, iscrowd
    categories: list[Record]  # id, name
    image_list: str | None = None  # file or entry that lists the images; None = all images of a folder
    lists_classes: bool = True  # else the classes are those that occur
    is_labeled: bool = True  # False for lists of images without annotations
    findings: list[Finding] = field(default_factory=list)  # faults of what could not become a record

    def add_image(self, file_name: str, size: tuple[int, int] | None) -> Record:
        """Append an image of (h, w) `size` and return its record."""
        height, width = size or (None, None)
        image = {"id": len(self.images) + 1, "file_name": file_name, "height": height, "width": width}
        self.images.append(image)
        return image

    def add_box(
        self,
        image: Record,
        category_id: int | None,
        corners: list[float],
        where: str,
        pixel_offset: int = 0,
        ignore: bool = False,
    ) -> None:
        """Append an object that its format describes by corners x1, y1, x2, y2.

        Args:
            image: its record.
            category_id: None for a class without name.
            corners: NaN for values that are no numbers; exchanged corners are put in order.
            where: file and line.
            pixel_offset: number of the first pixel. Equal corners are a slip of the mouse, not an object 1 px wide.
            ignore: flagged as difficult.
        """
        x1, y1, x2, y2 = corners
        if x1 > x2 or y1 > y2:
            message = f"expected x1 <= x2 and y1 <= y2, got {x1:g}, {y1:g}, {x2:g}, {y2:g}; exchanged"
            self.findings.append(
                Finding("box_corners_exchanged", message, "error", image["id"], image["file_name"], where=where)
            )
            x1, x2, y1, y2 = min(x1, x2), max(x1, x2), min(y1, y2), max(y1, y2)
        if x1 < x2 and y1 < y2:
            x1, y1 = x1 - pixel_offset, y1 - pixel_offset
        self.annotations.append(
            {
                "id": len(self.annotations) + 1,
                "image_id": image["id"],
                "category_id": category_id,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": max(x2 - x1, 0.0) * max(y2 - y1, 0.0),
                "iscrowd": 0,
                "ignore": int(ignore),
                "where": where,
            }
        )

    @property
    def class_names(self) -> list[str]:
        """Names of the categories with an integer id, by id."""
        numbered = [(parse_id(record.get("id")), str(record.get("name"))) for record in self.categories]
        return list(dict.fromkeys(name for number, name in sorted(p for p in numbered if isinstance(p[0], int))))


def split_aliases(split: str) -> tuple[str, ...]:
    """Names that the files or folder of a split may have."""
    return (split, *SPLIT_ALIASES.get(split, ()))
