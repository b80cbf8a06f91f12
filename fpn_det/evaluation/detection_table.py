"""Detections of many images as flat arrays, and the COCO results format."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import msgspec
import numpy as np
from numpy.typing import NDArray

from fpn_det.structures import Annotations


class Result(TypedDict):
    """One detection of a COCO results file."""

    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]  # x, y, width, height
    score: float


RESULT_KEYS = tuple(Result.__annotations__)


@dataclass(frozen=True)
class DetectionTable:
    """Detections of many images as flat arrays, in the original frame; those of one image by descending score."""

    images: NDArray[np.int64]  # [D], rows of Annotations
    boxes: NDArray[np.floating]  # [D, 4], xyxy
    scores: NDArray[np.floating]  # [D]
    labels: NDArray[np.int64]  # [D]
    anchor_levels: NDArray[np.int64] | None = None  # [D], see `structures.Candidates`; None if they are unknown

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: NDArray) -> DetectionTable:
        """Select rows, in the given order."""
        levels = None if self.anchor_levels is None else self.anchor_levels[rows]
        return DetectionTable(self.images[rows], self.boxes[rows], self.scores[rows], self.labels[rows], levels)

    @classmethod
    def join(cls, tables: Sequence[DetectionTable]) -> DetectionTable:
        """Concatenate tables and sort by image, so that the result does not depend on how images were split over ranks."""
        empty = cls(np.zeros(0, np.int64), np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
        tables = [table for table in tables if len(table)] or [empty]
        levels = [table.anchor_levels for table in tables if table.anchor_levels is not None]
        joined = cls(
            np.concatenate([table.images for table in tables]),
            np.concatenate([table.boxes for table in tables]),
            np.concatenate([table.scores for table in tables]),
            np.concatenate([table.labels for table in tables]),
            np.concatenate(levels) if len(levels) == len(tables) else None,
        )
        return joined.take(np.argsort(joined.images, kind="stable"))

    @classmethod
    def from_results(cls, file: Path, annotations: Annotations) -> DetectionTable:
        """Read a file in the COCO results format: a list of {image_id, category_id, bbox (xywh), score}.

        Raises:
            ValueError: the file has another format, or an image or a category is not in `annotations`.
        """
        rows = _read_results(file)
        image_of = {image_id: row for row, image_id in enumerate(annotations.image_ids.tolist())}
        label_of = {category_id: label for label, category_id in enumerate(annotations.category_ids)}
        image_ids = [row["image_id"] for row in rows]
        unknown = [image_id for image_id in image_ids if image_id not in image_of]
        if rows and len(unknown) == len(rows):
            known = ", ".join(map(str, list(image_of)[:3]))
            raise ValueError(
                f"{file}: none of its image ids is in the annotations: it has {unknown[0]}, ..., they have {known}, ... "
                f"Use the annotations that the detections were made for."
            )
        category_ids = [row["category_id"] for row in rows]
        if unknown or not label_of.keys() >= set(category_ids):
            for row in rows:
                if row["image_id"] in image_of and row["category_id"] in label_of:
                    continue
                what = f"image {row['image_id']}, category {row['category_id']}"
                raise ValueError(
                    f"{file}: {what} is not in the annotations. Use the annotations that the detections were made for."
                )
        xywh = np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4)
        table = cls(
            np.array([image_of[image_id] for image_id in image_ids], np.int64),
            np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1),
            np.array([row["score"] for row in rows], np.float64),
            np.array([label_of[category_id] for category_id in category_ids], np.int64),
        )
        return cls.join([table])

    def results(self, annotations: Annotations) -> Iterator[dict[str, Any]]:
        """Yield the rows of a COCO results file: ids of the data set, boxes xywh. Nothing is rounded, so metrics are equal."""
        columns = (
            annotations.image_ids.numpy()[self.images].tolist(),
            np.array(annotations.category_ids, np.int64)[self.labels].tolist(),
            xyxy_to_xywh(self.boxes).tolist(),
            self.scores.astype(np.float64).tolist(),
        )
        for image_id, category_id, box, score in zip(*columns, strict=True):
            yield {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}


def xyxy_to_xywh(boxes: NDArray) -> NDArray[np.float64]:
    """Convert boxes [n, 4] to float64 (x, y, width, height)."""
    boxes = boxes.astype(np.float64)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def _read_results(file: Path) -> list[Result]:
    """Parse a results file and validate the types of its rows."""
    content = file.read_bytes()
    with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return msgspec.json.decode(content, type=list[Result])
    # Python's parser accepts more, and a message states what a row has.
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: expected COCO results in JSON, got a file that cannot be parsed: {error}.") from None
    if not isinstance(rows, list):
        got = f"a dict with {', '.join(map(repr, list(rows)[:4]))}" if isinstance(rows, dict) else type(rows).__name__
        raise ValueError(
            f"{file}: expected a list of detections (COCO results format), got {got}. "
            "Pass the file of detections, not the annotations."
        )
    problems = ((number, problem) for number, row in enumerate(rows) if (problem := _problem_of(row)))
    number, problem = next(problems, (0, ""))
    if not problem:
        return rows
    raise ValueError(
        f"{file}: detection {number}: expected image_id, category_id, bbox [x, y, width, height] and score, "
        f"got {problem}. Write the file again in COCO's results format."
    )


def _problem_of(row: Any) -> str:
    """Describe what is wrong with a row of a results file; empty if nothing is."""
    if not isinstance(row, dict):
        return f"a {type(row).__name__}"
    missing = [key for key in RESULT_KEYS if key not in row]
    if missing:
        return f"no {' and no '.join(missing)}"
    for key in ("image_id", "category_id"):
        if type(row[key]) is not int:
            return f"{key} {row[key]!r:.80}"
    box = row["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(_is_finite_number(side) for side in box):
        return f"bbox {box!r:.80}"
    return "" if _is_finite_number(row["score"]) else f"score {row['score']!r:.80}"


def _is_finite_number(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # an integer that does not fit into a float
        return False
