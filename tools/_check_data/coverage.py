"""How the boxes of a data set meet the anchors and the pyramid of a model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fpn_det.data.transforms import Pipeline
from fpn_det.models.detector import Detector
from fpn_det.structures import Annotations


@dataclass(frozen=True)
class Coverage:
    """Per object (crowd regions left out), in the input frame.

    Attributes:
        rows: the object's row in Annotations.
        boxes: [T, 4].
        levels: index of the level that its RoI is pooled from.
        ious: with the best of all anchors at all positions.
        names: of the levels that RoIs are pooled from, P2, ...
        anchor_sizes: sides of the anchors' squares, level by level.
        anchor_ratios: height / width.
        threshold: an anchor with this IoU is positive,
        background: and negative below this.
    """

    rows: np.ndarray
    boxes: np.ndarray
    levels: np.ndarray
    ious: np.ndarray
    names: list[str]
    anchor_sizes: list[float]
    anchor_ratios: list[float]
    threshold: float
    background: float

    @property
    def learned_by_rescue(self) -> int:
        """How many objects have no anchor of the threshold anywhere."""
        return int((self.ious < self.threshold).sum())

    @property
    def out_of_reach(self) -> int:
        """How many objects have only anchors that would count as background."""
        return int((self.ious < self.background).sum())


def cover(annotations: Annotations, model: Detector, transform: Pipeline) -> Coverage:
    """Lay the boxes into the input frame of the evaluation, and find the best anchor of each.

    Raises:
        ValueError: the model has no anchors.
    """
    rpn = model.rpn
    if rpn is None:
        raise ValueError(
            "tools/check_data.py: expected a model with an RPN, got one without, and so without anchors. Name another experiment."
        )
    owners = np.repeat(np.arange(len(annotations)), np.diff(annotations.offsets.numpy()))
    rows = np.flatnonzero(~annotations.iscrowd.numpy())
    sizes = annotations.sizes.numpy()
    input_sizes = _input_sizes(sizes, transform)
    scale = (input_sizes / np.maximum(sizes, 1))[owners[rows]]
    boxes = annotations.boxes.numpy()[rows] * np.tile(scale[:, ::-1], 2)
    canvases = -(-input_sizes[owners[rows]] // model.stride) * model.stride
    cells = rpn.anchors.cell_anchors  # [L, A, 4]
    shapes = (cells[..., 2:] - cells[..., :2]).double()
    return Coverage(
        rows=rows,
        boxes=boxes,
        levels=model.assigner(torch.from_numpy(boxes)).numpy(),
        ious=_best_ious(boxes, canvases, shapes.numpy(), rpn.anchors.strides, rpn.anchors.offset),
        names=[f"P{model.assigner.first + index}" for index in range(model.assigner.num_levels)],
        anchor_sizes=sorted({round(float(side), 3) for side in shapes.prod(dim=2).sqrt().flatten()}),
        anchor_ratios=sorted({round(float(ratio), 3) for ratio in (shapes[..., 1] / shapes[..., 0]).flatten()}),
        threshold=rpn.matcher.positive_iou,
        background=rpn.matcher.negative_iou,
    )


def _input_sizes(sizes: np.ndarray, transform: Pipeline) -> np.ndarray:
    """(h, w) of every image after the transforms: of those that differ in size, one is tried."""
    distinct, where = np.unique(sizes, axis=0, return_inverse=True)
    no_boxes, no_labels = np.zeros((0, 4)), np.zeros(0, np.int64)
    tried = [
        transform(np.zeros((*size, 3), np.uint8), no_boxes, no_labels, (0,))[0].shape[:2] for size in distinct.tolist()
    ]
    return np.array(tried, dtype=np.int64).reshape(-1, 2)[where.reshape(-1)]


def _best_ious(
    boxes: np.ndarray, canvases: np.ndarray, shapes: np.ndarray, strides: tuple[int, ...], offset: float
) -> np.ndarray:
    """IoU [T] with the best anchor. Of one shape, that is the one whose center is nearest in x and in y."""
    best = np.zeros(len(boxes))
    centers, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    for stride, level in zip(strides, shapes, strict=True):
        last = -(-canvases[:, ::-1] // stride) - 1
        cell = np.clip(np.round(centers / stride - offset), 0, last)
        distance = np.abs((cell + offset) * stride - centers)
        for shape in level:
            overlap = np.clip(np.minimum(np.minimum(sides, shape), (sides + shape) / 2 - distance), 0, None).prod(
                axis=1
            )
            best = np.maximum(best, overlap / (sides.prod(axis=1) + shape.prod() - overlap))
    return best
