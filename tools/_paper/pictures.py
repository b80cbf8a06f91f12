"""Feature maps of one image in every pyramid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from _comparison.rows import Row
from fpn_det.composition import compose
from fpn_det.runs.checkpoint import fill_model, load_checkpoint
from fpn_det.visualization.panels import GREY, RGBImage, make_grid, resize_longer_side, to_rgb
from fpn_det.visualization.pyramid_panels import heatmap, inspect_pyramid

SIDE = 150  # px of each map
IMAGE = 3  # of the validation set; it has objects of all sizes


def draw_pyramids(rows: Sequence[Row], data: Path, folder: Path, file: Path) -> None:
    """Draw the norm of the feature vector in every cell: a line for each row of the page, a column for each stride."""
    maps: list[dict[int, RGBImage]] = []
    for row in rows:
        settings = compose([*row.settings, f"data.root={data}"])
        annotations = settings.data.read_train_and_val(0).val
        model = settings.build_model(annotations.num_classes)
        checkpoint = folder / row.name / "seed0" / "checkpoints" / "last.pt"
        fill_model(model, load_checkpoint(checkpoint), str(checkpoint))
        (batch,) = settings.single_images(annotations, [IMAGE], model.stride, torch.device("cpu"))
        levels = inspect_pyramid(model, batch)
        image = resize_longer_side(to_rgb(batch.pixels[0]), SIDE)
        maps.append(
            {stride: heatmap(values, image) for stride, values in zip(levels.strides, levels.features, strict=True)}
        )
    strides = sorted(set().union(*maps))
    nothing = np.full_like(image, GREY)
    pictures, titles = [], []
    for row, of_stride in zip(rows, maps, strict=True):
        pictures += [image, *(of_stride.get(stride, nothing) for stride in strides)]
        titles += [row.title.split(":")[0], *(f"stride {stride}" if stride in of_stride else "" for stride in strides)]
    Image.fromarray(make_grid(pictures, titles, columns=1 + len(strides))).save(file, quality=88)
