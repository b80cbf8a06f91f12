"""What a detector makes of one image, level by level: features, objectness, matched anchors, proposals, RoIs.

One column per level, fine to coarse, in colors of their own; the image with its objects is at the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from fpn_det.evaluation.evaluate import evaluation_mode
from fpn_det.models.detector import Detector
from fpn_det.models.rpn import RPNOutput
from fpn_det.structures import Batch
from fpn_det.visualization.panels import Picture, arrange, as_picture, class_color, scaled_to

SIDE = 240  # px of the longer side of every picture
NUM_BOXES = 20  # best proposals that are shown, over all levels
LEVEL_COLORS = (
    (86, 180, 233),
    (0, 200, 140),
    (240, 228, 66),
    (230, 159, 0),
    (235, 90, 60),
    (204, 121, 200),
    (200, 200, 200),
)


@dataclass(frozen=True)
class Levels:
    """Of one image, everything by level. Boxes [n, 4] are in the input frame."""

    names: list[str]  # P2, ...
    strides: tuple[int, ...]
    features: list[NDArray[np.float32]]  # [h, w], for each pixel the length of its cell's feature vector
    objectness: list[NDArray[np.float32]]  # [h, w] in [0, 1], for each pixel that of its cell's best anchor
    matched: list[NDArray[np.float32]]  # anchors that stand for an object in training
    proposed: list[NDArray[np.float32]]  # of the best proposals, those from anchors of this level
    pooled: list[NDArray[np.float32]] | None  # of the same, those that the second stage pools from this level


@torch.no_grad()
def read_levels(model: Detector, batch: Batch) -> Levels:
    """Look into a detector at work on the one image of a batch, which is on its device."""
    assert len(batch) == 1, "one image at a time"
    if model.rpn is None:
        raise ValueError("levels: expected a model with an RPN, got one without: there are no anchors to show.")
    with evaluation_mode(model):
        pyramid = model.pyramid(batch)
        output = model.rpn(pyramid)
        match = model.rpn.matcher(batch.targets, output.anchors, output.inside)
        parts = _by_level(output)
        found = [model.rpn.propose(part, batch, model.rpn.test_filter) for part in parts]
        best = torch.cat([each.logits.masked_fill(~each.valid, -torch.inf)[0] for each in found])
        worst = best.topk(min(NUM_BOXES, len(best))).values[-1]
        proposed = [each.boxes[0][each.valid[0] & (each.logits[0] >= worst)] for each in found]
        per_cell = model.rpn.anchors.num_per_cell
        objectness = [
            part.logits.view(*shape, per_cell).amax(dim=2).sigmoid()
            for part, shape in zip(parts, pyramid.shapes, strict=True)
        ]
        positive = match.positive[0].split(output.level_sizes)
        pooled = None
        if model.roi_head is not None:
            boxes = torch.cat(proposed)
            levels = model.roi_head.pooler.assigner(boxes)
            pooled = [_numpy(boxes[levels == level]) for level in range(len(proposed))]
    size = batch.sizes[0].tolist()
    return Levels(
        names=[f"P{stride.bit_length() - 1}" for stride in pyramid.strides],
        strides=pyramid.strides,
        features=[
            _by_pixel(level[0].norm(dim=0), stride, size)
            for level, stride in zip(pyramid.levels, pyramid.strides, strict=True)
        ],
        objectness=[_by_pixel(level, stride, size) for level, stride in zip(objectness, pyramid.strides, strict=True)],
        matched=[_numpy(part.anchors[mask]) for part, mask in zip(parts, positive, strict=True)],
        proposed=[_numpy(boxes) for boxes in proposed],
        pooled=pooled,
    )


def _by_level(output: RPNOutput) -> list[RPNOutput]:
    """The head's answer as if each level were alone."""
    tensors = (output.logits, output.deltas, output.anchors[None], output.inside)
    split = zip(*(tensor.split(output.level_sizes, dim=1) for tensor in tensors), strict=True)
    return [
        replace(output, logits=logits, deltas=deltas, anchors=anchors[0], inside=inside, level_sizes=[logits.shape[1]])
        for logits, deltas, anchors, inside in split
    ]


def draw_levels(levels: Levels, batch: Batch, side: int = SIDE) -> Picture:
    """All of it on one sheet: a row for each kind, a column for each level, and at the left all levels together."""
    height, width = batch.sizes[0].tolist()
    image = scaled_to(as_picture(batch.pixels[0].cpu())[:height, :width], side)
    zoom = side / max(height, width)
    valid = batch.targets.valid[0]
    truth, labels = _numpy(batch.targets.boxes[0][valid]), batch.targets.labels[0][valid].tolist()

    pictures = [
        frame(image, truth * zoom, np.array([class_color(label) for label in labels]).reshape(-1, 3), brightness=1)
    ]
    titles = [f"{len(labels)} objects"]
    pictures += [heat(each, image) for each in levels.features]
    titles += [f"{name}: stride {stride}" for name, stride in zip(levels.names, levels.strides, strict=True)]

    over_all = np.max(levels.objectness, axis=0)
    pictures += [heat(each, image, 1.0) for each in (over_all, *levels.objectness)]
    titles += ["objectness", *(f"up to {each.max():.2f}" for each in levels.objectness)]

    kinds = {"matched anchors": levels.matched, "best proposals": levels.proposed, "RoIs": levels.pooled}
    for title, per_level in kinds.items():
        if per_level is None:
            continue
        boxes = np.concatenate(per_level) * zoom
        colors = np.repeat(LEVEL_COLORS[: len(per_level)], [len(each) for each in per_level], axis=0)
        starts = np.cumsum([len(each) for each in per_level])[:-1]
        pictures.append(frame(image, boxes, colors))
        pictures += [
            frame(image, *part) for part in zip(np.split(boxes, starts), np.split(colors, starts), strict=True)
        ]
        titles += [f"{sum(map(len, per_level))} {title}", *(str(len(each)) for each in per_level)]
    return arrange(pictures, titles, columns=1 + len(levels.names))


def heat(values: NDArray[np.float32], under: Picture, top: float | None = None) -> Picture:
    """A map [h, w] of numbers as colors, on a picture that shines through; cells stay visible as squares.

    Black is 0 and white is `top`; without it, they are the smallest and the largest value.
    """
    low, high = (values.min(), values.max()) if top is None else (0.0, top)
    values = cv2.resize(values, under.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    shades = np.clip((values - low) / max(high - low, 1e-6), 0, 1) * 255
    colors = cv2.applyColorMap(shades.astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]  # from BGR
    gray = np.repeat(under.mean(axis=2, keepdims=True), 3, axis=2)
    return (0.8 * colors + 0.2 * gray).astype(np.uint8)


def frame(picture: Picture, boxes: NDArray, colors: NDArray, brightness: float = 0.45) -> Picture:
    """Frames of boxes [n, 4] (px of the picture), each in its color [n, 3], on a picture that is dimmed so that they stand out."""
    canvas = Image.fromarray((picture * brightness).astype(np.uint8))
    drawing = ImageDraw.Draw(canvas)
    for (x1, y1, x2, y2), color in zip(boxes.tolist(), colors.tolist(), strict=True):
        drawing.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=tuple(color))
    return np.asarray(canvas)


def _by_pixel(cells: Tensor, stride: int, size: Sequence[int]) -> NDArray[np.float32]:
    """The value of each pixel's cell: cells [H_l, W_l] to [h, w]."""
    cells = cells[: -(-size[0] // stride), : -(-size[1] // stride)]
    return _numpy(cells.repeat_interleave(stride, dim=0)[: size[0]].repeat_interleave(stride, dim=1)[:, : size[1]])


def _numpy(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.float().cpu().numpy()
