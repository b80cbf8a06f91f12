"""Comparison of an exported file with its detector on the same batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fpn_det.export.exported import ExportedDetector
from fpn_det.models.detector import Detector
from fpn_det.structures import Batch

BOX_TOLERANCE, SCORE_TOLERANCE = 0.05, 1e-4  # px of the picture file, and of a score in [0, 1]
NUM_IMAGES = 8


@dataclass(frozen=True)
class Difference:
    """The largest differences over some images."""

    images: int
    empty: int  # images on which torch has no detection
    detections: int
    box: float  # px of the original frame
    score: float
    unmatched: tuple[str, ...] = ()  # detections that only one side has

    @property
    def is_within_tolerance(self) -> bool:
        return not self.unmatched and self.box <= BOX_TOLERANCE and self.score <= SCORE_TOLERANCE


def cases(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches of the proof: images one by one, a part of the first, one without objects, and three of mixed sizes."""
    singles = list(batches)
    yield from singles
    first = singles[0]
    half = torch.stack([(first.sizes[:, 0] * 3 + 3) // 4, (first.sizes[:, 1] + 1) // 2], dim=1)
    part = replace(first, sizes=half, original_sizes=first.original_sizes * half // first.sizes)  # at the same scale
    yield replace(part, pixels=first.pixels[:, :, : int(half[0, 0]), : int(half[0, 1])])
    yield replace(first, pixels=_ramp(first.pixels))
    three = [first, part, singles[-1]]
    height, width = (max(batch.pixels.shape[side] for batch in three) for side in (2, 3))
    padded = [F.pad(b.pixels, (0, width - b.pixels.shape[3], 0, height - b.pixels.shape[2])) for b in three]
    sizes = torch.cat([batch.sizes for batch in three])
    originals = torch.cat([batch.original_sizes for batch in three])
    indices = torch.cat([batch.indices for batch in three])
    yield replace(first, pixels=torch.cat(padded), sizes=sizes, original_sizes=originals, indices=indices)


def _ramp(pixels: Tensor) -> Tensor:
    """Pixels that become brighter towards the lower right, more and more. In an image of one color all cells would have the same score,
    and rounding would decide between them.
    """
    height, width = pixels.shape[2:]
    down, right = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
    low, high = (-0.5, 0.5) if pixels.is_floating_point() else (0, 255)  # float images are normalized
    values = low + (high - low) * (2 * (down + down.square()) + right + right.square()) / 6
    return values.to(pixels.dtype).expand(pixels.shape).contiguous()


def compare(detector: Detector, exported: ExportedDetector, batches: Iterable[Batch]) -> Difference:
    """Detect with both on the batches, and match the detections of each label by box, in the original frame."""
    images, empty, number, box, score, unmatched = 0, 0, 0, 0.0, 0.0, []
    for batch in batches:
        theirs = exported.detect(batch).to_original(batch)
        ours = detector.detect(_on_canvas(batch, exported, detector.stride)).to_original(batch)
        for row, (mine, other) in enumerate(zip(ours.images(), theirs.images(), strict=True)):
            images, empty, number = images + 1, empty + (not len(mine[1])), number + len(mine[1])
            boxes, scores, left = _match(mine, other, detector)
            box, score = max(box, boxes), max(score, scores)
            unmatched += [f"image {batch.indices[row]}: {text}" for text in left]
    return Difference(images, empty, number, box, score, tuple(unmatched))


def _on_canvas(batch: Batch, exported: ExportedDetector, stride: int) -> Batch:
    """Pad and crop as the file does: near the border of an image, detections depend on the size of its canvas."""
    height, width = batch.pixels.shape[2:]
    canvas_height, canvas_width = exported.file.canvas(height, width)
    bottom, right = (side + -side % stride for side in (canvas_height, canvas_width))
    return replace(batch, pixels=F.pad(batch.pixels, (0, right - width, 0, bottom - height)))


Found = tuple[Tensor, Tensor, Tensor]  # boxes, scores, labels of an image


def _match(ours: Found, theirs: Found, detector: Detector) -> tuple[float, float, list[str]]:
    """Largest differences of boxes and scores, and what one side lacks.

    A detection within the tolerance of the lowest score that is kept may be missing: the threshold, or the last of a
    full list.
    """
    box, score, free = 0.0, 0.0, set(range(len(theirs[1])))
    unmatched = []
    for index in range(len(ours[1])):
        same = [other for other in free if theirs[2][other] == ours[2][index]]
        gaps = [float((theirs[0][other] - ours[0][index]).abs().max()) for other in same]
        # of several boxes that fit, the one of the nearest score
        fits = [
            (abs(float(theirs[1][other] - ours[1][index])), gap, other)
            for other, gap in zip(same, gaps, strict=True)
            if gap <= max(10 * BOX_TOLERANCE, min(gaps))
        ]
        if not fits or min(fits)[1] > 4.0:
            unmatched.append(("torch", ours, index))
            continue
        distance, gap, other = min(fits)
        free.remove(other)
        box, score = max(box, gap), max(score, distance)
    unmatched += [("the file", theirs, other) for other in free]
    lowest = [float(side[1][-1]) for side in (ours, theirs) if len(side[1]) == detector.max_detections]
    threshold = detector.roi_head.test_filter.score_threshold if detector.roi_head else 0.0
    limits = [threshold, *lowest]
    texts = [
        f"only {side} has label {int(found[2][index])} at {[round(x, 2) for x in found[0][index].tolist()]} "
        f"with score {float(found[1][index]):.5f}"
        for side, found, index in unmatched
        if min(abs(float(found[1][index]) - limit) for limit in limits) > SCORE_TOLERANCE
    ]
    return box, score, texts
