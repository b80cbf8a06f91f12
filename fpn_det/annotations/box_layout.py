"""Boxes whose numbers have another meaning than their format says: corners for sizes, fractions for px, another frame."""

from __future__ import annotations

from typing import Literal

import numpy as np

from fpn_det.annotations.check_images import ImageTable
from fpn_det.annotations.findings import Finding

Layout = Literal["xywh", "xyxy", "fractions"]

MARGIN = 1.0  # px by which rounding may move a box over the border
MIN_BOXES = 3  # fewer boxes say nothing about the layout of a file
MAX_ASPECT_CHANGE = 0.02  # of an image that was scaled


def detect_layout(numbers: np.ndarray, sizes: np.ndarray) -> Layout:
    """Determine what the four numbers of a file's boxes are.

    They are corners if 99 % make boxes inside their images as corners and a fifth does not as x, y, width, height. They
    are fractions of the sides if none is larger than 1.

    Args:
        numbers: f64 [T, 4], as in the file.
        sizes: i64 [T, 2], (h, w) of the images.
    """
    usable = np.isfinite(numbers).all(axis=1)
    numbers, limits = numbers[usable], sizes[usable][:, ::-1]
    if len(numbers) < MIN_BOXES:
        return "xywh"
    if (numbers <= 1).all() and (numbers >= 0).all() and (limits > 1).all():
        return "fractions"
    inside = (numbers[:, 2:] > numbers[:, :2]) & (numbers[:, 2:] <= limits + MARGIN)
    exceeds = (numbers[:, :2] + numbers[:, 2:] > limits + MARGIN).any(axis=1)
    return "xyxy" if inside.all(axis=1).mean() > 0.99 and exceeds.mean() >= 0.2 else "xywh"


def to_corners(numbers: np.ndarray, layout: Layout) -> np.ndarray:
    """Convert the numbers of a file to corners [T, 4]."""
    return numbers if layout == "xyxy" else np.concatenate([numbers[:, :2], numbers[:, :2] + numbers[:, 2:]], axis=1)


def to_file_frame(boxes: np.ndarray, rows: np.ndarray, images: ImageTable) -> tuple[np.ndarray, list[Finding]]:
    """Move boxes that were drawn in the frame of the stated size to the frame of the file.

    This needs evidence: among the images whose size differs in the same way, one box exceeds the file's frame and lies
    inside the stated one. Two ways are known: the file is turned by EXIF, or scaled. All other boxes stay.

    Args:
        boxes: f64 [T, 4], corners.
        rows: i64 [T], image row of each box; -1 for none.
        images: sizes of files and records.

    Returns:
        Boxes in the frame of the file, and a warning for each way in which some were moved.
    """
    sizes, stated = np.array(images.sizes).reshape(-1, 2), np.array(images.stated_sizes).reshape(-1, 2)
    differs = (sizes != stated).any(axis=1)
    if not differs.any():
        return boxes, []
    turned = differs & (np.array(images.orientations) >= 5) & (sizes == stated[:, ::-1]).all(axis=1)
    ratio = sizes / stated
    scaled = differs & ~turned & (np.abs(ratio[:, 0] / ratio[:, 1] - 1) < MAX_ASPECT_CHANGE)
    boxes, findings = boxes.copy(), []
    for change, affected in (("turned", turned), ("scaled", scaled)):
        own = np.flatnonzero((rows >= 0) & affected[rows])
        evidence = own[_exceeds(boxes[own], sizes[rows[own]]) & ~_exceeds(boxes[own], stated[rows[own]])]
        if not len(evidence):
            continue
        for index in own.tolist():
            row = rows[index]
            if change == "turned":
                boxes[index] = _turn(boxes[index], stated[row], images.orientations[row])
            else:
                boxes[index] *= np.tile(ratio[row][::-1], 2)
        first = rows[evidence[0]]
        message = (
            f"expected boxes in the frame of the file, got boxes of the image before it was {change}: one exceeds the file "
            f"and lies inside the stated size. The boxes of all {affected.sum()} such images are {change} too"
        )
        findings.append(
            Finding("boxes_of_other_frame", message, "warning", images.image_ids[first], images.file_names[first])
        )
    return boxes, findings


def _exceeds(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    return np.any(boxes[:, 2:] > sizes[:, ::-1] + MARGIN, axis=1)


def _turn(box: np.ndarray, size: np.ndarray, orientation: int) -> np.ndarray:
    """Move a box from the stored image of (h, w) `size` to the upright one, for orientations that exchange the sides."""
    (x1, y1, x2, y2), (height, width) = box, size
    across = (height - y2, height - y1) if orientation in (6, 7) else (y1, y2)
    down = (width - x2, width - x1) if orientation in (7, 8) else (x1, x2)
    return np.array([across[0], down[0], across[1], down[1]])
