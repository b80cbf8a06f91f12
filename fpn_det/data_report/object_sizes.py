"""Advice for objects that are smaller than the finest anchors when the model gets them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fpn_det.data.transforms import Pipeline, ResizeShortestSide

MIN_CELLS = 2  # of the finest level, that an object should span
MAX_ENLARGEMENT = 2  # of the input, above which tiles are suggested: its cost is the square
SIDES = 32  # suggested sides are multiples of it, px


def size_advice(
    sides: np.ndarray,
    image_sizes: np.ndarray,
    transform: Pipeline,
    anchor_sizes: Sequence[float],
    stride: int,
    tile: int | None = None,
) -> str | None:
    """Say which setting helps if the median object is smaller than the finest anchors; None if it is not.

    Args:
        sides: of the objects, the square roots of their areas, px of the image [T].
        image_sizes: (h, w) of the image of each object [T, 2].
        transform: from the original frame to the input frame.
        anchor_sizes: sides of the anchors' squares, px of the input.
        stride: of the finest level, px of the input.
        tile: side of the tiles that images are cut into, px of the image.
    """
    if not len(sides):
        return None
    resize = next((step for step in transform.transforms if isinstance(step, ResizeShortestSide)), None)
    shown = image_sizes if tile is None else np.minimum(image_sizes, tile)
    scales = np.ones(len(sides))
    if resize is not None:
        scales = np.minimum(min(resize.sides) / shown.min(axis=1), resize.max_side / shown.max(axis=1))
    original, median = float(np.median(sides)), float(np.median(sides * scales))
    finest = min(anchor_sizes)
    if median >= finest:
        return None
    text = f"The median object is {original:.3g} px wide in its image and {median:.3g} px in the model's input, the finest anchors {finest:g} px."
    enlargement = max(finest, MIN_CELLS * stride) / median
    if median >= MIN_CELLS * stride:
        smaller = [round(size / 2 ** math.ceil(math.log2(finest / median)), 1) for size in sorted(anchor_sizes)]
        sizes = ",".join(f"{size:g}" for size in smaller)
        return f"{text} Set smaller anchors: model.rpn.anchors.sizes=[{sizes}]."
    fitting = None if resize is None else int(min(resize.sides) / (enlargement * median / original))
    if enlargement > MAX_ENLARGEMENT and fitting is not None and fitting < np.median(image_sizes.min(axis=1)):
        return f"{text} Cut the images into tiles, which are shown larger: data.tile.size={fitting}."
    if resize is None:
        return (
            f"{text} Enlarge the images {enlargement:.2g} times with a resize: data.train_transforms.resize and "
            "data.eval_transforms.resize."
        )
    side = math.ceil(min(resize.sides) * enlargement / SIDES) * SIDES
    most = math.ceil(side * resize.max_side / min(resize.sides) / SIDES) * SIDES
    settings = " ".join(
        f"data.{name}_transforms.resize.sides=[{side}] data.{name}_transforms.resize.max_side={most}"
        for name in ("train", "eval")
    )
    return f"{text} Enlarge the input: {settings}."
