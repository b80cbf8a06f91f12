"""Draw training batches in the input frame: objects, and the anchors matched to them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fpn_det.models.detector import Detector
from fpn_det.structures import Batch, Pyramid
from fpn_det.visualization.panels import (
    SIDE,
    RGBImage,
    Title,
    counted_title,
    draw_boxes,
    make_grid,
    resize_longer_side,
    to_rgb,
)
from fpn_det.visualization.pyramid_panels import LEVEL_COLORS, outline_boxes

IMAGES_PER_SHEET = 6
COLUMNS = 4


@dataclass(frozen=True)
class MatchedAnchors:
    """Positive anchors of one image."""

    boxes: Tensor  # f32 [n, 4], input frame
    levels: Tensor  # i64 [n]
    objects: Tensor  # i64 [n], index of the matched object among the image's targets


def draw_anchors_and_objects(model: Detector, batch: Batch, class_names: Sequence[str]) -> Iterator[RGBImage]:
    """Yield sheets with two panels per image: its objects, and their positive anchors in the colors of the pyramid levels.

    The label `dog P4 x3` is a dog with three positive anchors that the ROI head pools from P4, as the title says.
    """
    names = [f"P{stride.bit_length() - 1}" for stride in model.neck.strides]
    anchored = match_anchors(model, batch)
    words = [
        "class",
        *["level of its RoI"] * (model.roi_head is not None),
        *["x its positive anchors"] * bool(anchored),
    ]
    meaning = f" (label: {', '.join(words)})" if len(words) > 1 else ""
    panels: list[RGBImage] = []
    titles: list[str | Title] = []
    for row, (pixels, (height, width)) in enumerate(zip(batch.pixels.cpu(), batch.sizes.tolist(), strict=True)):
        valid = batch.targets.valid[row]
        boxes, labels = batch.targets.boxes[row][valid], batch.targets.labels[row][valid].tolist()
        texts = [class_names[label] for label in labels]
        if model.roi_head is not None:
            pooled = model.roi_head.pooler.assigner(boxes).tolist()
            texts = [f"{text} {names[level]}" for text, level in zip(texts, pooled, strict=True)]
        shown = to_rgb(pixels)
        if anchored:
            counts = torch.bincount(anchored[row].objects, minlength=len(labels)).tolist()
            texts = [f"{text} x{count}" for text, count in zip(texts, counts, strict=True)]
        panels.append(draw_boxes(shown, boxes.cpu().numpy(), labels, texts))
        titles.append(f"{width} x {height} px, {len(labels)} objects{meaning if labels else ''}")
        if anchored:
            levels = anchored[row].levels.tolist()
            zoom = SIDE / max(shown.shape[:2])
            anchors = outline_boxes(
                resize_longer_side(shown, SIDE),
                anchored[row].boxes.cpu().numpy() * zoom,
                np.array(LEVEL_COLORS)[levels],
            )
            white = np.full((len(labels), 3), 255)
            panels.append(outline_boxes(anchors, boxes.cpu().numpy() * zoom, white, brightness=1))
            on_levels = [f"on {name}: {levels.count(level)}" for level, name in enumerate(names)]
            on_levels = [text if level in levels else "" for level, text in enumerate(on_levels)]
            titles.append(counted_title("objects (white) and positive anchors", on_levels, LEVEL_COLORS))
    step = IMAGES_PER_SHEET * len(panels) // len(batch)
    for start in range(0, len(panels), step):
        yield make_grid(panels[start : start + step], titles[start : start + step], COLUMNS)


@torch.no_grad()
def match_anchors(model: Detector, batch: Batch) -> list[MatchedAnchors]:
    """Match anchors to the objects of each image with the matcher of the RPN loss. Empty for a model without RPN.

    The model runs on the meta device, which computes shapes only.
    """
    if model.rpn is None:
        return []
    shapes = copy.deepcopy(model).to("meta").pyramid(batch.to("meta")).shapes
    levels = [batch.pixels.new_empty(len(batch), 0, *shape) for shape in shapes]
    pyramid = Pyramid(levels, model.neck.strides, batch.sizes, model.stride)
    anchors = model.rpn.anchors(shapes)
    match = model.rpn.matcher(batch.targets, anchors, model.rpn.inside(pyramid))
    per_level = torch.tensor([height * width for height, width in shapes]) * model.rpn.anchors.num_per_cell
    level_of = torch.repeat_interleave(per_level).to(anchors.device)
    return [
        MatchedAnchors(anchors[positive], level_of[positive], objects[positive])
        for positive, objects in zip(match.positive, match.matched_idxs, strict=True)
    ]
