"""IoU of the boxes of a data set with a model's anchors, and their levels in its pyramid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fpn_det.data.transforms import Pipeline, input_sizes
from fpn_det.data_report.object_sizes import size_advice
from fpn_det.models.detector import Detector
from fpn_det.structures import Annotations

SHIFTS = tuple(2 ** (half / 2) for half in range(-4, 5))  # factors of the anchors' sizes that are tried
TRIED = 20_000  # objects that other anchors are tried on
WORTH_IT = 0.8  # other anchors are suggested if they leave at most this part of the objects without a positive anchor


@dataclass(frozen=True)
class AnchorAdvice:
    """Anchors that fit the objects better.

    Attributes:
        setting: word of the command line.
        below_positive: part of the objects without a positive anchor by IoU, with these anchors.
        more_anchors: factor of the number of anchors.
    """

    setting: str
    below_positive: float
    more_anchors: int


@dataclass(frozen=True)
class AnchorCoverage:
    """Best anchor and level of each object, without crowd regions, in the input frame (px after transforms).

    Attributes:
        rows: row of the object in Annotations.
        boxes: [T, 4].
        levels: [T] index of the level that the RoI is pooled from.
        ious: [T] with the best anchor of all shapes and positions.
        level_names: of the levels that RoIs are pooled from: P2, ...
        anchor_sizes: sides of the anchors' squares, level by level.
        anchor_ratios: height / width.
        positive_iou: anchors with at least this IoU are positive.
        negative_iou: anchors with less than this IoU are negative.
        advice: anchors that fit clearly better, if any of those tried do; none are tried with tiles, which show the objects larger.
        size_advice: see `object_sizes`.
        tile: side of the tiles that images are cut into, px of the image. All but `advice` and `size_advice` is of whole images.
    """

    rows: np.ndarray
    boxes: np.ndarray
    levels: np.ndarray
    ious: np.ndarray
    level_names: list[str]
    anchor_sizes: list[float]
    anchor_ratios: list[float]
    positive_iou: float
    negative_iou: float
    advice: AnchorAdvice | None
    size_advice: str | None
    tile: int | None = None

    @property
    def num_below_positive(self) -> int:
        """Number of objects without a positive anchor by IoU."""
        return int((self.ious < self.positive_iou).sum())

    @property
    def num_below_negative(self) -> int:
        """Number of objects all of whose anchors are negative by IoU."""
        return int((self.ious < self.negative_iou).sum())


def measure_coverage(
    annotations: Annotations, model: Detector, transform: Pipeline, tile: int | None = None
) -> AnchorCoverage:
    """Map the boxes to the input frame of the evaluation, and find the best anchor of each.

    Args:
        annotations: of the data set.
        model: has the anchors.
        transform: of the evaluation.
        tile: side of the tiles that images are cut into, px of the image; only `advice` and `size_advice` depend on it.

    Raises:
        ValueError: the model has no anchors.
    """
    rpn = model.rpn
    if rpn is None:
        raise ValueError(
            "model.rpn: expected an RPN, whose anchors are compared with the boxes, got null. Choose another experiment."
        )
    owners = annotations.image_of_boxes.numpy()
    rows = np.flatnonzero(~annotations.iscrowd.numpy())
    sizes = annotations.sizes.numpy()
    resized = input_sizes(sizes, transform)
    scale = (resized / np.maximum(sizes, 1))[owners[rows]]
    boxes = annotations.boxes.numpy()[rows] * np.tile(scale[:, ::-1], 2)
    canvases = -(-resized[owners[rows]] // model.stride) * model.stride
    cells = rpn.anchors.cell_anchors  # [L, A, 4]
    shapes = (cells[..., 2:] - cells[..., :2]).double()
    strides, offset = rpn.anchors.strides, rpn.anchors.offset
    ious = _best_ious(boxes, canvases, shapes.numpy(), strides, offset)
    anchor_sizes = sorted({round(float(side), 3) for side in shapes.prod(dim=2).sqrt().flatten()})
    original = annotations.boxes.numpy()[rows]
    tried = np.linspace(0, len(boxes) - 1, min(len(boxes), TRIED)).astype(int)
    return AnchorCoverage(
        rows=rows,
        boxes=boxes,
        levels=model.assigner(torch.from_numpy(boxes)).numpy(),
        ious=ious,
        level_names=[f"P{model.assigner.first + index}" for index in range(model.assigner.num_levels)],
        anchor_sizes=anchor_sizes,
        anchor_ratios=sorted({round(float(ratio), 3) for ratio in (shapes[..., 1] / shapes[..., 0]).flatten()}),
        positive_iou=rpn.matcher.positive_iou,
        negative_iou=rpn.matcher.negative_iou,
        advice=None
        if tile is not None
        else _advise(
            boxes[tried], canvases[tried], ious[tried], shapes.numpy(), strides, offset, rpn.matcher.positive_iou
        ),
        size_advice=size_advice(
            np.sqrt((original[:, 2:] - original[:, :2]).prod(axis=1)),
            sizes[owners[rows]],
            transform,
            anchor_sizes,
            strides[0],
            tile,
        ),
        tile=tile,
    )


def _advise(
    boxes: np.ndarray,
    canvases: np.ndarray,
    ious: np.ndarray,
    shapes: np.ndarray,
    strides: tuple[int, ...],
    offset: float,
    positive_iou: float,
) -> AnchorAdvice | None:
    """Try the same anchors larger and smaller, and with a second size between two; None if none fits clearly better."""
    if not len(boxes):
        return None
    best, advice = WORTH_IT * float((ious < positive_iou).mean()), None
    plain = [shapes * shift for shift in SHIFTS]
    doubled = [np.concatenate([candidate, candidate * 2**0.5], axis=1) for candidate in plain]
    for more, candidates in ((1, plain), (2, doubled)):
        best *= 1 if more == 1 else WORTH_IT  # more anchors cost time and have to bring more
        for candidate in candidates:
            share = float((_best_ious(boxes, canvases, candidate, strides, offset) < positive_iou).mean())
            if share < best:
                sizes = [sorted({round(float(side)) for side in np.sqrt(level.prod(axis=1))}) for level in candidate]
                flat = sizes if any(len(level) > 1 for level in sizes) else [level[0] for level in sizes]
                best, advice = share, AnchorAdvice(f"model.rpn.anchors.sizes={flat}".replace(" ", ""), share, more)
    return advice


def _best_ious(
    boxes: np.ndarray, canvases: np.ndarray, shapes: np.ndarray, strides: tuple[int, ...], offset: float
) -> np.ndarray:
    """IoU [T] with the best anchor. Of each shape, only the anchor with the nearest center can be the best."""
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
