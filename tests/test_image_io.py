from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from fpn_det.image_io import image_size, read_image

SMOOTH = cv2.resize(
    np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8), (80, 48), interpolation=cv2.INTER_CUBIC
)


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


# what each EXIF orientation does to a picture that is stored upright, as numpy does it
ORIENTATIONS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a[::-1].transpose(1, 0, 2),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a[:, ::-1].transpose(1, 0, 2),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_read_image_applies_exif_orientation_once(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    path = tmp_path / "picture"
    path.write_bytes(encoded(Image.fromarray(SMOOTH), kind, exif=exif, quality=100, subsampling=0))
    upright = ORIENTATIONS[orientation](SMOOTH)
    pixels = read_image(path)
    assert np.abs(pixels.astype(int) - upright).max() <= (4 if kind == "JPEG" else 0)
    assert image_size(path) == upright.shape[:2]


def color_modes() -> dict[str, tuple[bytes, np.ndarray]]:
    """Files of every kind of color, and the RGB each stands for."""
    picture = Image.fromarray(SMOOTH)
    grey = np.asarray(picture.convert("L"))
    palette = picture.convert("P")
    transparent = picture.convert("RGBA")
    transparent.putalpha(Image.fromarray(grey))
    cmyk = picture.convert("CMYK")
    wide = cv2.imencode(".png", SMOOTH[..., ::-1].astype(np.uint16) * 257)[1].tobytes()
    return {
        "grey": (encoded(picture.convert("L"), "PNG"), np.repeat(grey[..., None], 3, axis=2)),
        "grey 16 bit": (
            encoded(Image.fromarray(grey.astype(np.uint16) * 257), "PNG"),
            np.repeat(grey[..., None], 3, axis=2),
        ),
        "rgb 16 bit": (wide, SMOOTH),
        "palette": (encoded(palette, "PNG"), np.asarray(palette.convert("RGB"))),
        "rgba png": (encoded(transparent, "PNG"), SMOOTH),
        "rgba tiff": (encoded(transparent, "TIFF"), SMOOTH),
        "gif": (encoded(palette, "GIF"), np.asarray(palette.convert("RGB"))),
        "cmyk tiff": (encoded(cmyk, "TIFF"), np.asarray(cmyk.convert("RGB"))),
        "cmyk jpeg": (encoded(cmyk, "JPEG", quality=100, subsampling=0), SMOOTH),
        "bmp": (encoded(picture, "BMP"), SMOOTH),
        "webp": (encoded(picture, "WEBP", lossless=True), SMOOTH),
    }


@pytest.mark.parametrize("kind", color_modes())
def test_read_image_gives_rgb_whatever_the_file_holds(tmp_path, kind):
    content, expected = color_modes()[kind]
    (tmp_path / "picture").write_bytes(content)
    pixels = read_image(tmp_path / "picture")
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - expected).max() <= (6 if kind == "cmyk jpeg" else 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.98])
def test_read_image_refuses_truncated_files(tmp_path, kind, share):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    content = encoded(noise, kind)
    path = tmp_path / "cut.picture"
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"cut\.picture: expected a complete picture"):
        read_image(path)


def test_read_image_refuses_what_is_no_picture(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "depth.tiff")
    for name, words in [
        ("empty.jpg", "got an empty file"),
        ("page.jpg", "do not decode"),
        ("depth.tiff", "8 or 16 bits per channel, got mode F"),
        ("gone.jpg", "cannot be read: No such file"),
        ("", "cannot be read: Is a directory"),
    ]:
        with pytest.raises(ValueError, match=words):
            read_image(tmp_path / name)
    assert image_size(tmp_path / "page.jpg") is None


def test_pictures_beyond_every_limit_are_named(tmp_path):
    """A header is enough: 40,000 x 40,000 px are more than OpenCV and Pillow admit."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b"\0"), b"IEND"]
    framed = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    path = tmp_path / "map.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(framed))
    with pytest.raises(
        ValueError, match=r"map\.png: expected at most 1,073,741,824 pixels, got 40000 x 40000\. Cut it into tiles"
    ):
        read_image(path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [".jpg", ".png"])
def test_a_picture_of_a_hundred_million_pixels_is_read(tmp_path, kind):
    path = tmp_path / f"large{kind}"
    assert cv2.imwrite(str(path), np.full((9000, 12000, 3), 200, np.uint8))
    assert image_size(path) == (9000, 12000)
    assert read_image(path).shape == (9000, 12000, 3)
    assert read_image(path, 8).shape == ((1125, 1500, 3) if kind == ".jpg" else (9000, 12000, 3))


def test_a_picture_that_does_not_fit_into_memory_is_named(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    path.write_bytes(encoded(Image.fromarray(SMOOTH), "PNG"))

    def fail(*arguments):
        raise MemoryError

    monkeypatch.setattr(cv2, "imdecode", fail)
    with pytest.raises(ValueError, match=r"large\.png: expected a picture that fits into memory"):
        read_image(path)
