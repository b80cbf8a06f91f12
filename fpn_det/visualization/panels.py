"""Draw ground truth beside detections, and batches in the input frame.

Images are u8 [h, w, 3] RGB. The color of a class depends on its label only, so it is equal in all figures and runs. Where
objects and detections are compared, colors say their outcome.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fpn_det.evaluation.config import EvaluationConfig
from fpn_det.evaluation.detection_table import DetectionTable
from fpn_det.evaluation.matching import match_detections
from fpn_det.evaluation.outcomes import IGNORED_KIND, OUTCOME_NAMES, find_outcomes
from fpn_det.image_io import MAX_PIXELS, read_for_display, to_display
from fpn_det.structures import Annotations, Batch, ScoreThresholds

RGBImage = NDArray[np.uint8]
Color = tuple[int, int, int]
Title = Sequence[tuple[str, Color]]  # parts of a line and their colors

SIDE = 480  # px, longer side of a panel; smaller images are enlarged so that labels are readable
FONT_SIZE = 13  # px
MAX_BOXES = 100  # drawn per image
MIN_SCORE = 0.3  # of drawn detections where no evaluation has found a threshold
GAP = 6  # px between panels
GREY = (40, 40, 40)
WHITE = (255, 255, 255)
OUTCOME_COLORS = ((60, 200, 90), (240, 80, 70), (250, 190, 40), (190, 110, 240), (150, 150, 150))  # see OUTCOME_NAMES


def pick_images(annotations: Annotations, count: int) -> list[int]:
    """Select rows evenly spaced over the images with objects, or over all images if none has objects. Deterministic."""
    sizes = annotations.boxes_per_image.numpy()
    rows = np.flatnonzero(sizes) if sizes.any() else np.arange(len(sizes))
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)].tolist()


def draw_comparison(
    annotations: Annotations,
    detections: DetectionTable,
    thresholds: ScoreThresholds | None,
    row: int,
    config: EvaluationConfig,
    max_pixels: int = MAX_PIXELS,
) -> RGBImage:
    """Draw an image with its ground truth (left) and its detections (right), in the colors of their outcomes.

    Proposals have no classes, so theirs do not depend on the class.

    Args:
        annotations: the ground truth.
        detections: in the original frame.
        thresholds: detections below that of their class are not drawn; None is MIN_SCORE for all.
        row: image row of `annotations`.
        config: of the evaluation, whose matcher decides on the outcomes.
        max_pixels: largest width * height of an image.
    """
    pixels, names = read_for_display(annotations.path(row), max_pixels), annotations.class_names
    thresholds = thresholds or ScoreThresholds(MIN_SCORE, {})
    truth = annotations
    if config.target == "proposals":
        truth = replace(truth, labels=torch.zeros_like(truth.labels), class_names=("object",), category_ids=(1,))
    matches = match_detections(truth, detections, np.array([row]), config, np.array([config.match_iou]))
    outcomes = find_outcomes(matches, detections, thresholds)

    objects = np.arange(len(annotations.boxes))[annotations.rows(row)]
    kinds = np.full(len(objects), IGNORED_KIND)  # crowd regions
    kinds[np.searchsorted(objects, matches.objects)] = outcomes.object_kinds
    labels, crowd = annotations.labels[objects].tolist(), annotations.iscrowd[objects].tolist()
    texts = [
        f"{names[label]} (crowd)" if is_crowd else names[label] for label, is_crowd in zip(labels, crowd, strict=True)
    ]
    left = _draw_outcomes(pixels, annotations.boxes[objects].numpy(), kinds, texts)

    least = np.array(thresholds.of(truth.class_names))[matches.detection_labels]
    found = np.flatnonzero(matches.scores >= least)
    found = found[np.argsort(-matches.scores[found], kind="stable")]
    rows = matches.detections[found[:MAX_BOXES]]
    texts = [
        f"{names[label]} {score:.2f}" if config.target == "detections" else f"{score:.2f}"
        for label, score in zip(detections.labels[rows].tolist(), detections.scores[rows], strict=True)
    ]
    right = _draw_outcomes(pixels, detections.boxes[rows], outcomes.detection_kinds[found[:MAX_BOXES]], texts)
    titles = (
        counted_title(f"{len(objects)} objects", _counts(kinds), OUTCOME_COLORS),
        counted_title(f"{len(found)} detections", _counts(outcomes.detection_kinds[found]), OUTCOME_COLORS),
    )
    return make_grid([left, right], titles)


def _draw_outcomes(pixels: RGBImage, boxes: NDArray, kinds: NDArray[np.int64], texts: Sequence[str]) -> RGBImage:
    return draw_boxes(pixels, boxes, kinds.tolist(), texts, colors=OUTCOME_COLORS)


def _counts(kinds: NDArray[np.int64]) -> list[str]:
    counts = np.bincount(kinds, minlength=len(OUTCOME_NAMES)).tolist()
    return [f"{count} {name}" if count else "" for count, name in zip(counts, OUTCOME_NAMES, strict=True)]


def counted_title(head: str, parts: Sequence[str], colors: Sequence[Color]) -> Title:
    """Join a title and its parts, each in its color, which makes it the legend of the panel; empty parts are left out."""
    shown = [(text, color) for text, color in zip(parts, colors, strict=False) if text]
    return [
        (head, WHITE),
        *((f"{', ' if number else ': '}{text}", color) for number, (text, color) in enumerate(shown)),
    ]


def draw_batch(batch: Batch, class_names: Sequence[str]) -> RGBImage:
    """Draw the images of a batch with their targets, in the input frame, including the padding."""
    batch = batch.to("cpu")
    panels, titles = [], []
    for pixels, size, boxes, labels, valid in zip(
        batch.pixels, batch.sizes.tolist(), batch.targets.boxes, batch.targets.labels, batch.targets.valid, strict=True
    ):
        ids = labels[valid].tolist()
        texts = [class_names[label] for label in ids]
        panels.append(draw_boxes(to_rgb(pixels), boxes[valid].numpy(), ids, texts))
        titles.append(f"{size[1]} x {size[0]} px, {len(ids)} objects")
    return make_grid(panels, titles)


def to_rgb(pixels: Tensor) -> RGBImage:
    """Convert pixels [C, H, W] to a u8 image [H, W, 3]: three channels of 8 bits as they are, others stretched by `to_display`."""
    return to_display(pixels.permute(1, 2, 0).numpy())  # [C, H, W] -> [H, W, C]


def draw_boxes(
    pixels: RGBImage,
    boxes: NDArray,
    labels: Sequence[int],
    texts: Sequence[str],
    side: int = SIDE,
    colors: Sequence[Color] | None = None,
) -> RGBImage:
    """Resize an image to a longer side of `side` and draw labeled boxes, the first on top.

    Args:
        pixels: u8 [h, w, 3].
        boxes: [n, 4], xyxy in px of `pixels`.
        labels: [n], classes that determine the colors.
        texts: [n], drawn at the boxes; an empty text hides nothing of the image.
        side: px.
        colors: RGB by label, instead of those of classes.
    """
    scale = side / max(pixels.shape[:2])
    panel = Image.fromarray(resize_longer_side(pixels, side))
    size = panel.size
    canvas, font = ImageDraw.Draw(panel), ImageFont.load_default(FONT_SIZE)
    color_of = class_color if colors is None else colors.__getitem__
    rows = list(zip((boxes * scale).tolist(), labels, texts, strict=True))[::-1]
    for (x1, y1, x2, y2), label, _ in rows:
        canvas.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=color_of(label), width=2)
    height = FONT_SIZE + 4
    for (x1, y1, _, _), label, text in rows:  # after all boxes, so that no outline crosses a text
        if not text:
            continue
        width = font.getlength(text) + 4
        x = max(min(x1, size[0] - width), 0)
        y = y1 - height if y1 >= height else y1
        canvas.rectangle((x, y, x + width, y + height), fill=color_of(label))
        canvas.text((x + 2, y), text, fill=(0, 0, 0), font=font)
    return np.asarray(panel)


def resize_longer_side(pixels: RGBImage, side: int) -> RGBImage:
    """Resize an image to a longer side of `side` px."""
    scale = side / max(pixels.shape[:2])
    size = (max(round(pixels.shape[1] * scale), 1), max(round(pixels.shape[0] * scale), 1))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))


def class_color(label: int) -> Color:
    """Return the RGB color of a class. Consecutive classes differ strongly in hue; all colors are bright enough for black text."""
    hue = label * 0.618034 % 1  # golden ratio
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.6, 1)
    return round(red * 255), round(green * 255), round(blue * 255)


def make_grid(panels: Sequence[RGBImage], titles: Sequence[str | Title], columns: int | None = None) -> RGBImage:
    """Arrange titled images in a grid of `columns`; by default in about as many rows as columns."""
    columns = columns or math.ceil(math.sqrt(len(panels)))
    head = FONT_SIZE + 2 * GAP
    width = max(panel.shape[1] for panel in panels) + GAP
    height = max(panel.shape[0] for panel in panels) + head
    sheet = Image.new("RGB", (columns * width - GAP, math.ceil(len(panels) / columns) * height), GREY)
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for number, (panel, title) in enumerate(zip(panels, titles, strict=True)):
        x, y = number % columns * width, number // columns * height
        place = x + GAP
        for text, color in [(title, WHITE)] if isinstance(title, str) else title:
            canvas.text((place, y + GAP), text, fill=color, font=font)
            place += round(font.getlength(text))
        sheet.paste(Image.fromarray(panel), (x, y + head))
    return np.asarray(sheet)
