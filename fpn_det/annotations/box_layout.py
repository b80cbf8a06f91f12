"""Boxes that were written in another layout or drawn in another frame than their file says: proof, and the way back."""

from __future__ import annotations

from typing import Literal

import numpy as np

from fpn_det.annotations.check_images import ImageTable
from fpn_det.annotations.findings import Finding

Layout = Literal["xywh", "xyxy", "fractions"]

MARGIN = 1.0  # px that a box may pass a border for having been rounded
ENOUGH = 3  # boxes from which a whole file can be judged


def detect_layout(numbers: np.ndarray, sizes: np.ndarray) -> Layout:
    """How the four numbers of a file's boxes are meant.

    They are corners if all make boxes within their images as corners, but a fifth does not as x, y, width, height;
    fractions of the sides if none is larger than 1.

    Args:
        numbers: [T, 4], as they are in the file.
        sizes: [T, 2], (h, w) of their images.
    """
    usable = np.isfinite(numbers).all(axis=1)
    numbers, limits = numbers[usable], sizes[usable][:, ::-1]
    if len(numbers) < ENOUGH:
        return "xywh"
    if (numbers <= 1).all() and (numbers >= 0).all() and (limits > 1).all():
        return "fractions"
    within = (numbers[:, 2:] > numbers[:, :2]) & (numbers[:, 2:] <= limits + MARGIN)
    leaves = (numbers[:, :2] + numbers[:, 2:] > limits + MARGIN).any(axis=1)
    return "xyxy" if within.all(axis=1).mean() > 0.99 and leaves.mean() >= 0.2 else "xywh"


def corners(numbers: np.ndarray, layout: Layout) -> np.ndarray:
    """Corners [T, 4] from the numbers of a file."""
    return numbers if layout == "xyxy" else np.concatenate([numbers[:, :2], numbers[:, :2] + numbers[:, 2:]], axis=1)


def to_file_frame(boxes: np.ndarray, rows: np.ndarray, pictures: ImageTable) -> tuple[np.ndarray, list[Finding]]:
    """Boxes [T, 4] in the frames of their files, where they were drawn in the frames that the records state.

    That has to be shown: among the images whose size differs in the same way, a box leaves the file's frame and lies in
    the stated one. Two ways are known: the picture was turned by EXIF, or scaled. Else the boxes stay as they are.
    """
    sizes, stated = np.array(pictures.sizes).reshape(-1, 2), np.array(pictures.stated_sizes).reshape(-1, 2)
    differs = (sizes != stated).any(axis=1)
    if not differs.any():
        return boxes, []
    turned = differs & (np.array(pictures.orientations) >= 5) & (sizes == stated[:, ::-1]).all(axis=1)
    ratio = sizes / stated
    scaled = differs & ~turned & (np.abs(ratio[:, 0] / ratio[:, 1] - 1) < 0.02)
    boxes, findings = boxes.copy(), []
    for kind, images in (("turned", turned), ("scaled", scaled)):
        own = np.flatnonzero((rows >= 0) & images[rows])
        proof = own[_leaves(boxes[own], sizes[rows[own]]) & ~_leaves(boxes[own], stated[rows[own]])]
        if not len(proof):
            continue
        for index in own.tolist():
            row = rows[index]
            if kind == "turned":
                boxes[index] = _turn(boxes[index], stated[row], pictures.orientations[row])
            else:
                boxes[index] *= np.tile(ratio[row][::-1], 2)
        first = rows[proof[0]]
        message = (
            f"expected boxes in the frame of the file, got some that were drawn before it was {kind}: one leaves the picture "
            f"that would lie in the stated size. The boxes of all {images.sum()} such images are {kind} too"
        )
        findings.append(
            Finding("boxes_of_other_frame", message, "warning", pictures.image_ids[first], pictures.file_names[first])
        )
    return boxes, findings


def _leaves(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    return np.any(boxes[:, 2:] > sizes[:, ::-1] + MARGIN, axis=1)


def _turn(box: np.ndarray, size: np.ndarray, orientation: int) -> np.ndarray:
    """A box of the stored picture of (h, w) `size` in the picture as it is shown, for the orientations that exchange the sides."""
    (x1, y1, x2, y2), (height, width) = box, size
    across = (height - y2, height - y1) if orientation in (6, 7) else (y1, y2)
    down = (width - x2, width - x1) if orientation in (7, 8) else (x1, x2)
    return np.array([across[0], down[0], across[1], down[1]])
