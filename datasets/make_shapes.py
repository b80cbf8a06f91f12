"""Draw a detection data set in COCO's layout: plain shapes of very different sizes on textured backgrounds.

Nothing is downloaded. Image i of a split is a function of (seed, split, i), so any number of workers draws the same
bytes. Objects span more than four octaves of size at 192 px, occlude one another and exceed the border. Soft blobs, thin
lines and open outlines between them are distractors without labels.

A shape is a list of closed contours (even-odd, so a second contour is a hole). It is drawn SUBSAMPLES times finer than
the image: the mean of the fine pixels is its coverage, and their extent its box. So a box is tight to a fraction of a pixel. It is
the box of the whole shape within the image, also where other shapes occlude it. A position that would leave an object
too little visible is rejected, so every visible object is labeled.

    python datasets/make_shapes.py --out datasets/shapes --train 3000 --val 300
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

VERSION = 3  # of the images; raised by any change of their bytes
SPLITS = ("train2017", "val2017")  # COCO's names, where data.root looks for them

SUBSAMPLES = 4  # fine pixels per pixel, along each axis
FIXED_POINT_BITS = 8  # of the coordinates that cv2 draws with

EMPTY_IMAGES = 0.08  # share of images without objects
MAX_OBJECTS = 16  # of an image
MIN_SIDE = 8.0  # of an object's longer side, px
MAX_SIDE = 5 / 6  # of an object's longer side, as a part of the image's shorter side
OVERHANG = 0.15  # of an object's width and height, that may lie outside the image
MAX_TILT = 0.4  # radians, either way
MAX_STRETCH = 0.15  # log of an object's stretch along one of its axes
MIN_VISIBLE = 0.75  # of an object's area, inside the image and not under other objects
MIN_CONTRAST = 70  # mean color distance of an object from its background, in gray levels of 255
PLACES = 8  # positions tried before an object is left out


def _spokes(corners: int, radii: Sequence[float] = (1.0,), start: float = -math.pi / 2) -> np.ndarray:
    """Corners [corners, 2] at equal angles, the first one up; their distances from the center are `radii` in turn."""
    angles = start + np.arange(corners) * (2 * math.pi / corners)
    return np.resize(radii, corners)[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


_QUARTER_OF_CROSS = np.array([(1, -0.32), (1, 0.32), (0.32, 0.32)])
_QUARTER_TURN = np.array([(0, 1), (-1, 0)])  # points are rows

CONTOURS = {
    "disk": [_spokes(64)],
    "square": [_spokes(4, start=math.pi / 4)],
    "triangle": [_spokes(3)],
    "star": [_spokes(10, (1.0, 0.42))],
    "cross": [np.concatenate([_QUARTER_OF_CROSS @ np.linalg.matrix_power(_QUARTER_TURN, turns) for turns in range(4)])],
    "ring": [_spokes(64), 0.55 * _spokes(64)],
}


@dataclass(frozen=True)
class Settings:
    """Settings that determine the images."""

    num_train: int
    num_val: int
    size: tuple[int, int]  # (h, w) of every image
    seed: int
    class_names: tuple[str, ...]
    max_side: float | None = None  # of an object's longer side, px; None = MAX_SIDE of the image
    version: int = VERSION

    def __post_init__(self) -> None:
        unknown = [name for name in self.class_names if name not in CONTOURS]
        if unknown or not self.class_names or len(set(self.class_names)) < len(self.class_names):
            raise ValueError(
                f"make_shapes: expected different classes out of {', '.join(CONTOURS)}, got {', '.join(self.class_names) or 'none'}."
            )
        if self.max_side is not None and not MIN_SIDE < self.max_side <= min(self.size) * MAX_SIDE:
            raise ValueError(
                f"make_shapes: expected a largest side between {MIN_SIDE:g} and {min(self.size) * MAX_SIDE:.0f} px, got {self.max_side:g}."
            )
        if min(self.size) * MAX_SIDE <= MIN_SIDE:
            raise ValueError(
                f"make_shapes: expected sides above {MIN_SIDE / MAX_SIDE:.0f} px, got {self.size[0]}x{self.size[1]}."
            )
        if min(self.num_train, self.num_val) < 0:
            raise ValueError(f"make_shapes: expected counts of images from 0, got {self.num_train} and {self.num_val}.")

    def to_json(self) -> str:
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return json.dumps(given, indent=2) + "\n"


@dataclass(frozen=True)
class Stamp:
    """A shape at its position: its coverage of each pixel in a window of the image."""

    window: tuple[slice, slice]  # rows, columns
    coverage: np.ndarray  # f32 in 0..1, of the window
    box: tuple[float, float, float, float]  # xyxy, px
    area: float  # px^2, inside the image


def draw_stamp(contours: list[np.ndarray], size: tuple[int, int]) -> Stamp:
    """Rasterize contours in px that lie at least partly inside an image of `size` (h, w)."""
    points = np.concatenate(contours)
    low, high = np.floor(points.min(axis=0)).astype(int), np.ceil(points.max(axis=0)).astype(int)
    left, top = np.maximum(low, 0).tolist()
    right, bottom = np.minimum(high, size[::-1]).tolist()
    whole = np.zeros((high - low)[::-1] * SUBSAMPLES, np.uint8)
    # cv2 counts from the center of the first pixel, we count from its corner
    corners = [((contour - low) * SUBSAMPLES - 0.5) * (1 << FIXED_POINT_BITS) for contour in contours]
    cv2.fillPoly(whole, [np.round(contour).astype(np.int32) for contour in corners], 255, shift=FIXED_POINT_BITS)
    rows = slice((top - low[1]) * SUBSAMPLES, (bottom - low[1]) * SUBSAMPLES)
    columns = slice((left - low[0]) * SUBSAMPLES, (right - low[0]) * SUBSAMPLES)
    fine = whole[rows, columns]  # cut only now: cv2 draws edges that leave its image inexactly
    coverage = cv2.resize(fine, (right - left, bottom - top), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    x, y, width, height = (side / SUBSAMPLES for side in cv2.boundingRect(fine))
    return Stamp(
        (slice(top, bottom), slice(left, right)),
        coverage,
        (left + x, top + y, left + x + width, top + y + height),
        cv2.countNonZero(fine) / SUBSAMPLES**2,
    )


def pose(name: str, side: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Return the contours of a class, stretched and rotated at random; their box starts at (0, 0), its longer side is `side`."""
    stretch = math.exp(rng.uniform(-MAX_STRETCH, MAX_STRETCH))
    angle = rng.uniform(-MAX_TILT, MAX_TILT)
    turn = np.array([(math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))])
    contours = [contour * (stretch, 1 / stretch) @ turn for contour in CONTOURS[name]]
    low, high = contours[0].min(axis=0), contours[0].max(axis=0)  # the first contour is the outer one
    scale = side / (high - low).max()
    return [(contour - low) * scale for contour in contours]


def texture(rng: np.random.Generator, size: tuple[int, int], strength: float) -> np.ndarray:
    """Return random color variation around 0, smooth on several scales, f32 [h, w, 3]."""
    result = np.zeros((*size, 3), np.float32)
    for cells in (3, 9, 30):
        grid = rng.standard_normal((cells, cells, 3), dtype=np.float32) * (strength * rng.uniform())
        result += cv2.resize(grid, size[::-1], interpolation=cv2.INTER_LINEAR)
    return result


def draw_ground(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Return a background without objects, u8 [h, w, 3]: a textured color, often striped, with soft blobs."""
    rough = (
        math.ceil(size[0] / 2),
        math.ceil(size[1] / 2),
    )  # half as fine: all of it is smooth, and it costs a quarter
    rows, columns = np.arange(rough[0], dtype=np.float32)[:, None], np.arange(rough[1], dtype=np.float32)
    ground = texture(rng, rough, strength=15) + rng.uniform(30, 225, 3).astype(np.float32)
    if rng.uniform() < 0.4:
        angle, period = rng.uniform(0, math.pi), math.exp(rng.uniform(math.log(3), math.log(24)))
        phase = (columns * math.cos(angle) + rows * math.sin(angle)) * (2 * math.pi / period)
        ground += np.sin(phase)[..., None] * rng.uniform(-15, 15, 3).astype(np.float32)
    for _ in range(rng.integers(0, 4)):
        (y, x), (height, width) = rng.uniform(0, rough).tolist(), (rng.uniform(0.02, 0.15, 2) * min(rough)).tolist()
        blob = np.exp(-0.5 * ((rows - y) / height) ** 2) * np.exp(-0.5 * ((columns - x) / width) ** 2)
        ground += blob[..., None] * rng.uniform(-50, 50, 3).astype(np.float32)
    return cv2.resize(np.clip(ground, 0, 255).astype(np.uint8), size[::-1], interpolation=cv2.INTER_LINEAR)


def draw_strokes(canvas: np.ndarray, rng: np.random.Generator) -> None:
    """Scribble lines and unclosed outlines of the classes on the canvas (u8), in place, as distractors without labels."""
    size = np.array(canvas.shape[1::-1])
    for _ in range(rng.integers(0, 4)):
        if rng.uniform() < 0.5:
            points = rng.uniform(0, size, (rng.integers(2, 5), 2))
        else:
            side = min(size) * math.exp(rng.uniform(math.log(0.08), math.log(0.7)))
            outline = pose(rng.choice(list(CONTOURS)), side, rng)[0]
            kept = math.ceil(len(outline) * rng.uniform(0.5, 0.8))  # a gap of a fifth or more keeps it open
            points = outline[:kept] + rng.uniform(-0.2 * side, size - 0.8 * side)
        color, thickness = rng.uniform(0, 255, 3).tolist(), int(rng.integers(1, 4))
        cv2.polylines(canvas, [np.round(points * 16).astype(np.int32)], False, color, thickness, cv2.LINE_AA, shift=4)


def paint(canvas: np.ndarray, stamp: Stamp, rng: np.random.Generator) -> None:
    """Fill a stamp on the canvas (u8), in place, with a textured color that contrasts with the canvas."""
    patch = canvas[stamp.window]
    under = cv2.mean(patch, (stamp.coverage >= 0.5).astype(np.uint8))[:3]
    color = rng.uniform(0, 255, 3)
    while np.abs(color - under).mean() < MIN_CONTRAST:
        color = rng.uniform(0, 255, 3)
    fill = texture(rng, stamp.coverage.shape, strength=rng.uniform(0, 12)) + color.astype(np.float32)
    canvas[stamp.window] = cv2.blendLinear(
        np.clip(fill, 0, 255).astype(np.uint8), patch, stamp.coverage, 1 - stamp.coverage
    )


def place_objects(
    rng: np.random.Generator, size: tuple[int, int], class_names: Sequence[str], max_side: float | None = None
) -> list[tuple[int, Stamp]]:
    """Choose objects and their positions, as (label, stamp) from the lowest to the topmost.

    Larger ones lie lower. Sides are uniform in their logarithm. Of each object, MIN_VISIBLE of its area is inside the
    image, and MIN_VISIBLE of that is not covered by later ones.
    """
    count = 0 if rng.uniform() < EMPTY_IMAGES else rng.integers(1, MAX_OBJECTS + 1)
    sides = np.exp(rng.uniform(math.log(MIN_SIDE), math.log(max_side or MAX_SIDE * min(size)), count))
    topmost = np.full(size, count)  # index of the object on top, `count` for the ground
    objects: list[tuple[int, Stamp]] = []
    pixels = visible = np.zeros(0, np.int64)  # of each object
    for side in np.sort(sides)[::-1]:
        label = int(rng.integers(len(class_names)))
        contours = pose(class_names[label], side, rng)
        extent = contours[0].max(axis=0)
        area = abs(cv2.contourArea(contours[0].astype(np.float32))) - sum(
            abs(cv2.contourArea(hole.astype(np.float32))) for hole in contours[1:]
        )
        for _ in range(PLACES):
            corner = rng.uniform(-OVERHANG * extent, np.array(size[::-1]) - (1 - OVERHANG) * extent)
            stamp = draw_stamp([contour + corner for contour in contours], size)
            mask = stamp.coverage >= 0.5
            left = visible - np.bincount(topmost[stamp.window][mask], minlength=count + 1)[: len(visible)]
            if stamp.area >= MIN_VISIBLE * area and (left >= MIN_VISIBLE * pixels).all():
                topmost[stamp.window][mask] = len(objects)
                objects.append((label, stamp))
                pixels, visible = np.append(pixels, mask.sum()), np.append(left, mask.sum())
                break
    return objects


def draw_scene(
    rng: np.random.Generator, size: tuple[int, int], class_names: Sequence[str], max_side: float | None = None
) -> tuple[np.ndarray, list[tuple[int, Stamp]]]:
    """Return one image, u8 [h, w, 3], and its objects as (label, stamp)."""
    canvas = draw_ground(rng, size)
    draw_strokes(canvas, rng)
    objects = place_objects(rng, size, class_names, max_side)
    for _, stamp in objects:
        paint(canvas, stamp, rng)
    light = cv2.resize(
        rng.integers(140, 220, (2, 2, 1), np.uint8).repeat(3, axis=2), size[::-1], interpolation=cv2.INTER_LINEAR
    )
    noise, strength = rng.integers(0, 256, canvas.shape, np.uint8), rng.uniform(0, 0.05)
    return cv2.addWeighted(cv2.multiply(canvas, light, scale=1 / 200), 1, noise, strength, -127.5 * strength), objects


def _write_image(
    index: int, split: str, folder: Path, settings: Settings
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Draw image `index` of a split into `folder` and return its records, those of objects without ids."""
    cv2.setNumThreads(1)  # the workers fill the cores
    rng = np.random.default_rng([settings.seed, SPLITS.index(split), index])
    pixels, objects = draw_scene(rng, settings.size, settings.class_names, settings.max_side)
    name, (height, width) = f"{split}_{index:06d}.jpg", settings.size
    if not cv2.imwrite(str(folder / name), pixels, [cv2.IMWRITE_JPEG_QUALITY, 92]):
        raise OSError(f"{folder / name}: cannot be written.")
    annotations = []
    for label, stamp in objects:
        x1, y1, x2, y2 = stamp.box
        box = [x1, y1, x2 - x1, y2 - y1]
        annotations.append(
            {"image_id": index + 1, "category_id": label + 1, "bbox": box, "area": stamp.area, "iscrowd": 0}
        )
    return {"id": index + 1, "file_name": name, "height": height, "width": width}, annotations


def _write_split(split: str, count: int, out: Path, settings: Settings, workers: int) -> None:
    folder = out / split
    folder.mkdir(parents=True)
    write = partial(_write_image, split=split, folder=folder, settings=settings)
    if workers == 1:
        rows = [write(index) for index in range(count)]
    else:
        with multiprocessing.Pool(workers) as pool:
            rows = pool.map(write, range(count), chunksize=32)
    annotations = [annotation for _, of_image in rows for annotation in of_image]
    content = {
        "images": [image for image, _ in rows],
        "annotations": [{"id": number, **annotation} for number, annotation in enumerate(annotations, start=1)],
        "categories": [{"id": number, "name": name} for number, name in enumerate(settings.class_names, start=1)],
    }
    path = out / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def make_shapes(
    out: str | Path,
    num_train: int = 3000,
    num_val: int = 300,
    size: tuple[int, int] = (192, 192),
    seed: int = 0,
    class_names: Sequence[str] = tuple(CONTOURS),
    workers: int = 1,
    max_side: float | None = None,
) -> bool:
    """Draw the data set into the folder `out`, which is created complete or not at all.

    Args:
        out: new, empty, or made by an earlier call with the same settings, which is then left as it is.
        size: (h, w) of every image, px.
        class_names: some of CONTOURS; category ids follow their order, from 1.
        workers: processes; they change nothing but the time.
        max_side: of an object's longer side, px; None = MAX_SIDE of the image's shorter side.

    Returns:
        Whether anything was drawn; False if it was there.

    Raises:
        ValueError: `out` holds something else, or a setting is impossible.
    """
    out = Path(out).resolve()
    settings = Settings(num_train, num_val, (size[0], size[1]), seed, tuple(class_names), max_side)
    made_with = out / "shapes.json"
    if made_with.exists():
        if made_with.read_text() == settings.to_json():
            return False
        raise ValueError(
            f"{out}: expected shapes made with these settings, got others (see {made_with.name}). Delete the folder or choose another."
        )
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: expected a new or empty folder, got one with other files. Choose another.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        unfinished = Path(scratch) / out.name
        for split, count in zip(SPLITS, (num_train, num_val), strict=True):
            _write_split(split, count, unfinished, settings, workers)
        (unfinished / made_with.name).write_text(settings.to_json())
        unfinished.replace(out)
    return True


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description="Draw shapes of many sizes as a COCO data set.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "shapes", help="folder to make")
    parser.add_argument("--train", type=int, default=3000, metavar="N", help="images to train on")
    parser.add_argument("--val", type=int, default=300, metavar="N", help="held-out images")
    parser.add_argument("--size", type=int, nargs=2, default=(192, 192), metavar=("H", "W"), help="of every image, px")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--classes", nargs="+", default=tuple(CONTOURS), metavar="NAME", help="which shapes")
    parser.add_argument("--max-side", type=float, metavar="PX", help="of an object; small ones in large images")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    options = parser.parse_args()
    start = time.perf_counter()
    try:
        made = make_shapes(
            options.out,
            options.train,
            options.val,
            tuple(options.size),
            options.seed,
            options.classes,
            options.workers,
            options.max_side,
        )
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    took = f"drawn in {time.perf_counter() - start:.1f} s" if made else "already there"
    print(f"{options.out}: {options.train} + {options.val} images, {took}.")


if __name__ == "__main__":
    main()
