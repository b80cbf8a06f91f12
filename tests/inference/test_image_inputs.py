"""PIL images and arrays of other channels and bits are read, and drawn, as the files of the same images."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fpn_det.image_io import PixelFormat
from fpn_det.inference.images import read_display, read_pixels

NOISE = np.random.default_rng(0)
ORIENTATION = 0x112


@pytest.mark.parametrize("dtype", ["uint16", "float32", "int32"])
def test_an_array_without_an_axis_of_channels_is_drawn_as_one_with_it(dtype):
    values = (NOISE.random((20, 30)) * 4095).astype(dtype)  # of 12 bits
    found = read_display(values)
    assert found.shape == (20, 30, 3) and found.max() == 255 and found.min() == 0
    assert np.array_equal(found, read_display(values[..., None]))
    if dtype != "uint16":
        assert np.array_equal(found, read_display(Image.fromarray(values)))
    grey = values.astype(np.uint8)
    assert np.array_equal(read_display(grey), np.repeat(grey[..., None], 3, axis=2))


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize(("channels", "dtype"), [(1, "uint8"), (4, "uint8"), (1, "uint16")])
def test_a_pil_image_is_upright_as_its_file(tmp_path, orientation, channels, dtype):
    values = NOISE.integers(0, np.iinfo(dtype).max, (20, 30, channels)).astype(dtype)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / "a.png"
    Image.fromarray(values[..., 0] if channels == 1 else values).save(path, exif=exif)
    found = read_pixels(Image.open(path), pixel_format=PixelFormat(channels, dtype))
    assert found.shape == ((30, 20, channels) if orientation == 6 else (20, 30, channels))
    assert np.array_equal(found, read_pixels(path, pixel_format=PixelFormat(channels, dtype)))
    assert np.array_equal(read_display(Image.open(path)), read_display(path))


def test_a_palette_is_refused_where_one_channel_is_expected(tmp_path):
    picture = Image.fromarray(NOISE.integers(0, 256, (20, 30, 3)).astype(np.uint8)).convert("P")
    picture.save(tmp_path / "a.png")
    for image in (picture, Image.open(tmp_path / "a.png")):
        with pytest.raises(
            ValueError, match=r"expected paths or arrays \[h, w, 1\] of uint8, .* got uint8 \[20, 30, 3\]"
        ):
            read_pixels(image, pixel_format=PixelFormat(1))
    with pytest.raises(ValueError, match="expected 1 channel of 8 bits, .* got 3 channels of 8 bits"):
        read_pixels(tmp_path / "a.png", pixel_format=PixelFormat(1))
