"""A data set as its files state it, in any format: COCO's three tables with unchecked values.

The readers in `formats/` make a `RawDataset`; `reading.check_raw` checks it, so each kind of fault is found, named and
repaired in one place. T is the number of objects.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from fpn_det.annotations.findings import Finding
from fpn_det.annotations.parsing import MAX_NUMBER, parse_id, parse_number

Record = dict[str, Any]

RECORDS_PER_PART = 1 << 15  # of `RawObjects`

SPLIT_ALIASES = {"train": ("training",), "val": ("valid", "validation"), "test": ("testing",)}


class RawImage(msgspec.Struct, gc=False):
    """One image with the values of its file; None for those that it lacks."""

    id: Any = None
    file_name: Any = None
    height: Any = None
    width: Any = None
    coco_url: Any = None


class RawObject(msgspec.Struct, gc=False):
    """One object with the values of its file; None for those that it lacks."""

    id: Any = None
    image_id: Any = None
    category_id: Any = None
    bbox: Any = None  # x, y, w, h
    area: Any = None
    iscrowd: Any = None
    ignore: Any = None  # 1 if it is flagged as difficult or ignored
    where: str | None = msgspec.field(default=None, name="")  # file and line; no key of a JSON file


# The values of a field in consecutive records: None if all are None, an array if all are plain numbers (i64 for ids, else
# f64; [t, 4] for boxes), otherwise a list of the values of the file.
Column = np.ndarray | list | None


class RawObjects:
    """Records of objects, kept as columns, because a record takes several times the memory of its numbers."""

    def __init__(self, records: Iterable[RawObject] = ()) -> None:
        self._pending: list[RawObject] = []
        self._parts: list[dict[str, Column]] = []
        self._stops: list[int] = []  # number of records up to the end of each part
        self.extend(records)

    def __len__(self) -> int:
        return (self._stops[-1] if self._stops else 0) + len(self._pending)

    def extend(self, records: Iterable[RawObject]) -> None:
        self._pending.extend(records)
        if len(self._pending) >= RECORDS_PER_PART:
            self._finish_part()

    def value(self, key: str, index: int) -> Any:
        """The value of a field in one record, as the file states it; 7.0 may be 7."""
        self._finish_part()
        part = int(np.searchsorted(self._stops, index, side="right"))
        column = self._parts[part][key]
        value = None if column is None else column[index - self._stops[part]]  # from the end
        return _shortest(value.tolist()) if isinstance(value, np.ndarray | np.generic) else value

    def numbers(self, key: str) -> np.ndarray:
        """The numbers of a field by `parse_number`, f64 [T]."""
        return self._convert(key, lambda array: _bounded(array.astype(np.float64)), parse_number, np.float64)

    def boxes(self) -> np.ndarray:
        """The four numbers of each box by `parse_number`, f64 [T, 4]; NaN for what is no list of four."""
        return self._convert("bbox", _bounded, lambda box: list(map(parse_number, _four_values(box))), np.float64, (4,))

    def integers(self, key: str) -> np.ndarray:
        """The integers of a field of ids by `parse_id`, i64 [T]; 0 for anything else."""

        def parse(value: Any) -> int:
            number = parse_id(value)
            return number if isinstance(number, int) else 0

        return self._convert(key, lambda array: array, parse, np.int64)

    def look_up(self, key: str, table: Mapping[int | str | None, int], default: int) -> np.ndarray:
        """Values of `table` for the id in a field of each record, i64 [T]."""

        def look_up(value: Any) -> int:
            return table.get(parse_id(value), default)

        pairs = [(number, value) for number, value in table.items() if isinstance(number, int)]
        known, values = np.array(sorted(pairs), np.int64).reshape(-1, 2).T

        def look_up_all(array: np.ndarray) -> np.ndarray:
            if not len(known):
                return np.full(len(array), default)
            place = np.minimum(np.searchsorted(known, array), len(known) - 1)
            return np.where(known[place] == array, values[place], default)

        return self._convert(key, look_up_all, look_up, np.int64)

    def is_text(self, key: str) -> np.ndarray:
        """True where the value, or one of the numbers of a box, is a string, bool [T]."""

        def is_text(value: Any) -> bool:
            return any(isinstance(item, str) for item in (_four_values(value) if key == "bbox" else (value,)))

        return self._convert(key, lambda array: np.zeros(len(array), bool), is_text, bool)

    def _convert(
        self,
        key: str,
        convert: Callable[[np.ndarray], np.ndarray],
        parse: Callable[[Any], Any],
        dtype: type,
        shape: tuple[int, ...] = (),
    ) -> np.ndarray:
        """Join the parts of a column, of which arrays are converted at once and other values are parsed one by one."""
        self._finish_part()
        joined: np.ndarray = np.empty((len(self), *shape), dtype)
        start = 0
        for stop, columns in zip(self._stops, self._parts, strict=True):
            column = columns[key]
            if column is None:
                joined[start:stop] = parse(None)
            elif isinstance(column, list):
                joined[start:stop] = [parse(value) for value in column]
            else:
                joined[start:stop] = convert(column)
            start = stop
        return joined

    def _finish_part(self) -> None:
        if self._pending:
            self._parts.append({key: _column(key, list(map(attrgetter(key), self._pending))) for key in FIELDS})
            self._stops.append(len(self))
            self._pending = []


FIELDS = RawObject.__struct_fields__
IDS = ("id", "image_id", "category_id")


def _column(key: str, values: list) -> Column:
    types = set(map(type, values))
    if types == {type(None)}:
        return None
    if key == "bbox":
        numbers = list(itertools.chain.from_iterable(values)) if types == {list} else []
        is_plain = types == {list} and set(map(len, values)) == {4} and set(map(type, numbers)) <= {int, float}
    else:
        numbers, is_plain = values, types == {int} or (key not in IDS and types <= {int, float})
    if not is_plain:
        return values
    try:
        array = np.array(numbers, np.int64 if key in IDS else np.float64)
    except OverflowError:
        return values
    return array.reshape(-1, 4) if key == "bbox" else array


def _bounded(numbers: np.ndarray) -> np.ndarray:
    """NaN in place of numbers that `parse_number` does not accept."""
    return np.where(np.abs(numbers) < MAX_NUMBER, numbers, math.nan)


def _four_values(box: Any) -> list:
    """The four values of a box; NaN for anything else."""
    return box if isinstance(box, list) and len(box) == 4 else [math.nan] * 4


def _shortest(value: Any) -> Any:
    """7 for 7.0, also in a list."""
    if isinstance(value, list):
        return [_shortest(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@dataclass
class RawDataset:
    """Images, objects and classes with the values of the files."""

    source: Path  # file or folder it was read from, for messages
    folder: Path | None  # folder that file names start from; None = image files are not looked for
    images: list[RawImage] = field(default_factory=list)
    objects: RawObjects = field(default_factory=RawObjects)
    categories: list[Record] = field(default_factory=list)  # id, name
    image_list: str | None = None  # file or entry that lists the images; None = all images of a folder
    lists_classes: bool = True  # else the classes are those that occur
    is_labeled: bool = True  # False for lists of images without annotations
    findings: list[Finding] = field(default_factory=list)  # faults of what could not become a record

    def add_image(self, file_name: str, size: tuple[int, int] | None) -> RawImage:
        """Append an image of (h, w) `size` and return its record."""
        image = RawImage(len(self.images) + 1, file_name, *(size or (None, None)))
        self.images.append(image)
        return image

    def add_box(
        self,
        image: RawImage,
        category_id: int | float | None,
        corners: list[float],
        where: str,
        pixel_offset: int = 0,
        ignore: bool = False,
        stated: Sequence[str] = (),
    ) -> None:
        """Append an object that its format describes by corners x1, y1, x2, y2.

        Args:
            image: its record.
            category_id: None for a class without name, whose object is left out.
            corners: NaN for values that are no numbers; exchanged corners are put in order.
            where: file and line.
            pixel_offset: number of the first pixel. Equal corners are a slip of the mouse, not an object 1 px wide.
            ignore: flagged as difficult.
            stated: the corners as the file has them, to be shown if they are no numbers.
        """
        if category_id is None:
            message = "expected the name of a class, got none; left out"
            self.findings.append(Finding("class_unknown", message, "error", image.id, image.file_name, where=where))
            return
        x1, y1, x2, y2 = corners
        if x1 > x2 or y1 > y2:
            message = f"expected x1 <= x2 and y1 <= y2, got {x1:g}, {y1:g}, {x2:g}, {y2:g}; exchanged"
            self.findings.append(
                Finding("box_corners_exchanged", message, "error", image.id, image.file_name, where=where)
            )
            x1, x2, y1, y2 = min(x1, x2), max(x1, x2), min(y1, y2), max(y1, y2)
        if x1 < x2 and y1 < y2:
            x1, y1 = x1 - pixel_offset, y1 - pixel_offset
        box: list[Any] = [x1, y1, x2 - x1, y2 - y1]
        area = max(x2 - x1, 0.0) * max(y2 - y1, 0.0)
        if not all(map(math.isfinite, corners)) and stated:
            box = list(stated)
        record = RawObject(len(self.objects) + 1, image.id, category_id, box, area, 0, int(ignore), where)
        self.objects.extend([record])

    @property
    def class_names(self) -> list[str]:
        """Names of the categories with an integer id, by id."""
        numbered = [(parse_id(record.get("id")), str(record.get("name"))) for record in self.categories]
        return list(dict.fromkeys(name for number, name in sorted(p for p in numbered if isinstance(p[0], int))))


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Pause the search for cycles, which takes a long time among many records and finds none: they are trees."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def split_aliases(split: str) -> tuple[str, ...]:
    """Names that the files or folder of a split may have."""
    return (split, *SPLIT_ALIASES.get(split, ()))
