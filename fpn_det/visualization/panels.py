"""Pictures to look at: what was drawn beside what was found, and a batch as the model sees it.

All are u8 [h, w, 3] RGB. A class has the same color everywhere, in every run.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fpn_det.evaluation.detection_table import DetectionTable
from fpn_det.image_io import read_image
from fpn_det.structures import Annotations, Batch

Picture = NDArray[np.uint8]

SIDE = 480  # px of the longer side of a picture; smaller images are enlarged, for the sake of their labels
FONT_SIZE = 13  # px
MOST_BOXES = 100  # that are drawn on an image
GAP = 6  # px between pictures
GREY = (40, 40, 40)


def some_images(annotations: Annotations, count: int) -> list[int]:
    """Always the same rows: spread evenly over the images with objects, or over all if none has any."""
    sizes = annotations.boxes_per_image.numpy()
    rows = np.flatnonzero(sizes) if sizes.any() else np.arange(len(sizes))
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)].tolist()


def draw_comparison(
    annotations: Annotations, detections: DetectionTable, row: int, min_score: float = 0.3, named: bool = True
) -> Picture:
    """Image `row` with its ground truth on the left, and with its best detections from `min_score` on the right.

    `named` says whether these have classes; proposals have none.
    """
    pixels, names = read_image(annotations.path(row)), annotations.class_names
    objects = annotations.rows(row)
    labels, crowd = annotations.labels[objects].tolist(), annotations.iscrowd[objects].tolist()
    texts = [names[label] + " (crowd)" * is_crowd for label, is_crowd in zip(labels, crowd, strict=True)]
    truth = draw_boxes(pixels, annotations.boxes[objects].numpy(), labels, texts)

    found = np.flatnonzero((detections.images == row) & (detections.scores >= min_score))[:MOST_BOXES]
    labels = detections.labels[found].tolist()
    texts = [
        f"{names[label]} {score:.2f}" if named else f"{score:.2f}"
        for label, score in zip(labels, detections.scores[found], strict=True)
    ]
    answer = draw_boxes(pixels, detections.boxes[found], labels, texts)
    return arrange([truth, answer], [f"{len(crowd)} objects", f"{len(found)} detections, score >= {min_score:g}"])


def draw_batch(batch: Batch, class_names: Sequence[str]) -> Picture:
    """Every image of a batch with its targets, in the input frame, padding included."""
    batch = batch.to("cpu")
    pictures, titles = [], []
    for pixels, size, boxes, labels, valid in zip(
        batch.pixels, batch.sizes.tolist(), batch.targets.boxes, batch.targets.labels, batch.targets.valid, strict=True
    ):
        ids = labels[valid].tolist()
        texts = [class_names[label] for label in ids]
        pictures.append(draw_boxes(as_picture(pixels), boxes[valid].numpy(), ids, texts))
        titles.append(f"{size[1]} x {size[0]} px, {len(ids)} objects")
    return arrange(pictures, titles)


def as_picture(pixels: Tensor) -> Picture:
    """u8 [H, W, 3] of pixels [3, H, W] in any range."""
    if pixels.min() < 0:  # normalized ones
        pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()) * 255
    return pixels.byte().permute(1, 2, 0).numpy()  # [3, H, W] -> [H, W, 3]


def draw_boxes(
    pixels: Picture, boxes: NDArray, labels: Sequence[int], texts: Sequence[str], side: int = SIDE
) -> Picture:
    """An image scaled to a longer side of `side`, with a frame and a text for every box, the first on top.

    Args:
        pixels: u8 [h, w, 3].
        boxes: [n, 4], xyxy in px of `pixels`.
        labels: [n], which decide on the colors.
        texts: [n].
        side: px.
    """
    scale = side / max(pixels.shape[:2])
    picture = Image.fromarray(scaled_to(pixels, side))
    size = picture.size
    canvas, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT_SIZE)
    rows = list(zip((boxes * scale).tolist(), labels, texts, strict=True))[::-1]
    for (x1, y1, x2, y2), label, _ in rows:
        canvas.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=class_color(label), width=2)
    height = FONT_SIZE + 4
    for (x1, y1, _, _), label, text in rows:  # after all frames, so that none strikes a text through
        width = font.getlength(text) + 4
        x = max(min(x1, size[0] - width), 0)
        y = y1 - height if y1 >= height else y1
        canvas.rectangle((x, y, x + width, y + height), fill=class_color(label))
        canvas.text((x + 2, y), text, fill=(0, 0, 0), font=font)
    return np.asarray(picture)


def scaled_to(pixels: Picture, side: int) -> Picture:
    """An image whose longer side is `side` px."""
    scale = side / max(pixels.shape[:2])
    size = (max(round(pixels.shape[1] * scale), 1), max(round(pixels.shape[0] * scale), 1))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))


def class_color(label: int) -> tuple[int, int, int]:
    """Neighbors in the list of classes are far apart in hue; all are bright enough for black letters."""
    hue = label * 0.618034 % 1  # golden ratio
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.6, 1)
    return round(red * 255), round(green * 255), round(blue * 255)


def arrange(pictures: Sequence[Picture], titles: Sequence[str], columns: int | None = None) -> Picture:
    """Pictures with a title above each, in rows of `columns`, or such that they make about a square."""
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    head = FONT_SIZE + 2 * GAP
    width = max(picture.shape[1] for picture in pictures) + GAP
    height = max(picture.shape[0] for picture in pictures) + head
    sheet = Image.new("RGB", (columns * width - GAP, math.ceil(len(pictures) / columns) * height), GREY)
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for number, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        x, y = number % columns * width, number // columns * height
        canvas.text((x + GAP, y + GAP), title, fill=(255, 255, 255), font=font)
        sheet.paste(Image.fromarray(picture), (x, y + head))
    return np.asarray(sheet)
