"""Files of any number of channels: the values come back as they were written, and anything else is refused with a reason."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from fpn_det import image_io
from fpn_det.array_io import open_array
from fpn_det.image_io import (
    BadImage,
    PixelFormat,
    image_size,
    only_images,
    read_for_display,
    read_image,
    to_display,
    verify_image,
)

VALUES = np.random.default_rng(0).integers(0, 65536, (20, 30, 8), dtype=np.uint16)


def npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def tiff(values: np.ndarray, **options) -> bytes:
    tifffile = pytest.importorskip("tifffile", reason="needs the extra tiff")
    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


def written(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [1, 3, 4, 8])
def test_an_array_comes_back_as_it_was_saved(tmp_path, dtype, channels):
    if (dtype, channels) == ("uint8", 3):
        pytest.skip("pictures")
    values = VALUES[..., :channels].astype(dtype)
    path = written(tmp_path, "a.npy", npy(values[..., 0] if channels == 1 else values))
    found = read_image(path, pixel_format=PixelFormat(channels, dtype))
    assert found.dtype == dtype and np.array_equal(found, values)
    assert image_size(path) == (20, 30)


@pytest.mark.parametrize(
    "layout",
    [
        {"planarconfig": "contig"},
        {"planarconfig": "contig", "compression": "zlib", "predictor": True},
        {"planarconfig": "contig", "tile": (16, 16)},
        {"planarconfig": "contig", "bigtiff": True},
        {"planarconfig": "separate"},
        {},  # a page for each channel
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_the_channels_of_a_tiff_file_are_its_samples_or_pages(tmp_path, layout, dtype):
    values = VALUES.astype(dtype)
    layout = {name: value for name, value in layout.items() if name != "predictor" or dtype != "float32"}  # imagecodecs
    stored = values if layout.get("planarconfig") == "contig" else np.moveaxis(values, 2, 0)
    path = written(tmp_path, "a.tif", tiff(stored, photometric="minisblack", **layout))
    assert np.array_equal(read_image(path, pixel_format=PixelFormat(8, dtype)), values)
    assert image_size(path) == (20, 30)


def test_an_oriented_tiff_file_is_upright(tmp_path):
    for orientation in range(1, 9):
        content = tiff(
            VALUES,
            photometric="minisblack",
            planarconfig="contig",
            extratags=[(274, 3, 1, orientation, True)],
        )
        path = written(tmp_path, "a.tif", content)
        stored = Image.fromarray(VALUES[..., 0].astype(np.uint8))
        stored.getexif()[274] = orientation
        grey = io.BytesIO()
        stored.save(grey, "PNG", exif=stored.getexif())
        expected = read_image(written(tmp_path, "a.png", grey.getvalue()))[..., 0]
        found = read_image(path, pixel_format=PixelFormat(8, "uint16"))
        assert np.array_equal(found[..., 0].astype(np.uint8), expected), orientation
        assert image_size(path) == expected.shape


def test_masks_and_reduced_pages_are_no_channels(tmp_path):
    tifffile = pytest.importorskip("tifffile", reason="needs the extra tiff")
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as file:
        file.write(VALUES, photometric="minisblack", planarconfig="contig")
        file.write(VALUES[::2, ::2], photometric="minisblack", planarconfig="contig", subfiletype=1)
    assert np.array_equal(read_image(path, pixel_format=PixelFormat(8, "uint16")), VALUES)


@pytest.mark.parametrize(
    ("channels", "dtype"), [(1, "uint8"), (1, "uint16"), (3, "uint16"), (4, "uint8"), (4, "uint16")]
)
def test_a_png_file_keeps_its_channels_and_bits(tmp_path, channels, dtype):
    values = VALUES[..., :channels].astype(dtype)
    order = [2, 1, 0, 3][:channels] if channels > 1 else [0]
    cv2.imwrite(str(tmp_path / "a.png"), values[..., order])
    pixel_format = PixelFormat(channels, dtype)
    assert np.array_equal(read_image(tmp_path / "a.png", pixel_format=pixel_format), values)
    content = (tmp_path / "a.png").read_bytes()
    assert verify_image(content, tmp_path / "a.png").stored == pixel_format  # read as RGB, it still tells


@pytest.mark.parametrize(
    ("mode", "kind", "channels"),
    [
        ("1", "PNG", 1),
        ("1", "PPM", 1),
        ("1", "BMP", 1),
        ("L", "JPEG", 1),
        ("LA", "PNG", 2),
        ("LA", "TIFF", 2),
        ("CMYK", "JPEG", 4),
        ("CMYK", "TIFF", 4),
        ("F", "TIFF", 1),
        ("I;16", "PNG", 1),
    ],
)
def test_a_picture_is_read_in_the_format_that_its_check_tells(tmp_path, mode, kind, channels):
    pytest.importorskip("tifffile", reason="needs the extra tiff")
    grey = (
        Image.fromarray(VALUES[..., 0]) if mode == "I;16" else Image.fromarray((VALUES[..., :3] >> 8).astype(np.uint8))
    )
    picture = grey if mode == "I;16" else grey.convert(mode)
    file = io.BytesIO()
    picture.save(file, kind, **({"quality": 100, "subsampling": 0} if kind == "JPEG" else {}))
    path = written(tmp_path, f"a.{kind.lower()}", file.getvalue())
    stored = verify_image(file.getvalue(), path, pixel_format=None).stored
    assert stored.channels == channels
    found = read_image(path, pixel_format=stored)
    expected = np.asarray(picture.convert("L") if mode == "1" else picture).reshape(20, 30, channels)
    assert found.dtype == stored.dtype == expected.dtype
    assert np.abs(found.astype(float) - expected).max() <= (4 if kind == "JPEG" else 0)


@pytest.mark.parametrize(
    ("channels", "options"),
    [
        (3, {"photometric": "rgb"}),
        (4, {"photometric": "rgb", "extrasamples": ["unassalpha"]}),
        (4, {"photometric": "rgb", "extrasamples": ["unspecified"]}),
    ],
)
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_color_tiff_file_is_checked_read_and_drawn_as_what_it_holds(tmp_path, dtype, channels, options):
    values = (VALUES[..., :channels] >> (4 if dtype == "uint16" else 8)).astype(dtype)  # of 12 bits or 8
    content = tiff(values, **options)
    path = written(tmp_path, "a.tif", content)
    stored = PixelFormat(channels, dtype)
    for wanted in (None, image_io.RGB):
        assert verify_image(content, path, pixel_format=wanted).stored == stored
    assert np.array_equal(read_image(path, pixel_format=stored), values)
    assert np.array_equal(read_for_display(path), to_display(values))
    assert read_for_display(path).max() > 250
    assert np.abs(read_image(path).astype(int) - (values[..., :3] >> (8 if dtype == "uint16" else 0))).max() <= 1


def test_a_color_tiff_file_of_16_bits_is_drawn_without_tifffile_too(tmp_path, monkeypatch):
    values = VALUES[..., :3] >> 4
    path = written(tmp_path, "a.tif", tiff(values, photometric="rgb"))
    monkeypatch.setitem(sys.modules, "tifffile", None)  # an import of it fails
    found = read_for_display(path)
    assert found.max() == 255 and np.abs(found.astype(int) - to_display(values)).max() <= 24  # of 16 levels


def test_another_byte_order_becomes_that_of_the_machine(tmp_path):
    for dtype in (">u2", "<u2"):
        found = read_image(written(tmp_path, "a.npy", npy(VALUES.astype(dtype))), pixel_format=PixelFormat(8, "uint16"))
        assert found.dtype.isnative and np.array_equal(found, VALUES)
        picture = read_image(written(tmp_path, "b.npy", npy(VALUES[..., :3].astype(dtype))))
        assert np.array_equal(picture, VALUES[..., :3] >> 8)
    found = read_image(
        written(tmp_path, "a.tif", tiff(VALUES, photometric="minisblack", planarconfig="contig", byteorder=">")),
        pixel_format=PixelFormat(8, "uint16"),
    )
    assert found.dtype.isnative and np.array_equal(found, VALUES)


def test_wider_numbers_become_float32(tmp_path):
    for dtype in ("uint8", "int16", "float64", "float16"):
        path = written(tmp_path, "a.npy", npy((VALUES[..., :4] >> 9).astype(dtype)))
        found = read_image(path, pixel_format=PixelFormat(4, "float32"))
        assert found.dtype == np.float32 and np.array_equal(found, (VALUES[..., :4] >> 9))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            npy(VALUES[..., :5]),
            "expected 8 channels of 16 bits, as data.channels and data.dtype say, got 5 channels of 16",
        ),
        (npy(VALUES.astype(np.uint8)), "got 8 channels of 8 bits. Set data.channels=8 data.dtype=uint8."),
        (npy(VALUES.astype(np.float64)), "got 8 channels of float64. Set data.channels=8 data.dtype=float32."),
        (npy(VALUES[0]), "got 1 channel of 16 bits"),
        (npy(VALUES[0, 0]), "expected an array [h, w, C] or [h, w] of numbers, got uint16 [8]"),
        (npy(VALUES[None]), "got uint16 [1, 20, 30, 8]. Move the channels to the end"),
        (npy(np.array([[{}]], dtype=object)), "of numbers, got object [1, 1]"),
        (npy(VALUES)[:500], "expected a complete .npy file, got 500 bytes that end too early"),
        (npy(VALUES)[:20], "expected a complete .npy file, got a damaged header"),
    ],
)
def test_an_array_of_another_format_is_refused_with_what_it_is(tmp_path, content, words):
    path = written(tmp_path, "a.npy", content)
    with pytest.raises(BadImage) as caught:
        read_image(path, pixel_format=PixelFormat(8, "uint16"))
    assert words in str(caught.value) and str(caught.value).startswith(f"{path}: ")


def test_a_claim_of_many_pixels_is_refused_before_they_are_decoded(tmp_path):
    for name, content in (
        ("a.npy", npy(VALUES)),
        ("a.tif", tiff(VALUES, photometric="minisblack", planarconfig="contig")),
    ):
        with pytest.raises(BadImage, match="expected at most 599 pixels, got 30 x 20"):
            read_image(written(tmp_path, name, content), max_pixels=599, pixel_format=PixelFormat(8, "uint16"))


def tiff_of_one_segment(segment: bytes, tile_side: int | None = None) -> bytes:
    """A TIFF file of 30 x 20 px and 8 channels of 8 bits, compressed with deflate into one strip or tile."""
    place = 4000
    tags = [(256, 30), (257, 20), (258, 8), (259, 8), (262, 1), (277, 8), (284, 1)]
    if tile_side is None:
        tags += [(273, place), (278, 20), (279, len(segment))]
    else:
        tags += [(322, tile_side), (323, tile_side), (324, place), (325, len(segment))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags))
    header = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    return header.ljust(place, b"\0") + segment


def test_pixels_that_unpack_to_more_than_their_header_claims_are_refused(tmp_path):
    pytest.importorskip("tifffile", reason="needs the extra tiff")
    pixel_format = PixelFormat(8, "uint8")
    sound = VALUES.astype(np.uint8)
    path = written(tmp_path, "a.tif", tiff_of_one_segment(zlib.compress(sound.tobytes())))
    assert np.array_equal(read_image(path, pixel_format=pixel_format), sound)
    path = written(tmp_path, "a.tif", tiff_of_one_segment(zlib.compress(bytes(1 << 26))))  # 64 MiB from 64 KiB
    with pytest.raises(BadImage, match="a.tif: expected a complete TIFF file, got pixels that do not decode"):
        read_image(path, pixel_format=pixel_format)
    path = written(
        tmp_path, "a.tif", tiff_of_one_segment(zlib.compress(bytes(1 << 20)), tile_side=1 << 16)
    )  # of 32 GiB
    with pytest.raises(BadImage, match="expected tiles no larger than the image"):
        read_image(path, pixel_format=pixel_format)


def test_the_size_of_a_file_of_many_channels_needs_its_header_only(tmp_path, monkeypatch, capfd):
    path = written(tmp_path, "a.tif", tiff(VALUES, photometric="minisblack", planarconfig="contig"))
    monkeypatch.setattr(image_io, "read_file", None)
    assert image_size(path) == (20, 30)
    assert capfd.readouterr() == ("", "")  # Pillow logs that it does not read such files


def test_values_that_are_not_finite_are_refused(tmp_path):
    values = VALUES.astype(np.float32)
    values[3, 4, 5] = np.nan
    with pytest.raises(BadImage, match="expected finite values, got NaN or infinity"):
        read_image(written(tmp_path, "a.npy", npy(values)), pixel_format=PixelFormat(8, "float32"))


@pytest.mark.parametrize("length", [10, 60, 200, 9000])
def test_a_damaged_tiff_file_is_refused(tmp_path, length, capfd):
    path = written(tmp_path, "a.tif", tiff(VALUES, photometric="minisblack", planarconfig="contig")[:length])
    with pytest.raises(BadImage, match=r"a.tif: expected (a complete TIFF|an image|a complete image)"):
        read_image(path, pixel_format=PixelFormat(8, "uint16"))
    assert capfd.readouterr() == ("", "")


def test_stacks_of_several_axes_are_refused():
    content = tiff(np.stack([VALUES] * 2), photometric="minisblack", planarconfig="contig")
    with pytest.raises(ValueError, match="expected one page with its channels as samples, or a page for each channel"):
        open_array(io.BytesIO(content))


def test_as_pictures_they_name_the_settings(tmp_path):
    with pytest.raises(BadImage, match=r"got 8 channels of 16 bits. Set data.channels=8 data.dtype=uint16\."):
        read_image(written(tmp_path, "a.npy", npy(VALUES)))
    with pytest.raises(BadImage, match=r"expected a picture, got 8 channels of 16 bits. Set data.channels=8"):
        read_image(written(tmp_path, "a.tif", tiff(VALUES, photometric="minisblack", planarconfig="contig")))
    numbers = Image.fromarray(VALUES[..., 0].astype(np.float32))
    numbers.save(tmp_path / "f.tif")
    for name in ("f.tif", "d.npy"):
        np.save(tmp_path / "d.npy", VALUES[..., 0].astype(np.float64))
        with pytest.raises(BadImage, match=r"got 1 channel of float\d\d. Set data.channels=1 data.dtype=float32\."):
            read_image(tmp_path / name)
    picture = (VALUES[..., :3] >> 8).astype(np.uint8)
    assert np.array_equal(read_image(written(tmp_path, "b.npy", npy(picture))), picture)
    assert np.array_equal(read_image(written(tmp_path, "c.npy", npy(VALUES[..., :3]))), picture)


def test_an_array_beside_a_picture_of_its_name_is_no_image():
    names = ["a.jpg", "a.npy", "b.npy", "c.txt", "d/a.npy", "e.tif"]
    assert [str(path) for path in only_images(map(Path, names))] == ["a.jpg", "b.npy", "d/a.npy", "e.tif"]


def test_three_channels_are_displayed_stretched(tmp_path):
    ramp = np.repeat(np.arange(101, dtype=np.uint16)[None, :, None] * 10, 5, axis=0) * np.array(
        [1, 2, 3, 50], np.uint16
    )
    shown = to_display(ramp)
    assert shown.dtype == np.uint8 and shown.shape == (5, 101, 3)
    # from the 2nd to the 98th percentile of each channel: columns 2 and 98
    assert shown[0, :3].max() == 0 and shown[0, 98:].min() == 255
    assert shown[0, 50].tolist() == [128, 128, 128]
    assert np.array_equal(read_for_display(written(tmp_path, "a.npy", npy(ramp))), shown)
    cv2.imwrite(str(tmp_path / "a.png"), ramp[..., 2::-1])
    assert np.array_equal(read_for_display(tmp_path / "a.png"), shown)
    one = read_for_display(written(tmp_path, "b.npy", npy(ramp[..., 0])))
    assert np.array_equal(one[..., 0], one[..., 2]) and one.shape == (5, 101, 3)
