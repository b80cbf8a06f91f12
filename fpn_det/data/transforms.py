"""Transforms of an image and its boxes: the adapter to albumentations, and transforms that albumentations lacks.

The coordinate frame changes here: boxes enter in the original frame and leave in the input frame. Pixels keep the values
of the file throughout, uint8 in 0..255 for pictures (float32 after `Normalize` or a resize by `torch_float`); the model
normalizes them on the device.
This is the only file that imports albumentations.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

import numpy as np

from fpn_det.data.flip_resize import Backend, FlipResize, Rounding, Size, resize, resized_size
from fpn_det.data.mixing import Mixing, Scene
from fpn_det.image_io import RGB, PixelFormat

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # otherwise the import checks the network for a newer version
import albumentations as A

MAX_ASPECT = 4  # longer side / shorter side up to which an image is resized to a given shorter side
TRIALS = 8  # random draws by which a transform shows that it takes a format of pixels
ReadPixels = Callable[[Size | None], np.ndarray]  # [h, w, C], in full (None), or reduced to at least this (h, w)
DrawScene = Callable[[random.Random], Scene]  # a random image of the same data set


class Pipeline:
    """A seeded chain of transforms that keeps boxes and labels together.

    Labels never enter albumentations: a box carries its row number through the chain. Horizontal flips and one
    `ResizeShortestSide` at the end of the chain are drawn and applied to the boxes, while their pixels are deferred
    (see `flip_resize`).

    Args:
        transforms: albumentations transforms or compositions, in order; `Mixing` transforms first.
        min_visibility: drop a box if less than this fraction of its area is left after all transforms; in [0, 1].
        min_area: drop a box that is smaller than this in the input frame; px^2.
        pixel_format: of the images, which the transforms keep.

    Raises:
        ValueError: `Mixing` transforms come late, or a transform does not take images of the format.
    """

    def __init__(
        self,
        transforms: Sequence[Any],
        min_visibility: float = 0.0,
        min_area: float = 1.0,
        pixel_format: PixelFormat = RGB,
    ) -> None:
        self.transforms = list(transforms)
        self.min_visibility = min_visibility
        self.min_area = min_area
        self.pixel_format = pixel_format
        self.mixing, self.eager, self.deferred = _split(transforms)
        leaves = [leaf for step in transforms for leaf in _leaves(step)]
        self._drawn_per_step = [leaf for leaf in leaves if isinstance(leaf, ResizeShortestSide) and leaf.per_step]
        in_float = any(getattr(step, "backend", "") == "torch_float" for step in self.eager)
        self.normalizes = any(isinstance(step, Normalize) for step in self.eager)
        self.dtype = np.dtype(
            np.float32 if in_float or self.normalizes else pixel_format.dtype
        )  # after the eager transforms
        if pixel_format != RGB:
            for step in [*self.eager, *self.deferred]:
                _check_takes(step, pixel_format)
        # NoOp accepts boxes, which albumentations requires of at least one transform.
        chain = [*self.eager, A.NoOp(p=0)]
        self.compose = A.Compose(
            chain, bbox_params=A.BboxParams(format="albumentations"), is_check_shapes=False, strict=True
        )
        # The default filter looks at each transform separately, and with its checks takes a tenth of the time per sample.
        processor = self.compose.processors["bboxes"]
        processor.filter = self._keep_visible
        processor.check = _accept

    def resized_to(self, side: int) -> Pipeline:
        """Return the same chain with `side` px as the shorter side of its `ResizeShortestSide`; one is appended if there is none.

        The longer side may have the same share of the shorter one as before.
        """
        steps = [step.to_side(side) if isinstance(step, ResizeShortestSide) else step for step in self.transforms]
        if not any(isinstance(step, ResizeShortestSide) for step in steps):
            steps.append(ResizeShortestSide([side], MAX_ASPECT * side))
        return Pipeline(steps, self.min_visibility, self.min_area, self.pixel_format)

    def __call__(
        self, pixels: np.ndarray, boxes: np.ndarray, labels: np.ndarray, key: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Transform one image, deferred transforms included.

        Args:
            pixels: [h, w, C], in the pipeline's format.
            boxes: f64 [G, 4] xyxy, original frame.
            labels: i64 [G].
            key: seed of all random choices.

        Returns:
            Pixels, boxes and labels in the input frame.
        """
        height, width = pixels.shape[:2]
        pixels, boxes, labels, last = self.prepare((height, width), boxes, labels, lambda least: pixels, key)
        out = np.empty((*last.size, pixels.shape[2]), np.float32 if last.returns_float else pixels.dtype)
        last.apply(pixels, out)
        return out, boxes, labels

    def prepare(
        self,
        size: Size,
        boxes: np.ndarray,
        labels: np.ndarray,
        read: ReadPixels,
        key: tuple[int, ...],
        draw_scene: DrawScene | None = None,
        step_key: tuple[int, ...] = (0,),
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, FlipResize]:
        """Transform one image except for the pixels of the deferred flip and resize.

        Args:
            size: (h, w) in the original frame.
            boxes: f64 [G, 4] xyxy, original frame; clipped to the image.
            labels: i64 [G].
            read: decodes the pixels; called once, with the least size that is needed.
            key: seed of all random choices, such as (seed, epoch, index).
            draw_scene: draws another image for `Mixing` transforms.
            step_key: seed of the choices that all images of a step have in common, such as (seed, step).

        Returns:
            Pixels ([h, w, C] in the pipeline's format or f32), boxes (f32 [G, 4], input frame, positive sides) and labels (i64 [G]) of the
            objects that are left, and the flip and resize that the pixels still need.

        Raises:
            ValueError: the transforms return another dtype or shape, or mix images without `draw_scene`.
        """
        # One pair of generators for the whole chain. albumentations 2.0.8's set_random_seed gives every transform the
        # same numbers (two flips would always agree), and its own seeding the same numbers to every worker.
        words = np.random.SeedSequence(key).generate_state(4)
        random_state = random.Random(words.tobytes())
        for each in self._drawn_per_step:
            each.draw_side_of_step(step_key)
        pixels: np.ndarray | None = None
        visible = np.ones(len(boxes))
        if self.mixing:
            scene = self._mix(Scene(read(None), boxes, labels, visible), draw_scene, random_state)
            size, pixels, boxes, labels, visible = scene.size, scene.pixels, scene.boxes, scene.labels, scene.visible
        # Relative coordinates in float64: a change of scale leaves them exactly as they are.
        # Columns: x1, y1, x2, y2, row, visible fraction of the area.
        table = np.column_stack([boxes / (size[1], size[0], size[1], size[0]), np.arange(len(boxes)), visible])
        table = self._keep_visible(table)
        if self.eager:
            self.compose.set_random_state(np.random.default_rng(words), random_state)
            result = self.compose(image=read(None) if pixels is None else pixels, bboxes=table)
            pixels, table = self._checked(result["image"]), result["bboxes"]
            size = pixels.shape[:2]
        else:
            random_state.random()  # as Compose does, so that the draws do not depend on which transforms are deferred
        last = self._draw_flip_resize(size, random_state)
        pixels = read(last.size) if pixels is None else pixels
        moved = last.apply_to_boxes(table[:, :4])
        sides = moved[:, 2:] - moved[:, :2]
        keep = (sides > 0).all(axis=1) & (sides.prod(axis=1) >= self.min_area)
        return pixels, moved[keep], labels[table[keep, 4].astype(np.int64)], last

    def _mix(self, scene: Scene, draw_scene: DrawScene | None, random_state: random.Random) -> Scene:
        for step in self.mixing:
            if random_state.random() < step.p:
                if draw_scene is None:
                    raise ValueError(
                        f"{type(step).__name__}: expected images of a data set, got a single one. Use it in training only."
                    )
                others = [draw_scene(random_state) for _ in range(step.num_others)]
                scene = step(scene, others, random_state)
        return scene

    def _checked(self, pixels: np.ndarray) -> np.ndarray:
        channels = self.pixel_format.channels
        if pixels.dtype != self.dtype or pixels.ndim != 3 or pixels.shape[2] != channels:
            found = f"{pixels.dtype} {list(pixels.shape)}"
            raise ValueError(
                f"transforms: expected {self.dtype} [h, w, {channels}] at the end, got {found}. Leave normalization to the model."
            )
        return pixels

    def check_resize_is_last(self) -> None:
        """Refuse a chain whose resize cannot be deferred to the device.

        Raises:
            ValueError: a resize is followed by other transforms than horizontal flips, or is not `ResizeShortestSide`.
        """
        for number, step in enumerate(self.eager):
            if isinstance(step, _Resizing):
                after = ", ".join(type(other).__name__ for other in [*self.eager[number + 1 :], *self.deferred])
                raise ValueError(
                    f"data.resize_on=device: expected ResizeShortestSide at the end of the transforms, followed by HorizontalFlip "
                    f"at most, got {type(step).__name__}, then {after or 'nothing'}. Change the order or set data.resize_on=worker."
                )

    def largest(self, size: Size) -> Size:
        """Return the largest (h, w) to which the deferred resize may bring an image of `size`."""
        for step in self.deferred:
            if isinstance(step, ResizeShortestSide):
                size = resized_size(size, max(step.sides), step.max_side, step.rounding)
        return size

    def _draw_flip_resize(self, size: Size, random_state: random.Random) -> FlipResize:
        """Draw the deferred transforms with the random numbers that albumentations would use."""
        last = FlipResize(size)
        for step in self.deferred:
            step.py_random = random_state
            drawn = step.should_apply()
            if isinstance(step, ResizeShortestSide):
                size = step.draw_size(size) if drawn else size
                last = replace(last, size=size, backend=step.backend, antialias=step.antialias)
            elif drawn:
                last = replace(last, flip=not last.flip)
        return last

    def _keep_visible(self, table: np.ndarray, shape: Any = None) -> np.ndarray:
        """Clip the boxes to the image and drop those below `min_visibility`; called after every transform."""
        clipped = np.clip(table[:, :4], 0, 1)
        sides = clipped[:, 2:] - clipped[:, :2]
        inside = (sides > 0).all(axis=1)  # False for NaN
        table, clipped, sides = table[inside], clipped[inside], sides[inside]
        visible = table[:, 5] * sides.prod(axis=1) / (table[:, 2:4] - table[:, :2]).prod(axis=1)
        return np.column_stack([clipped, table[:, 4], visible])[(visible >= self.min_visibility) & (visible > 0)]


def input_sizes(sizes: np.ndarray, transform: Pipeline) -> np.ndarray:
    """(h, w) of every image after the transforms, which run once for each distinct size."""
    distinct, where = np.unique(sizes, axis=0, return_inverse=True)
    no_boxes, no_labels = np.zeros((0, 4)), np.zeros(0, np.int64)
    channels, dtype = transform.pixel_format.channels, transform.pixel_format.dtype
    transformed = [
        transform(np.zeros((*size, channels), dtype), no_boxes, no_labels, (0,))[0].shape[:2]
        for size in distinct.tolist()
    ]
    return np.array(transformed, dtype=np.int64).reshape(-1, 2)[where.reshape(-1)]


def _split(transforms: Sequence[Any]) -> tuple[list[Mixing], list[Any], list[Any]]:
    """Split a chain into mixing, eager and deferred transforms (horizontal flips and one ResizeShortestSide at the end)."""
    mixing = list(takewhile(lambda step: isinstance(step, Mixing), transforms))
    eager, deferred = list(transforms[len(mixing) :]), list[Any]()
    late = [type(step).__name__ for step in eager if isinstance(step, Mixing)]
    if late:
        raise ValueError(
            f"transforms: expected {', '.join(late)} before all others, got it after {type(eager[0]).__name__}. Change the order."
        )
    while eager:
        if isinstance(eager[-1], ResizeShortestSide):
            if any(isinstance(step, ResizeShortestSide) for step in deferred):
                break
        elif type(eager[-1]) is not A.HorizontalFlip:
            break
        deferred.insert(0, eager.pop())
    return mixing, eager, deferred


def _check_takes(step: Any, pixel_format: PixelFormat) -> None:
    """Refuse a transform that does not take images of a format other than RGB, as a trial shows.

    Raises:
        ValueError: it fails, changes dtype or channels, clips the values, or changes colors of more than 8 bits: for
            those albumentations has other ranges.
    """
    name = type(step).__name__
    if isinstance(step, _Resizing) and step.backend == "pil":
        raise ValueError(f"{name}: expected backend cv2 or torch_float for {pixel_format}, got pil. Use backend=cv2.")
    if pixel_format.dtype != "uint8":
        for leaf in _leaves(step):
            if isinstance(leaf, A.ImageOnlyTransform) and not isinstance(leaf, Normalize):
                raise ValueError(
                    f"{type(leaf).__name__}: expected images of 8 bits, which colors are changed for, got {pixel_format}. "
                    "Use transforms of the geometry only."
                )
    high = 256 if pixel_format.dtype == "uint8" else 1000
    values = np.random.default_rng(0).integers(0, high, (64, 64, pixel_format.channels)).astype(pixel_format.dtype)
    for seed in range(TRIALS):
        try:
            found = A.Compose([step], seed=seed)(image=values)["image"]
            if found.ndim != 3 or found.shape[2] != pixel_format.channels:
                raise ValueError(f"it gives {list(found.shape)}")
            if found.max() <= 1 and not any(isinstance(leaf, Normalize) for leaf in _leaves(step)):
                raise ValueError("it clips the values")
        except Exception as error:  # transforms may raise anything
            reason = (" ".join(str(error).split()) or type(error).__name__)[:150]
            raise ValueError(
                f"{name}: expected a transform that takes {pixel_format}, got one that does not ({reason}). Leave it out."
            ) from None


def _leaves(step: Any) -> list[Any]:
    """The transforms within a composition; a transform itself."""
    return [leaf for inner in step.transforms for leaf in _leaves(inner)] if isinstance(step, A.BaseCompose) else [step]


def _accept(table: np.ndarray, shape: Any) -> None:
    """Replace albumentations' check of boxes, which `_keep_visible` makes redundant."""


class Normalize(A.ImageOnlyTransform):
    """Normalize pixels to (x / 255 - mean) / std before they are resized, as torchvision does.

    Set the model's own mean to 0 and standard deviation to 1. In exact arithmetic the order of normalizing and resizing
    makes no difference; in float32 it changes the last bits, and so the order of equal scores.

    Args:
        mean: of the channels, in 0..1.
        std: standard deviation of the channels, in 0..1.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], p: float = 1.0) -> None:
        super().__init__(p=p)
        self.mean, self.std = np.array(mean, np.float32), np.array(std, np.float32)

    def apply(self, img: np.ndarray, **params: Any) -> np.ndarray:
        return (img.astype(np.float32) / np.float32(255) - self.mean) / self.std


class _Resizing(A.DualTransform):
    """Base of the resizing transforms: their backend and antialiasing, checked."""

    def __init__(self, backend: Backend, antialias: bool | None, p: float) -> None:
        super().__init__(p=p)
        name = type(self).__name__
        if backend not in ("cv2", "pil", "torch_float"):
            raise ValueError(f"{name}: expected backend cv2, pil or torch_float, got {backend!r}.")
        if backend == "pil" and antialias is False:
            raise ValueError(
                f"{name}: pil always antialiases, got antialias=False. Use backend=cv2, or leave antialias out."
            )
        self.backend = backend
        self.antialias = backend == "pil" if antialias is None else antialias


class ResizeShortestSide(_Resizing):
    """Resize the shorter side to one of `sides`, drawn uniformly, and the longer side to at most `max_side`.

    Images of different sides are padded to the largest in their batch. `per_step` draws one side for all images of a training step, on all
    ranks: nearly no padding, and no rank waits for another with larger images.

    Args:
        sides: candidates for the shorter side, px.
        max_side: upper bound of the longer side, px.
        rounding: of the other side; torchvision uses `floor`.
        backend: `cv2`, `pil`, or `torch_float`, which returns unrounded float32 values as torchvision does.
        antialias: average when shrinking. None is True for pil, which always does, and False for the others.
        p: probability.
        per_step: draw a side for a step, by (seed, step), instead of one for each image.
    """

    def __init__(
        self,
        sides: Sequence[int],
        max_side: int,
        rounding: Rounding = "round",
        backend: Backend = "cv2",
        antialias: bool | None = None,
        p: float = 1.0,
        per_step: bool = False,
    ) -> None:
        super().__init__(backend, antialias, p)
        self.sides, self.max_side = list(sides), max_side
        self.per_step = per_step
        self._side_of_step = max(self.sides, default=0)
        self.rounding: Rounding = rounding
        if not self.sides or min(self.sides) < 1 or max(self.sides) > max_side:
            raise ValueError(f"ResizeShortestSide: expected sides in 1..max_side={max_side}, got {self.sides}.")
        if rounding not in ("round", "floor"):
            raise ValueError(f"ResizeShortestSide: expected rounding round or floor, got {rounding!r}.")

    def to_side(self, side: int) -> ResizeShortestSide:
        """Return the same transform with `side` px as the only shorter side, and a longer side in proportion."""
        max_side = round(side * self.max_side / max(self.sides))
        return ResizeShortestSide([side], max_side, self.rounding, self.backend, self.antialias, self.p)

    def draw_side_of_step(self, key: tuple[int, ...]) -> None:
        """Draw the side of all images of a step; with `per_step`, the following images get it."""
        self._side_of_step = int(np.random.default_rng(key).choice(self.sides))

    def draw_size(self, size: Size) -> Size:
        """Draw the size that an image of `size` is resized to."""
        side = self._side_of_step if self.per_step else self.py_random.choice(self.sides)
        return resized_size(size, side, self.max_side, self.rounding)

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        return {"size": self.draw_size(params["shape"][:2])}

    def apply(self, img: np.ndarray, size: tuple[int, int], **params: Any) -> np.ndarray:
        return resize(img, size, self.backend, self.antialias)

    def apply_to_bboxes(self, bboxes: np.ndarray, **params: Any) -> np.ndarray:
        return bboxes  # relative coordinates


class LargeScaleJitter(_Resizing):
    """Fit the image into `size`, times a random scale, and crop a random window of `size` (Copy-Paste, appendix A).

    An image smaller than `size` is not padded here: the batch pads it, and the model masks that padding.

    Args:
        size: (h, w) of the window, px.
        scale_range: (low, high) of the uniformly drawn scale; 1 fits the image into `size`.
        backend: as of `ResizeShortestSide`.
        antialias: as of `ResizeShortestSide`.
        p: probability.
    """

    def __init__(
        self,
        size: Sequence[int],
        scale_range: Sequence[float] = (0.1, 2.0),
        backend: Backend = "cv2",
        antialias: bool | None = None,
        p: float = 1.0,
    ) -> None:
        super().__init__(backend, antialias, p)
        self.size, self.scale_range = tuple(size), tuple(scale_range)
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"LargeScaleJitter: expected size (h, w) in px, got {self.size}.")
        if len(self.scale_range) != 2 or not 0 < self.scale_range[0] <= self.scale_range[1]:
            raise ValueError(
                f"LargeScaleJitter: expected scale_range (low, high) with 0 < low <= high, got {self.scale_range}."
            )

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        height, width = params["shape"][:2]
        scale = min(self.size[0] / height, self.size[1] / width) * self.py_random.uniform(*self.scale_range)
        resized = max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)
        window = min(resized[0], self.size[0]), min(resized[1], self.size[1])
        top = self.py_random.randint(0, resized[0] - window[0])
        left = self.py_random.randint(0, resized[1] - window[1])
        return {"resized": resized, "window": (top, left, *window)}

    def apply(self, img: np.ndarray, resized: tuple[int, int], window: tuple[int, ...], **params: Any) -> np.ndarray:
        top, left, height, width = window
        return resize(img, resized, self.backend, self.antialias)[top : top + height, left : left + width]

    def apply_to_bboxes(
        self, bboxes: np.ndarray, resized: tuple[int, int], window: tuple[int, ...], **params: Any
    ) -> np.ndarray:
        top, left, height, width = window
        moved = bboxes.copy()
        moved[:, [0, 2]] = (bboxes[:, [0, 2]] * resized[1] - left) / width
        moved[:, [1, 3]] = (bboxes[:, [1, 3]] * resized[0] - top) / height
        return moved
