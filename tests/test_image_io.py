from __future__ import annotations

import io
import os
import random
import struct
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin, features

from fpn_det.image_io import (
    IMAGE_SUFFIXES,
    BadImage,
    array_to_rgb,
    find_damaged_jpegs,
    image_size,
    image_to_rgb,
    read_file,
    read_image,
    verify_image,
)

SMOOTH = cv2.resize(
    np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8), (80, 48), interpolation=cv2.INTER_CUBIC
)


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


FORMATS = ["JPEG", "PNG", "WEBP", "TIFF", *(["AVIF"] if features.check("avif") else [])]
# 0, 9 and 65537 are values of real files; a text is none
ORIENTATIONS = [1, 2, 3, 4, 5, 6, 7, 8, 0, 9, 65537, "6"]


def exif_with(orientation: int | str) -> bytes:
    """Return EXIF data with an orientation as LONG, which holds large values, or as text."""
    value = orientation.encode() + b"\0" if isinstance(orientation, str) else struct.pack("<I", orientation)
    kind, count = (2, len(value)) if isinstance(orientation, str) else (4, 1)
    entry = struct.pack("<HHI", 0x112, kind, count) + value.ljust(4, b"\0")
    return b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry + bytes(4)


def assert_upright(path: Path) -> None:
    """Header, check and pixels agree with Pillow's exif_transpose."""
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    pixels = read_image(path)
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).mean() < 1
    assert image_size(path) == expected.shape[:2]
    header = verify_image(path.read_bytes(), path)
    assert (header.height, header.width) == expected.shape[:2]


@pytest.mark.parametrize(
    ("kind", "orientation"),
    # Pillow writes TIFF and AVIF files with regular orientations only.
    [
        (kind, value)
        for kind in FORMATS
        for value in (ORIENTATIONS if kind in ("JPEG", "PNG", "WEBP") else range(1, 10))
    ],
)
def test_orientation_is_that_of_exif_transpose(tmp_path, kind, orientation):
    path = tmp_path / "image"
    path.write_bytes(encoded(Image.fromarray(SMOOTH), kind, exif=exif_with(orientation), quality=95))
    assert_upright(path)
    assert image_size(path) == ((80, 48) if orientation in (5, 6, 7, 8) else (48, 80))


@pytest.mark.parametrize("orientation", [3, 6])
def test_orientation_after_the_pixels_of_a_png_counts(tmp_path, orientation):
    content = encoded(Image.fromarray(SMOOTH), "PNG")
    chunk = b"eXIf" + exif_with(orientation).removeprefix(b"Exif\0\0")
    framed = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    end = content.index(b"IEND") - 4
    path = tmp_path / "image.png"
    path.write_bytes(content[:end] + framed + content[end:])
    assert_upright(path)
    claiming = png_claiming(30_000, 30_000)
    path.write_bytes(claiming[:-12] + framed + claiming[-12:])
    assert image_size(path) == (30_000, 30_000)  # without decoding
    with pytest.raises(BadImage, match="got 30000 x 30000"):
        read_image(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_orientation_in_xmp_counts(tmp_path, kind):
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp.decode())
    path = tmp_path / "image"
    path.write_bytes(encoded(Image.fromarray(SMOOTH), kind, **({"pnginfo": info} if kind == "PNG" else {"xmp": xmp})))
    assert_upright(path)
    assert image_size(path) == (80, 48)


def color_modes() -> dict[str, tuple[bytes, np.ndarray]]:
    """Return a file of every color mode, and the RGB values it encodes."""
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
def test_read_image_returns_rgb_for_every_color_mode(tmp_path, kind):
    content, expected = color_modes()[kind]
    (tmp_path / "image").write_bytes(content)
    pixels = read_image(tmp_path / "image")
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - expected).max() <= (6 if kind == "cmyk jpeg" else 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.98])
def test_read_image_refuses_truncated_files(tmp_path, kind, share):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    content = encoded(noise, kind)
    path = tmp_path / "cut.image"
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"cut\.image: expected a complete image"):
        read_image(path)


def test_read_image_refuses_what_is_not_an_image(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "depth.tiff")
    for name, words in [
        ("empty.jpg", "got an empty file"),
        ("page.jpg", "got an HTML page"),
        ("depth.tiff", "8 or 16 bits, got 1 channel of float32. Set data.channels=1 data.dtype=float32."),
        ("gone.jpg", "cannot be read: No such file"),
        ("", "cannot be read: Is a directory"),
    ]:
        with pytest.raises(ValueError, match=words):
            read_image(tmp_path / name)
    assert image_size(tmp_path / "page.jpg") is None


def png_claiming(width: int, height: int) -> bytes:
    """Return a small PNG file whose header claims a size."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b"\0"), b"IEND"]
    framed = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def jpeg_claiming(width: int, height: int) -> bytes:
    content = bytearray(encoded(Image.fromarray(SMOOTH), "JPEG"))
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(content)


@pytest.mark.parametrize("content", [png_claiming(30_000, 30_000), jpeg_claiming(30_000, 30_000)], ids=["png", "jpeg"])
def test_the_size_that_a_header_claims_is_limited(tmp_path, content):
    path = tmp_path / "large"
    path.write_bytes(content)
    for check in (lambda: read_image(path), lambda: verify_image(content, path)):
        with pytest.raises(
            BadImage, match=r"expected at most 268,435,456 pixels, got 30000 x 30000\. Cut .*max_image_pixels"
        ):
            check()
    path.write_bytes(encoded(Image.fromarray(SMOOTH), "PNG"))
    assert read_image(path, max_pixels=48 * 80).shape == (48, 80, 3)
    with pytest.raises(BadImage, match=r"expected at most 3,839 pixels, got 80 x 48"):
        read_image(path, max_pixels=48 * 80 - 1)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo.jpg")
    for path in (tmp_path / "fifo.jpg", Path("/dev/zero")):
        with pytest.raises(BadImage, match="expected a regular file, got a FIFO, socket or device"):
            read_image(path)
        assert image_size(path) is None
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(BadImage, match=r"expected an image file of at most 2,164,260,864 bytes, got 1,099,511,627,776"):
        read_file(tmp_path / "huge.jpg")
    for name in ("null\0byte.jpg", "surrogate\udce4.jpg"):
        with pytest.raises(BadImage, match="cannot be read"):
            read_image(tmp_path / name)


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)
OTHER_CONTENT = {
    "HEIC": (HEIC, "a HEIC image, which cannot be decoded. Convert it to JPEG"),
    "HTML": (
        b"  <!DOCTYPE html><html><body>404</body></html>",
        "an HTML page, probably the answer of a failed download",
    ),
    "git-LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
        r"a git-LFS pointer. Fetch the file: git lfs pull",
    ),
    "SVG": (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
    "JSON": (b'{"error": "not found"}', "a JSON text"),
    "MP4": (b"\0\0\0\x18ftypisom\0\0\0\0isommp42" + bytes(64), "a video"),
    "PDF": (b"%PDF-1.7\n", "a PDF document"),
    "ZIP": (b"PK\x03\x04" + bytes(64), "a compressed archive"),
}


@pytest.mark.parametrize("kind", OTHER_CONTENT)
def test_other_content_is_named_with_a_remedy(tmp_path, kind):
    content, words = OTHER_CONTENT[kind]
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    for check in (lambda: read_image(path), lambda: verify_image(content, path)):
        with pytest.raises(BadImage, match=rf"photo\.jpg: expected an image, got {words}"):
            check()


def test_suffixes_are_those_of_formats_that_are_read():
    for suffix in IMAGE_SUFFIXES - {".heic", ".heif", ".npy"}:  # listed to be refused by name; not Pillow's
        kind = Image.registered_extensions()[suffix]
        if kind not in ("AVIF", "MPO") or (kind == "AVIF" and features.check("avif")):  # MPO is opened as JPEG
            assert kind in Image.OPEN
    assert {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".avif"} <= IMAGE_SUFFIXES


@pytest.mark.parametrize("kind", ["PNG", "BMP", "JPEG", "WEBP", "GIF"])
def test_thin_images_are_read(tmp_path, kind):
    for side in (1, 2, 3, 7, 8):
        for size in ((side, 40), (40, side), (side, side)):
            path = tmp_path / "thin"
            path.write_bytes(encoded(Image.fromarray(np.full((*size, 3), 77, np.uint8)), kind))
            assert read_image(path).shape == (*size, 3)
            header = verify_image(path.read_bytes(), path)
            assert (header.height, header.width) == size
            assert abs(int(read_image(path)[0, 0, 0]) - 77) <= 2


def test_16_bit_images_are_equal_from_path_pil_and_array(tmp_path):
    grey = np.random.default_rng(0).integers(0, 1 << 16, (40, 50)).astype(np.uint16)
    expected = np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2)
    for kind in ("PNG", "TIFF", "PPM"):
        path = tmp_path / f"grey.{kind.lower()}"
        Image.fromarray(grey).save(path, kind)
        assert np.array_equal(read_image(path), expected), kind
        assert np.array_equal(image_to_rgb(Image.open(path)), expected), kind
    found = array_to_rgb(grey)
    assert found is not None and np.array_equal(found, expected)
    path.write_bytes(encoded(Image.fromarray(np.full((8, 8), 1 << 20, np.int32)), "TIFF"))
    with pytest.raises(BadImage, match="expected a picture of 8 or 16 bits, got 1 channel of int32"):
        read_image(path)


def test_damage_inside_a_jpeg_is_found(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    sound = encoded(Image.fromarray(noise), "JPEG")
    middle = len(sound) // 2
    files = {"sound.jpg": sound, "hole.jpg": sound[:middle] + bytes(400) + sound[middle + 400 :]}
    files["short.jpg"] = sound[:middle] + sound[middle + 700 :]
    files["extra.jpg"] = sound[:-2] + b"\x12\x34" + sound[-2:]  # extra bytes at the end are harmless
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    paths = [tmp_path / name for name in files]

    def decode(some: list[Path]) -> None:
        for path in some:
            verify_image(path.read_bytes(), path)

    found = find_damaged_jpegs(paths, decode)
    assert {path.name for path in found} == {"hole.jpg", "short.jpg"}
    assert all(damage.startswith("Corrupt JPEG data: ") for damage in found.values())


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Change, remove or insert some bytes of a file, or cut it."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8, 40))):
        place = draw.randrange(len(changed) if draw.random() < 0.5 else min(len(changed), 64))
        kind = draw.randrange(5)
        if kind == 0:
            changed[place] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
        elif kind == 1:
            del changed[place : place + draw.randrange(1, 9)]
        elif kind == 2:
            changed[place:place] = draw.randbytes(draw.randrange(1, 9))
        elif kind == 3:
            changed[place : place + 4] = draw.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"))
        elif len(changed) > 40:
            del changed[draw.randrange(20, len(changed)) :]
        if not changed:
            return b"\0"
    return bytes(changed)


def test_mutated_files_are_read_or_refused(tmp_path):
    """FPN_DET_FUZZ_SECONDS sets the duration and starts from a new seed; by default a fixed set of cases is tried."""
    seconds = float(os.environ.get("FPN_DET_FUZZ_SECONDS", "0"))
    small = Image.fromarray(SMOOTH[:24, :32])
    seeds = [
        (kind, encoded(small.convert(mode), kind, **options))
        for kind, mode, options in [
            ("JPEG", "RGB", {"exif": exif_with(6)}),
            ("JPEG", "RGB", {"progressive": True}),
            ("PNG", "RGB", {"exif": exif_with(8)}),
            ("PNG", "P", {}),
            ("WEBP", "RGB", {"exif": exif_with(3)}),
            ("BMP", "RGB", {}),
            ("BMP", "P", {}),
            ("TIFF", "RGB", {"exif": exif_with(6)}),
            ("TIFF", "RGB", {"compression": "tiff_lzw"}),
            ("TIFF", "L", {"compression": "tiff_deflate"}),
            ("GIF", "P", {}),
            ("PPM", "RGB", {}),
            ("PPM", "1", {}),
            ("JPEG2000", "RGB", {}),
            *([("AVIF", "RGB", {})] if features.check("avif") else []),
        ]
    ]
    path, end = tmp_path / "image", time.monotonic() + seconds
    first = number = int(time.time()) if seconds else 0
    outcomes = {"read": 0, "refused": 0}
    while number < first + 1200 or time.monotonic() < end:
        draw = random.Random(number)
        kind, content = seeds[number % len(seeds)]
        content = mutated(content, draw)
        path.write_bytes(content)
        try:
            pixels = read_image(path, draw.choice((1, 1, 2)), max_pixels=1 << 22)
        except BadImage as error:
            outcomes["refused"] += 1
            assert "\n" not in str(error), (number, kind, str(error))
            pixels = None
        except Exception as error:
            pytest.fail(f"case {number} ({kind}): {type(error).__name__}: {error}")
        if pixels is not None:
            outcomes["read"] += 1
            assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
        image_size(path)
        try:
            verify_image(content, path, max_pixels=1 << 22)
        except BadImage:
            pass
        number += 1
    assert min(outcomes.values()) > (number - first) // 10


@pytest.mark.slow
@pytest.mark.parametrize("kind", [".jpg", ".png"])
def test_an_image_of_a_hundred_million_pixels_is_read(tmp_path, kind):
    path = tmp_path / f"large{kind}"
    assert cv2.imwrite(str(path), np.full((9000, 12000, 3), 200, np.uint8))
    assert image_size(path) == (9000, 12000)
    assert read_image(path).shape == (9000, 12000, 3)
    assert read_image(path, 8).shape == ((1125, 1500, 3) if kind == ".jpg" else (9000, 12000, 3))


def test_an_image_that_does_not_fit_into_memory_is_named(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    path.write_bytes(encoded(Image.fromarray(SMOOTH), "PNG"))

    def fail(*arguments):
        raise MemoryError

    monkeypatch.setattr(cv2, "imdecode", fail)
    with pytest.raises(ValueError, match=r"large\.png: expected an image that fits into memory"):
        read_image(path)
