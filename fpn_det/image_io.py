"""Decoding of image files to RGB pixels; the only place where images are decoded.

The orientation is that of Pillow's `exif_transpose` for every format and decoder, so the original frame is the upright
image. `image_size`, `verify_image` and `read_image` agree on it. Files are untrusted: only regular files are opened, and
the size that a header claims is checked before memory is allocated.
"""

from __future__ import annotations

import io
import os
import re
import stat
import tempfile
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import cv2
import numpy as np
from PIL import ExifTags, Image

MAX_PIXELS = 1 << 28  # default limit of width * height: 768 MiB of RGB
MAX_PNG_CHUNKS = 1 << 20
MAX_BYTES_PER_PIXEL, MAX_METADATA_BYTES = 8, 1 << 24  # limits of the file size
Image.MAX_IMAGE_PIXELS = None  # replaced by the limit of this module, which also applies to OpenCV
warnings.filterwarnings("ignore", module=r"PIL\.")  # such as corrupt EXIF data, which has no effect on the pixels

# Suffixes of files that are taken for images in a folder. HEIC files are listed to be refused with a reason.
IMAGE_SUFFIXES = frozenset(
    ".avif .bmp .dib .gif .heic .heif .j2k .jfif .jp2 .jpe .jpeg .jpg .mpo .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split()
)

JPEG_MAGIC = b"\xff\xd8"
TIFF_MAGIC = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
OPENCV_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP")  # decoded by OpenCV, which is faster; Pillow decodes the others
COLOR = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION  # the former needs OpenCV 4.11
REDUCED = {
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,  # the flag of the reduction without that of color
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}

# libjpeg reports damage of the compressed data as a warning on stderr only, and fills the rest with grey. A few extra
# bytes before the end marker 0xd9 are not damage: some cameras write them.
JPEG_DAMAGE = re.compile(rb"Corrupt JPEG data: (?!\d extraneous bytes before marker 0xd9)[^\n]*")

HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


class BadImage(ValueError):
    """An image file that cannot be used.

    Attributes:
        path: of the file.
    """

    def __init__(self, path: Path, message: str) -> None:
        super().__init__(path, message)  # both, so that it can be pickled
        self.path = path

    def __str__(self) -> str:
        return self.args[1]


@dataclass(frozen=True)
class ImageHeader:
    """Properties of an image file that can be read without decoding its pixels."""

    height: int  # px, upright
    width: int  # px, upright
    orientation: int  # EXIF, 1..8; the stored image is rotated by 90 degrees from 5 on
    format: str  # Pillow's name


def read_image(path: Path, reduction: int = 1, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image file to the upright image, u8 [h, w, 3] RGB.

    Grey is repeated, 16-bit values are shifted to 8 bits, transparency is ignored, and of several frames the first is
    returned.

    Args:
        path: of the file.
        reduction: 2, 4 or 8 decodes a JPEG file at that fraction of its size, which is faster; sides are rounded up.
        max_pixels: largest width * height.

    Raises:
        BadImage: the file is missing, not a regular file, empty, truncated, too large, or not an image.
    """
    return decode_image(read_file(path, max_pixels), path, reduction, max_pixels)


def read_file(path: Path, max_pixels: int = MAX_PIXELS) -> bytes:
    """Read the content of a regular file.

    Raises:
        BadImage: it cannot be read, is not a regular file, is empty, or is larger than any image of `max_pixels`.
    """
    with _open_regular(path) as file:
        size, limit = os.fstat(file.fileno()).st_size, max_pixels * MAX_BYTES_PER_PIXEL + MAX_METADATA_BYTES
        if size > limit:
            raise BadImage(path, f"{path}: expected an image file of at most {limit:,} bytes, got {size:,}.")
        try:
            content = file.read()
        except (OSError, MemoryError) as error:
            raise BadImage(
                path, f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'out of memory'}."
            ) from error
    if not content:
        raise BadImage(path, f"{path}: expected an image, got an empty file. Copy or download it again.")
    return content


def decode_image(content: bytes, path: Path, reduction: int = 1, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode the content of an image file; see `read_image`.

    Args:
        content: of the file.
        path: for messages.
        reduction: as of `read_image`.
        max_pixels: as of `read_image`.
    """
    try:
        picture, header = _open_image(content, path, max_pixels)
        if header.format in OPENCV_FORMATS:
            flags = COLOR | (REDUCED[reduction] if content.startswith(JPEG_MAGIC) else 0)
            pixels = _decode_opencv(content, flags)
            if pixels is not None:
                return _upright(pixels, header.orientation)
        return _decode_pillow(picture, path, len(content))
    except MemoryError as error:
        raise BadImage(
            path, f"{path}: expected an image that fits into memory, got one of {len(content):,} bytes that does not."
        ) from error


def verify_image(content: bytes, path: Path, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """Check that the content of an image file decodes, at reduced size where that is faster, and return its header.

    Raises:
        BadImage: `decode_image` would raise it.
    """
    header = _open_image(content, path, max_pixels)[1]
    if header.format in ("JPEG", "MPO") and min(header.height, header.width) >= 8:
        # An eighth of the size takes half of the time, and fails for the same files.
        if _decode_opencv(content, cv2.IMREAD_REDUCED_GRAYSCALE_8 | cv2.IMREAD_IGNORE_ORIENTATION) is not None:
            return header
    decode_image(content, path, max_pixels=max_pixels)
    return header


def image_size(path: Path) -> tuple[int, int] | None:
    """Read the (h, w) of the upright image from the header of a file; None if that fails."""
    try:
        with _open_regular(path) as file:
            picture = Image.open(file)
            if picture.width * picture.height > MAX_PIXELS and picture.format == "PNG":
                return picture.height, picture.width  # its orientation may need decoding
            header = _read_header(picture, file)
    except Exception:  # Pillow's readers raise many types for broken files
        return None
    return header.height, header.width


def image_to_rgb(picture: Image.Image) -> np.ndarray:
    """Convert a PIL image to the pixels that `read_image` returns for its file.

    Raises:
        ValueError: its values have more than 16 bits.
    """
    picture.load()  # a TIFF image is upright only after this
    pixels = np.asarray(picture) if picture.mode[0] in "IF" else np.asarray(picture.convert("RGB"))
    if picture.mode[0] in "IF":
        is_16_bit = picture.mode.startswith("I;16") or (
            picture.mode == "I" and 0 <= pixels.min() and pixels.max() < 1 << 16
        )
        if not is_16_bit:
            raise ValueError(f"expected 8 or 16 bits per channel, got mode {picture.mode}. Convert the image")
        pixels = np.repeat((pixels >> 8).astype(np.uint8)[..., None], 3, axis=2)
    return _upright(pixels, _orientation(picture.getexif()))


def array_to_rgb(pixels: np.ndarray) -> np.ndarray | None:
    """Convert a u8 or u16 array [h, w] or [h, w, 3] RGB to u8 [h, w, 3]; return None for another dtype or shape."""
    is_image = pixels.dtype in (np.uint8, np.uint16) and (
        pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)
    )
    if not is_image or not pixels.size:
        return None
    pixels = (pixels >> 8).astype(np.uint8) if pixels.dtype == np.uint16 else pixels
    return np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels


def reduction_to(size: tuple[int, int], least: tuple[int, int]) -> int:
    """Return the strongest reduction of (h, w) that leaves at least `least` (h, w) and no fraction of a pixel."""
    return max(
        by
        for by in REDUCED
        if all(side % by == 0 and side // by >= other for side, other in zip(size, least, strict=True)) or by == 1
    )


def find_damaged_jpegs(paths: list[Path], decode: Callable[[list[Path]], None]) -> dict[Path, str]:
    """Run `decode` on files, and return the damage of the JPEG data that the decoder reports while it runs.

    Args:
        paths: the files.
        decode: decodes files, possibly in many threads.

    Returns:
        The damage of each damaged file.
    """
    damage = JPEG_DAMAGE.search(_run_with_captured_stderr(lambda: decode(paths)))
    if damage is None:
        return {}
    if len(paths) == 1:
        return {paths[0]: damage.group().decode()}
    half = len(paths) // 2
    return find_damaged_jpegs(paths[:half], decode) | find_damaged_jpegs(paths[half:], decode)


def _open_regular(path: Path) -> IO[bytes]:
    """Open a file for reading, unless reading it could block or never end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise BadImage(path, f"{path}: cannot be read: {error.strerror}.") from error
    except ValueError as error:  # a null byte or a lone surrogate in the name
        raise BadImage(path, f"{str(path)!r}: cannot be read: {error}.") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise BadImage(path, f"{path}: cannot be read: Is a directory.")
        raise BadImage(path, f"{path}: expected a regular file, got a FIFO, socket or device.")
    return os.fdopen(descriptor, "rb")


def _open_image(content: bytes, path: Path, max_pixels: int) -> tuple[Image.Image, ImageHeader]:
    """Open an image without decoding it, and check the size that it claims."""
    try:
        file = io.BytesIO(content)
        picture = Image.open(file)
        width, height = picture.size
        header = _read_header(picture, file) if width * height <= max_pixels else None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise many types for broken files
        other = _other_content(content)
        if other:
            raise BadImage(path, f"{path}: expected an image, got {other}") from None
        reason = str(error).strip() or type(error).__name__
        reason = "the format is unknown" if "cannot identify" in reason else reason
        raise BadImage(
            path, f"{path}: expected a complete image, got {len(content):,} bytes that do not decode: {reason}."
        ) from error
    if header is None:
        raise BadImage(
            path,
            f"{path}: expected at most {max_pixels:,} pixels, got {width} x {height}. "
            "Cut the image into tiles or set data.max_image_pixels.",
        )
    return picture, header


def _read_header(picture: Image.Image, file: IO[bytes]) -> ImageHeader:
    """Read the header of an image that was opened but not decoded."""
    kind = picture.format or ""
    width, height = picture.size
    if kind == "PNG" and "exif" not in picture.info and not _has_late_metadata(file):
        orientation = _orientation(Image.Image.getexif(picture))  # that of PngImageFile would decode the pixels
    else:
        orientation = _orientation(picture.getexif())
    if kind == "TIFF":  # Pillow 10.3 and later swap the sides already
        width, height = (int(picture.tag_v2[tag]) for tag in (256, 257))  # type: ignore[attr-defined]
    if orientation >= 5:
        width, height = height, width
    return ImageHeader(height, width, orientation, kind)


def _has_late_metadata(file: IO[bytes]) -> bool:
    """True if a PNG file has metadata after its pixels, which Pillow finds by decoding only."""
    position, is_after_pixels = 8, False
    start = file.tell()
    found = False
    for _ in range(MAX_PNG_CHUNKS):
        file.seek(position)
        chunk = file.read(8)
        if len(chunk) < 8:
            break
        kind = chunk[4:]
        is_after_pixels |= kind == b"IDAT"
        if is_after_pixels and kind in (b"eXIf", b"iTXt", b"zTXt", b"tEXt"):
            found = True
            break
        position += int.from_bytes(chunk[:4], "big") + 12  # length, type and checksum
    file.seek(start)
    return found


def _orientation(exif: Image.Exif) -> int:
    """Return the EXIF orientation in 1..8; anything that Pillow's `exif_transpose` ignores is 1."""
    value = exif.get(ExifTags.Base.Orientation, 1)
    return int(value) if value in (2, 3, 4, 5, 6, 7, 8) else 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Transpose stored pixels [h, w, 3] by their EXIF orientation."""
    if orientation == 1:
        return pixels
    if orientation == 2:
        return cv2.flip(pixels, 1)
    if orientation == 3:
        return cv2.rotate(pixels, cv2.ROTATE_180)
    if orientation == 4:
        return cv2.flip(pixels, 0)
    if orientation == 5:
        return cv2.transpose(pixels)
    if orientation == 6:
        return cv2.rotate(pixels, cv2.ROTATE_90_CLOCKWISE)
    if orientation == 7:
        return cv2.flip(cv2.rotate(pixels, cv2.ROTATE_90_CLOCKWISE), 0)
    return cv2.rotate(pixels, cv2.ROTATE_90_COUNTERCLOCKWISE)


def _decode_opencv(content: bytes, flags: int) -> np.ndarray | None:
    """Decode with OpenCV; None if it fails. In memory, because from a path it fills truncated files with grey."""
    try:
        return cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error:
        return None


def _decode_pillow(picture: Image.Image, path: Path, size: int) -> np.ndarray:
    """Decode an opened image with Pillow, which either succeeds or gives a reason."""
    try:
        picture.load()
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise many types for broken files
        reason = str(error).strip() or type(error).__name__
        raise BadImage(
            path, f"{path}: expected a complete image, got {size:,} bytes that do not decode: {reason}."
        ) from error
    try:
        return image_to_rgb(picture)
    except MemoryError:
        raise
    except Exception as error:  # a mode that has no RGB
        raise BadImage(path, f"{path}: {error}.") from error


def _other_content(content: bytes) -> str | None:
    """Name content that is not a decodable image, with the remedy."""
    start = content[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    brands = content[8:12], *(content[place : place + 4] for place in range(16, min(len(content), 64), 4))
    if start.startswith(b"version https://git-lfs"):
        return "a git-LFS pointer. Fetch the file: git lfs pull."
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "an HTML page, probably the answer of a failed download. Download the image again."
    if start.startswith(b"<svg") or (start.startswith(b"<?xml") and b"<svg" in start):
        return "an SVG drawing. Render it to PNG."
    if start.startswith(b"<?xml"):
        return "an XML file. Give the path of the image."
    if start.startswith((b"{", b"[")):
        return "a JSON text. Give the path of the image."
    if content[4:8] == b"ftyp" and any(brand in HEIC_BRANDS for brand in brands):
        return "a HEIC image, which cannot be decoded. Convert it to JPEG: heif-convert in.heic out.jpg."
    if content[4:8] == b"ftyp":
        return "a video. Extract its frames: ffmpeg -i video.mp4 frame_%06d.jpg."
    if start.startswith(b"%pdf"):
        return "a PDF document. Render it to PNG."
    if content.startswith((b"PK\x03\x04", b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!")):
        return "a compressed archive. Unpack it."
    return None


_stderr_lock = threading.Lock()


def _run_with_captured_stderr(function: Callable[[], None]) -> bytes:
    """Run a function while file descriptor 2 of the process is redirected, and return what was written to it."""
    with _stderr_lock, tempfile.TemporaryFile() as file:
        original = os.dup(2)
        try:
            os.dup2(file.fileno(), 2)
            function()
        finally:
            os.dup2(original, 2)
            os.close(original)
        file.seek(0)
        return file.read()
