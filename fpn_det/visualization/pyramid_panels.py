"""Draw the pyramid levels of a detector for one image: features, objectness, positive anchors, proposals, RoIs, detections.

One column per level, fine to coarse, each level in its own color; the left column shows all levels.
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
from fpn_det.models.roi_align import LevelAssigner
from fpn_det.models.rpn import RPNOutput
from fpn_det.structures import Batch
from fpn_det.visualization.panels import (
    MIN_SCORE,
    RGBImage,
    Title,
    class_color,
    make_grid,
    resize_longer_side,
    to_rgb,
)

SIDE = 240  # px, longer side of a panel
NUM_BOXES = 20  # proposals that are drawn, of highest objectness over all levels
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
class PyramidInspection:
    """Intermediate results for one image, by level. Boxes [n, 4] are in the input frame."""

    names: list[str]  # P2, ...
    strides: tuple[int, ...]
    features: list[NDArray[np.float32]]  # [h, w], norm of the feature vector of each pixel's cell
    objectness: list[NDArray[np.float32]]  # [h, w] in [0, 1], maximum over the anchors of each pixel's cell
    matched: list[NDArray[np.float32]]  # positive anchors
    proposed: list[NDArray[np.float32]]  # the best proposals, at the level of their anchors
    pooled: list[NDArray[np.float32]] | None  # the same proposals, at the level that the ROI head pools from
    detected: list[NDArray[np.float32]] | None  # detections, at the level that a box of their size is pooled from
    detected_labels: list[int]  # classes of the detections in this order


@torch.no_grad()
def inspect_pyramid(model: Detector, batch: Batch, min_scores: Sequence[float] | None = None) -> PyramidInspection:
    """Run a detector on a batch of one image, on its device, and record intermediate results.

    Args:
        model: with an RPN.
        batch: of one image.
        min_scores: of the detections of each class; None is MIN_SCORE for all.

    Raises:
        ValueError: the model has no RPN.
    """
    assert len(batch) == 1, "one image at a time"
    if model.rpn is None:
        raise ValueError(
            "levels: expected a model with an RPN, got one without. Only anchors and their proposals can be drawn."
        )
    with evaluation_mode(model):
        pyramid = model.pyramid(batch)
        output = model.rpn(pyramid)
        match = model.rpn.matcher(batch.targets, output.anchors, output.inside)
        parts = _split_levels(output)
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
        pooled = detected = None
        labels = torch.zeros(0, dtype=torch.int64)
        if model.roi_head is not None:
            assigner = model.roi_head.pooler.assigner
            pooled, _ = _by_level(torch.cat(proposed), assigner, len(proposed))
            proposals = model.rpn.propose(output, batch, model.rpn.test_filter)
            ((boxes, scores, labels),) = model.select(model.roi_head.raw(pyramid, proposals, batch), batch).images()
            least = torch.full_like(scores, MIN_SCORE) if min_scores is None else scores.new_tensor(min_scores)[labels]
            boxes, labels = boxes[scores >= least], labels[scores >= least]
            detected, order = _by_level(boxes, assigner, len(proposed))
            labels = labels[order]
    size = batch.sizes[0].tolist()
    return PyramidInspection(
        names=[f"P{stride.bit_length() - 1}" for stride in pyramid.strides],
        strides=pyramid.strides,
        features=[
            _cells_to_pixels(level[0].norm(dim=0), stride, size)
            for level, stride in zip(pyramid.levels, pyramid.strides, strict=True)
        ],
        objectness=[
            _cells_to_pixels(level, stride, size) for level, stride in zip(objectness, pyramid.strides, strict=True)
        ],
        matched=[_numpy(part.anchors[mask]) for part, mask in zip(parts, positive, strict=True)],
        proposed=[_numpy(boxes) for boxes in proposed],
        pooled=pooled,
        detected=detected,
        detected_labels=labels.tolist(),
    )


def _by_level(boxes: Tensor, assigner: LevelAssigner, count: int) -> tuple[list[NDArray[np.float32]], Tensor]:
    """Divide boxes [n, 4] by the level they are pooled from; and the indices [n] of the boxes in this order."""
    levels = assigner(boxes)
    parts = [(levels == level).nonzero()[:, 0] for level in range(count)]
    return [_numpy(boxes[part]) for part in parts], torch.cat(parts)


def _split_levels(output: RPNOutput) -> list[RPNOutput]:
    """Split the output of the RPN head by level."""
    tensors = (output.logits, output.deltas, output.anchors[None], output.inside)
    split = zip(*(tensor.split(output.level_sizes, dim=1) for tensor in tensors), strict=True)
    return [
        replace(output, logits=logits, deltas=deltas, anchors=anchors[0], inside=inside, level_sizes=[logits.shape[1]])
        for logits, deltas, anchors, inside in split
    ]


def draw_pyramid(levels: PyramidInspection, batch: Batch, side: int = SIDE) -> RGBImage:
    """Draw one sheet: a row per kind of result, a column per level; the left column shows all levels."""
    height, width = batch.sizes[0].tolist()
    image = resize_longer_side(to_rgb(batch.pixels[0, :, :height, :width].cpu()), side)
    zoom = side / max(height, width)
    valid = batch.targets.valid[0]
    truth, labels = _numpy(batch.targets.boxes[0][valid]), batch.targets.labels[0][valid].tolist()

    panels = [outline_boxes(image, truth * zoom, _class_colors(labels), brightness=1)]
    titles: list[str | Title] = [f"objects: {len(labels)}" if labels else "image"]
    panels += [heatmap(each, image) for each in levels.features]
    titles += [
        [(f"{name}, stride {stride}: features", color)]
        for name, stride, color in zip(levels.names, levels.strides, LEVEL_COLORS, strict=False)
    ]

    over_all = np.max(levels.objectness, axis=0)
    panels += [heatmap(each, image, 1.0) for each in (over_all, *levels.objectness)]
    titles += ["objectness", *_level_titles(levels.names, [f"up to {each.max():.2f}" for each in levels.objectness])]

    kinds = {
        "positive anchors": levels.matched if labels else None,  # without objects none is
        "best proposals, by anchor": levels.proposed,
        "best proposals, by RoI": levels.pooled,
        "detections, by RoI": levels.detected,
    }
    for title, per_level in kinds.items():
        if per_level is None:
            continue
        boxes = np.concatenate(per_level) * zoom
        colors = np.repeat(LEVEL_COLORS[: len(per_level)], [len(each) for each in per_level], axis=0)
        starts = np.cumsum([len(each) for each in per_level])[:-1]
        if per_level is levels.detected:
            panels.append(outline_boxes(image, boxes, _class_colors(levels.detected_labels), brightness=1))
        else:
            panels.append(outline_boxes(image, boxes, colors))
        panels += [
            outline_boxes(image, *part) for part in zip(np.split(boxes, starts), np.split(colors, starts), strict=True)
        ]
        titles += [f"{title}: {len(boxes)}", *_level_titles(levels.names, [str(len(each)) for each in per_level])]
    return make_grid(panels, titles, columns=1 + len(levels.names))


def _class_colors(labels: Sequence[int]) -> NDArray:
    return np.array([class_color(label) for label in labels]).reshape(-1, 3)


def _level_titles(names: Sequence[str], texts: Sequence[str]) -> list[Title]:
    return [
        [(f"{name}: {text}", color)] for name, text, color in zip(names, texts, LEVEL_COLORS[: len(names)], strict=True)
    ]


def heatmap(values: NDArray[np.float32], under: RGBImage, top: float | None = None) -> RGBImage:
    """Overlay a map [h, w] on a grayscale image. Interpolation is nearest, so that cells are visible.

    Args:
        values: the map.
        under: background image.
        top: value of the brightest color; the darkest is 0. None scales from the smallest to the largest value.
    """
    low, high = (values.min(), values.max()) if top is None else (0.0, top)
    values = cv2.resize(values, under.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    shades = np.clip((values - low) / max(high - low, 1e-6), 0, 1) * 255
    colors = cv2.applyColorMap(shades.astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]  # from BGR
    gray = np.repeat(under.mean(axis=2, keepdims=True), 3, axis=2)
    return (0.8 * colors + 0.2 * gray).astype(np.uint8)


def outline_boxes(panel: RGBImage, boxes: NDArray, colors: NDArray, brightness: float = 0.45) -> RGBImage:
    """Outline boxes [n, 4] (px of the image) in colors [n, 3] on a dimmed image."""
    canvas = Image.fromarray((panel * brightness).astype(np.uint8))
    drawing = ImageDraw.Draw(canvas)
    for (x1, y1, x2, y2), color in zip(boxes.tolist(), colors.tolist(), strict=True):
        drawing.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=tuple(color))
    return np.asarray(canvas)


def _cells_to_pixels(cells: Tensor, stride: int, size: Sequence[int]) -> NDArray[np.float32]:
    """Repeat cells [H_l, W_l] to the pixels [h, w] that they cover."""
    cells = cells[: -(-size[0] // stride), : -(-size[1] // stride)]
    return _numpy(cells.repeat_interleave(stride, dim=0)[: size[0]].repeat_interleave(stride, dim=1)[:, : size[1]])


def _numpy(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.float().cpu().numpy()
