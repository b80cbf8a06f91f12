"""Mean and deviation of the channels of a data set, for images that no pretrained weights have values for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fpn_det.image_io import BadImage
from fpn_det.structures import Annotations

MOST_IMAGES = 256  # read, evenly spaced over the data set
DIGITS = 6  # that settings keep of a value


@dataclass(frozen=True)
class ChannelStatistics:
    """Mean and standard deviation by channel, in units of the pixels."""

    mean: list[float]
    std: list[float]
    num_images: int  # that were read

    def describe(self) -> str:
        """One line for a log."""
        return (
            f"model.pixel_mean={self.mean} model.pixel_std={self.std}, measured on {self.num_images} training images."
        )


def measure_channels(annotations: Annotations, read: Callable[[Path, int], np.ndarray]) -> ChannelStatistics:
    """Measure over all pixels of up to MOST_IMAGES images.

    Args:
        annotations: the images.
        read: decodes the file of a path at a reduction, to [h, w, C].

    Raises:
        ValueError: no image can be read, or a channel has the same value everywhere.
    """
    rows = np.linspace(0, len(annotations) - 1, min(MOST_IMAGES, len(annotations))).round().astype(int)
    counts, means, squares = [], [], []
    for row in rows.tolist():
        try:
            pixels = read(annotations.path(row), 1)
        except BadImage:  # decided when the image is loaded for training
            continue
        values = pixels.reshape(-1, pixels.shape[2]).astype(np.float64)
        counts.append(len(values))
        means.append(values.mean(axis=0))
        squares.append(np.square(values - means[-1]).sum(axis=0))
    if not counts:
        raise ValueError("model.pixel_mean: expected training images to measure it on, got none that can be read.")
    share = np.array(counts)[:, None] / sum(counts)
    mean = (share * means).sum(axis=0)
    within = np.sum(squares, axis=0) / sum(counts)
    std = np.sqrt(within + (share * np.square(np.array(means) - mean)).sum(axis=0))
    if not std.all():
        channel = int(std.argmin())
        raise ValueError(
            f"model.pixel_std: expected channels that vary, got {mean[channel]:g} everywhere in channel {channel} of "
            f"{len(counts)} training images. Leave the channel out of the files, or set model.pixel_mean and model.pixel_std."
        )
    mean_values, std_values = ([float(f"{value:.{DIGITS}g}") for value in row] for row in (mean, std))
    return ChannelStatistics(mean_values, std_values, len(counts))
