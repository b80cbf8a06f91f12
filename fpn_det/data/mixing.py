"""Transforms that combine several images: mosaic, mix-up and copy-paste.

They come first in a chain of transforms. Boxes are in px of the image that they belong to, before any resize.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from fpn_det.data.flip_resize import Size, resize


@dataclass(frozen=True)
class Scene:
    """The pixels and objects of one image."""

    pixels: np.ndarray  # [h, w, C]
    boxes: np.ndarray  # f64 [G, 4] xyxy
    labels: np.ndarray  # i64 [G]
    visible: np.ndarray  # f64 [G], visible fraction of each box

    @property
    def size(self) -> Size:
        return self.pixels.shape[0], self.pixels.shape[1]

    def resized(self, size: Size) -> Scene:
        """Return the scene resized to (h, w)."""
        ratio = np.array((size[1] / self.size[1], size[0] / self.size[0]) * 2)
        return Scene(resize(self.pixels, size, "cv2", antialias=True), self.boxes * ratio, self.labels, self.visible)


class Mixing(ABC):
    """Base of the transforms that combine an image with others of the data set.

    Args:
        p: probability.

    Attributes:
        num_others: number of other images that it needs.
    """

    num_others: int

    def __init__(self, p: float = 1.0) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"{type(self).__name__}: expected p in 0..1, got {p}.")
        self.p = p

    @abstractmethod
    def __call__(self, own: Scene, others: Sequence[Scene], draw: random.Random) -> Scene:
        """Combine `own` with `others`.

        Args:
            own: the image itself.
            others: `num_others` images of the data set.
            draw: source of all random choices.

        Returns:
            The combined scene. Boxes that are fully hidden may remain, with `visible` 0.
        """


class Mosaic(Mixing):
    """Place four images around a random center, each cropped to its quadrant of the canvas (YOLOv4, 3.3).

    Args:
        size: (h, w) of the canvas, px.
        scale_range: each image is scaled to fit the canvas, times a factor drawn uniformly from (low, high).
        center_range: (low, high) of the center's position, as a fraction of the canvas.
        fill: pixel value where no image lies; None = 114 for images of 8 bits, else the mean of each channel of the first image.
        p: probability.
    """

    num_others = 3

    def __init__(
        self,
        size: Sequence[int],
        scale_range: Sequence[float] = (0.4, 1.0),
        center_range: Sequence[float] = (0.3, 0.7),
        fill: float | None = None,
        p: float = 1.0,
    ) -> None:
        super().__init__(p)
        self.size, self.scale_range, self.center_range, self.fill = (
            tuple(size),
            tuple(scale_range),
            tuple(center_range),
            fill,
        )
        if len(self.size) != 2 or min(self.size) < 2:
            raise ValueError(f"Mosaic: expected size (h, w) in px, got {self.size}.")
        if len(self.scale_range) != 2 or not 0 < self.scale_range[0] <= self.scale_range[1]:
            raise ValueError(f"Mosaic: expected scale_range (low, high) with 0 < low <= high, got {self.scale_range}.")
        if len(self.center_range) != 2 or not 0 < self.center_range[0] <= self.center_range[1] < 1:
            raise ValueError(
                f"Mosaic: expected center_range (low, high) with 0 < low <= high < 1, got {self.center_range}."
            )

    def __call__(self, own: Scene, others: Sequence[Scene], draw: random.Random) -> Scene:
        height, width = self.size
        pixels = np.full((height, width, own.pixels.shape[2]), self._fill_of(own.pixels), own.pixels.dtype)
        y, x = (max(round(side * draw.uniform(*self.center_range)), 1) for side in self.size)
        parts = []
        for number, scene in enumerate([own, *others]):  # top left, top right, bottom left, bottom right
            scale = min(height / scene.size[0], width / scene.size[1]) * draw.uniform(*self.scale_range)
            scene = scene.resized((max(round(scene.size[0] * scale), 1), max(round(scene.size[1] * scale), 1)))
            left = x - scene.size[1] if number % 2 == 0 else x
            top = y - scene.size[0] if number < 2 else y
            x1, x2 = max(left, 0), min(left + scene.size[1], width)
            y1, y2 = max(top, 0), min(top + scene.size[0], height)
            pixels[y1:y2, x1:x2] = scene.pixels[y1 - top : y2 - top, x1 - left : x2 - left]
            parts.append(_cut(scene, (left, top), (x1, y1, x2, y2)))
        boxes, visible = (np.concatenate(column) for column in zip(*parts, strict=True))
        return Scene(pixels, boxes, np.concatenate([scene.labels for scene in [own, *others]]), visible)

    def _fill_of(self, pixels: np.ndarray) -> float | np.ndarray:
        if self.fill is not None:
            return self.fill
        return 114 if pixels.dtype == np.uint8 else pixels.mean(axis=(0, 1), dtype=np.float64)


class MixUp(Mixing):
    """Blend the image with another one and keep the objects of both (mix-up for detection: Zhang et al. 2019).

    Args:
        alpha: the mixing weight is drawn from Beta(alpha, alpha); large values concentrate it at 0.5.
        p: probability.
    """

    num_others = 1

    def __init__(self, alpha: float = 32.0, p: float = 1.0) -> None:
        super().__init__(p)
        self.alpha = alpha
        if alpha <= 0:
            raise ValueError(f"MixUp: expected alpha above 0, got {alpha}.")

    def __call__(self, own: Scene, others: Sequence[Scene], draw: random.Random) -> Scene:
        weight = draw.betavariate(self.alpha, self.alpha)
        scale = min(own.size[0] / others[0].size[0], own.size[1] / others[0].size[1])
        height, width = (
            max(min(round(side * scale), limit), 1) for side, limit in zip(others[0].size, own.size, strict=True)
        )
        other = others[0].resized((height, width))
        pixels = own.pixels.copy()
        blended = cv2.addWeighted(own.pixels[:height, :width], weight, other.pixels, 1 - weight, 0)
        pixels[:height, :width] = blended.reshape(other.pixels.shape)  # OpenCV drops the axis of a single channel
        return _joined(pixels, [own, other])


class CopyPaste(Mixing):
    """Paste the contents of another image's boxes at random positions (Simple Copy-Paste, with boxes instead of masks).

    Objects that are covered lose the covered fraction of their visibility.

    Args:
        max_objects: the number of pasted objects is drawn from 1..max_objects; objects larger than the image are not used.
        p: probability.
    """

    num_others = 1

    def __init__(self, max_objects: int = 3, p: float = 1.0) -> None:
        super().__init__(p)
        self.max_objects = max_objects
        if max_objects < 1:
            raise ValueError(f"CopyPaste: expected max_objects of at least 1, got {max_objects}.")

    def __call__(self, own: Scene, others: Sequence[Scene], draw: random.Random) -> Scene:
        (other,) = others
        height, width = own.size
        limits = (other.size[1], other.size[0]) * 2
        edges = np.clip(np.rint(other.boxes), 0, limits).astype(int)
        sides = edges[:, 2:] - edges[:, :2]
        fitting = np.flatnonzero(((sides > 0) & (sides <= (width, height))).all(axis=1)).tolist()
        rows = draw.sample(fitting, min(len(fitting), draw.randint(1, self.max_objects)))
        pixels, layer_map = (
            own.pixels.copy(),
            np.zeros(own.size, np.int32),
        )  # number of the pasted object, from 1; 0 = own
        places = []
        for number, row in enumerate(rows, start=1):
            x1, y1, x2, y2 = edges[row]
            x, y = draw.randint(0, width - (x2 - x1)), draw.randint(0, height - (y2 - y1))
            place = np.s_[y : y + y2 - y1, x : x + x2 - x1]
            pixels[place], layer_map[place] = other.pixels[y1:y2, x1:x2], number
            places.append((x, y, x + x2 - x1, y + y2 - y1))
        pasted = Scene(pixels, np.array(places, np.float64).reshape(-1, 4), other.labels[rows], other.visible[rows])
        return _joined(
            pixels,
            [_hidden(own, layer_map, np.zeros(len(own.boxes))), _hidden(pasted, layer_map, np.arange(len(rows)) + 1)],
        )


def _cut(scene: Scene, offset: tuple[int, int], window: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Shift the boxes of a scene by (x, y) and clip them to a window xyxy; return them with their visible fractions."""
    boxes = scene.boxes + np.array(offset * 2)
    cut = np.clip(boxes, (window[0], window[1]) * 2, (window[2], window[3]) * 2)
    return cut, scene.visible * (cut[:, 2:] - cut[:, :2]).prod(axis=1) / (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)


def _hidden(scene: Scene, layer_map: np.ndarray, layers: np.ndarray) -> Scene:
    """Reduce the visibility of object i to the fraction of its box where `layer_map` [h, w] equals `layers[i]`."""
    visible = scene.visible.copy()
    for row, (x1, y1, x2, y2) in enumerate(np.rint(scene.boxes).astype(int).tolist()):
        in_box = layer_map[max(y1, 0) : max(y2, y1 + 1), max(x1, 0) : max(x2, x1 + 1)]
        visible[row] *= (in_box == layers[row]).mean() if in_box.size else 0.0
    return Scene(scene.pixels, scene.boxes, scene.labels, visible)


def _joined(pixels: np.ndarray, scenes: Sequence[Scene]) -> Scene:
    """Return a scene of `pixels` with the objects of all `scenes`."""
    boxes, labels, visible = (
        np.concatenate([getattr(scene, name) for scene in scenes]) for name in ("boxes", "labels", "visible")
    )
    return Scene(pixels, boxes, labels, visible)
