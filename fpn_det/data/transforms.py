"""Augmentation: albumentations behind one adapter, and the geometry that it lacks. The only importer of albumentations.

Here the frame changes, once: what goes in is in the original frame, what comes out in the input frame. Pixels are uint8
all the way (float32 after `Normalize` or a resize by `torch_float`), in 0..255; the model normalizes them on the device.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import numpy as np

from fpn_det.data.mixing import Mixing, Scene
from fpn_det.data.resizing import Backend, Plan, Rounding, Size, resize, resized_size

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else the import asks the network for a newer version
import albumentations as A


@dataclass(frozen=True)
class Original:
    """An image of the original frame, and what is drawn on it. Its pixels are read when they are needed."""

    size: Size
    boxes: np.ndarray  # f64 [G, 4] xyxy; what lies outside is clipped
    labels: np.ndarray  # i64 [G]
    read: Callable[[Size | None], np.ndarray]  # u8 [h, w, 3] RGB, in full, or reduced to no less than this
    other: Callable[[random.Random], Original] | None = None  # draws another image of the same data set

    def scene(self) -> Scene:
        """What was drawn, all of it visible."""
        return Scene(self.read(None), self.boxes, self.labels, np.ones(len(self.boxes)))


@dataclass(frozen=True)
class Prepared:
    """An image after its transforms but for the last moves, and its boxes after them all."""

    pixels: np.ndarray  # u8 or f32 [h, w, 3] RGB
    plan: Plan
    boxes: np.ndarray  # f32 [G, 4], input frame
    labels: np.ndarray  # i64 [G]


class Pipeline:
    """A chain of albumentations transforms, seeded for each sample, that keeps boxes and labels together.

    Inside, a box carries its row number instead of its label: so labels stay integers, whatever the chain does. The last
    flips and the last ResizeShortestSide of the chain are drawn and applied to the boxes, but only planned for the pixels.

    Args:
        transforms: any of albumentations' transforms or compositions that leave uint8 RGB, in their order; those that mix
            several images first.
        min_visibility: a box goes when a smaller share of its area is left, after all cuts together; in [0, 1].
        min_area: a box smaller than this in the input frame goes; px^2.
    """

    def __init__(self, transforms: Sequence[Any], min_visibility: float = 0.0, min_area: float = 1.0) -> None:
        self.min_visibility = min_visibility
        self.min_area = min_area
        self.mixing, self.head, self.tail = _split(transforms)
        in_float = any(
            isinstance(step, Normalize) or getattr(step, "backend", "") == "torch_float" for step in self.head
        )
        self.dtype = np.dtype(np.float32 if in_float else np.uint8)  # after the head
        # the no-op takes boxes, which albumentations asks of at least one transform
        chain = [*self.head, A.NoOp(p=0)]
        self.compose = A.Compose(
            chain, bbox_params=A.BboxParams(format="albumentations"), is_check_shapes=False, strict=True
        )
        # Its own filter looks at one transform at a time, and with its checks takes a tenth of the time of a sample.
        processor = self.compose.processors["bboxes"]
        processor.filter = self._keep_visible
        processor.check = _trust

    def __call__(
        self, pixels: np.ndarray, boxes: np.ndarray, labels: np.ndarray, key: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Transform one image: u8 [h, w, 3] RGB, its boxes and labels. Returns the three in the input frame, as `prepare` does."""
        height, width = pixels.shape[:2]
        prepared = self.prepare(Original((height, width), boxes, labels, lambda least: pixels), key)
        out = np.empty((*prepared.plan.size, 3), np.float32 if prepared.plan.gives_float else prepared.pixels.dtype)
        prepared.plan.lay(prepared.pixels, out)
        return out, prepared.boxes, prepared.labels

    def prepare(self, original: Original, key: tuple[int, ...]) -> Prepared:
        """Transform one image, but leave the last moves to whoever lays it on a canvas.

        Args:
            original: the image.
            key: what all random choices follow from, such as (seed, epoch, index).

        Returns:
            Boxes with positive sides, without those that left the image.
        """
        # One pair of generators for the whole chain. albumentations 2.0.8's set_random_seed gives every transform the
        # same numbers (two flips would always agree), and its own seeding the same numbers to every worker.
        words = np.random.SeedSequence(key).generate_state(4)
        random_state = random.Random(words.tobytes())
        size, pixels = original.size, None
        boxes, labels, visible = original.boxes, original.labels, np.ones(len(original.boxes))
        if self.mixing:
            scene = self._mix(original, random_state)
            size, pixels, boxes, labels, visible = scene.size, scene.pixels, scene.boxes, scene.labels, scene.visible
        # Relative coordinates in float64: a change of scale then leaves them as they are, to the bit.
        # Columns: x1, y1, x2, y2, row, share of the area that is still visible.
        table = np.column_stack([boxes / (size[1], size[0], size[1], size[0]), np.arange(len(boxes)), visible])
        table = self._keep_visible(table)
        if self.head:
            self.compose.set_random_state(np.random.default_rng(words), random_state)
            result = self.compose(image=original.read(None) if pixels is None else pixels, bboxes=table)
            pixels, table = result["image"], result["bboxes"]
            if pixels.dtype != self.dtype or pixels.ndim != 3 or pixels.shape[2] != 3:
                found = f"{pixels.dtype} {list(pixels.shape)}"
                raise ValueError(
                    f"transforms: expected {self.dtype} [h, w, 3] at the end, got {found}. Leave normalizing to the model."
                )
            size = pixels.shape[:2]
        else:
            random_state.random()  # as Compose does: the numbers drawn do not depend on which moves are planned
        plan = self._plan(size, random_state)
        pixels = original.read(plan.size) if pixels is None else pixels
        corners = table[:, :4]
        if plan.flip:
            corners = np.column_stack([1 - corners[:, 2], corners[:, 1], 1 - corners[:, 0], corners[:, 3]])
        height, width = plan.size
        boxes = (corners * (width, height, width, height)).astype(np.float32)
        sides = boxes[:, 2:] - boxes[:, :2]
        keep = (sides > 0).all(axis=1) & (sides.prod(axis=1) >= self.min_area)
        return Prepared(pixels, plan, boxes[keep], labels[table[keep, 4].astype(np.int64)])

    def _mix(self, original: Original, random_state: random.Random) -> Scene:
        scene = original.scene()
        for step in self.mixing:
            if random_state.random() < step.p:
                if original.other is None:
                    raise ValueError(
                        f"{type(step).__name__}: expected images of a data set, got a single one. Leave it to training."
                    )
                others = [original.other(random_state).scene() for _ in range(step.num_others)]
                scene = step(scene, others, random_state)
        return scene

    def check_resize_is_last(self) -> None:
        """Refuse a chain of which the resize cannot be planned.

        Raises:
            ValueError: it is followed by more than flips, or it is one of those that are not planned.
        """
        for number, step in enumerate(self.head):
            if isinstance(step, _Resizing):
                after = ", ".join(type(other).__name__ for other in [*self.head[number + 1 :], *self.tail])
                raise ValueError(
                    f"data.resize_on=device: expected ResizeShortestSide at the end of the transforms, with HorizontalFlip at most "
                    f"after it, got {type(step).__name__}, then {after or 'nothing'}. Change the order, or say data.resize_on=worker."
                )

    def largest(self, size: Size) -> Size:
        """What the planned resize makes of an image of this size at most."""
        for step in self.tail:
            if isinstance(step, ResizeShortestSide):
                size = resized_size(size, max(step.sides), step.max_side, step.rounding)
        return size

    def _plan(self, size: Size, random_state: random.Random) -> Plan:
        """Draw the moves of the tail, as albumentations would."""
        plan = Plan(size)
        for step in self.tail:
            step.py_random = random_state
            drawn = step.should_apply()
            if isinstance(step, ResizeShortestSide):
                size = step.draw_size(size) if drawn else size
                plan = replace(plan, size=size, backend=step.backend, antialias=step.antialias)
            elif drawn:
                plan = replace(plan, flip=not plan.flip)
        return plan

    def _keep_visible(self, table: np.ndarray, shape: Any = None) -> np.ndarray:
        """Clip the boxes to the image and drop those of which too little is left; after every transform."""
        clipped = np.clip(table[:, :4], 0, 1)
        sides = clipped[:, 2:] - clipped[:, :2]
        there = (sides > 0).all(axis=1)  # not where a coordinate is NaN
        table, clipped, sides = table[there], clipped[there], sides[there]
        visible = table[:, 5] * sides.prod(axis=1) / (table[:, 2:4] - table[:, :2]).prod(axis=1)
        return np.column_stack([clipped, table[:, 4], visible])[(visible >= self.min_visibility) & (visible > 0)]


def _split(transforms: Sequence[Any]) -> tuple[list[Mixing], list[Any], list[Any]]:
    """The steps that mix images, what follows, and the moves at the end that can be planned: flips, and one ResizeShortestSide."""
    mixing = list(takewhile(lambda step: isinstance(step, Mixing), transforms))
    head, tail = list(transforms[len(mixing) :]), list[Any]()
    late = [type(step).__name__ for step in head if isinstance(step, Mixing)]
    if late:
        raise ValueError(
            f"transforms: expected {', '.join(late)} before all others, got it after {type(head[0]).__name__}. Change the order."
        )
    while head:
        if isinstance(head[-1], ResizeShortestSide):
            if any(isinstance(step, ResizeShortestSide) for step in tail):
                break
        elif type(head[-1]) is not A.HorizontalFlip:
            break
        tail.insert(0, head.pop())
    return mixing, head, tail


def _trust(table: np.ndarray, shape: Any) -> None:
    """In place of albumentations' check: `_keep_visible` has made the boxes valid."""


class Normalize(A.ImageOnlyTransform):
    """Give pixels mean 0 and deviation 1 before they are resized, as torchvision does; the model's own are then 0 and 1.

    In exact numbers the order makes no difference. In float32 it moves the last bits, and so the order of equal scores.

    Args:
        mean, std: of the three channels, of 0..1.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], p: float = 1.0) -> None:
        super().__init__(p=p)
        self.mean, self.std = np.array(mean, np.float32), np.array(std, np.float32)

    def apply(self, img: np.ndarray, **params: Any) -> np.ndarray:
        return (img.astype(np.float32) / np.float32(255) - self.mean) / self.std


class _Resizing(A.DualTransform):
    """What the resizing transforms share: the way of resizing, checked."""

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
    """Resize so that the shorter side is one of `sides`, each as likely, and the longer at most `max_side`; px.

    Args:
        rounding: of the other side; torchvision's way is `floor`.
        backend: `cv2` or `pil`; `torch_float` does not round to whole values, as torchvision.
        antialias: average when shrinking; pil always does, the others by default do not.
    """

    def __init__(
        self,
        sides: Sequence[int],
        max_side: int,
        rounding: Rounding = "round",
        backend: Backend = "cv2",
        antialias: bool | None = None,
        p: float = 1.0,
    ) -> None:
        super().__init__(backend, antialias, p)
        self.sides, self.max_side, self.rounding = list(sides), max_side, rounding
        if not self.sides or min(self.sides) < 1 or max(self.sides) > max_side:
            raise ValueError(f"ResizeShortestSide: expected sides in 1..max_side={max_side}, got {self.sides}.")
        if rounding not in ("round", "floor"):
            raise ValueError(f"ResizeShortestSide: expected rounding round or floor, got {rounding!r}.")

    def draw_size(self, size: Size) -> Size:
        """What an image of `size` becomes."""
        return resized_size(size, self.py_random.choice(self.sides), self.max_side, self.rounding)

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        return {"size": self.draw_size(params["shape"][:2])}

    def apply(self, img: np.ndarray, size: tuple[int, int], **params: Any) -> np.ndarray:
        return resize(img, size, self.backend, self.antialias)

    def apply_to_bboxes(self, bboxes: np.ndarray, **params: Any) -> np.ndarray:
        return bboxes  # relative coordinates


class LargeScaleJitter(_Resizing):
    """Fit the image into `size`, times a random scale, and cut a random window of `size` from what is larger.

    What is smaller than `size` stays so: the batch is padded, and padding is not image. (Copy-Paste, appendix A)

    Args:
        size: (h, w) of the window, px.
        scale_range: the scale is drawn evenly from it; 1 fits.
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
