"""From a picture file to RGB pixels, whatever the file is: the only place where pictures are decoded.

EXIF orientation is applied here and nowhere else, so the original frame is the picture as a person sees it.
"""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageOps

MOST_PIXELS = 1 << 30  # what OpenCV admits; Pillow's own limit stops at a sixth of it
Image.MAX_IMAGE_PIXELS = None

JPEG_MAGIC = b"\xff\xd8"
TIFF_MAGIC = (b"II*\x00", b"MM\x00*")
REDUCED = {
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,  # the flag of the reduction alone, without that of a color
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}


class BadImage(ValueError):
    """A picture that cannot be used, and why, as text: the file is at fault, not the program."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(path, why)  # all of them, so that it can be pickled
        self.path = path

    def __str__(self) -> str:
        return self.args[1]


def read_image(path: Path, reduction: int = 1) -> np.ndarray:
    """The upright picture as u8 [h, w, 3] RGB. Grey is repeated, 16 bits are scaled to 8, transparency is ignored.

    Args:
        reduction: 2, 4 or 8 decodes a JPEG file at that fraction of its size, which takes less time; sides are rounded up.

    Raises:
        BadImage: the file is missing, empty, truncated or no picture.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadImage(path, f"{path}: cannot be read: {error.strerror}.") from error
    if not content:
        raise BadImage(path, f"{path}: expected a picture, got an empty file.")
    try:
        pixels = None if _is_transparent_tiff(content) else _decode_opencv(content, reduction)
        return _decode_pillow(content, path) if pixels is None else pixels
    except MemoryError as error:
        raise BadImage(
            path, f"{path}: expected a picture that fits into memory, got one of {len(content):,} bytes that does not."
        ) from error


def _decode_opencv(content: bytes, reduction: int) -> np.ndarray | None:
    """The fast way. Decoding from memory refuses truncated files, which decoding from a path fills with grey."""
    reduced = REDUCED[reduction] if content.startswith(JPEG_MAGIC) else 0
    try:
        return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB | reduced)
    except cv2.error:  # more pixels than OpenCV admits
        return None


def reduction_to(size: tuple[int, int], least: tuple[int, int]) -> int:
    """The strongest reduction of a picture of (h, w) that leaves at least (h, w) and no fraction of a pixel."""
    return max(
        by
        for by in REDUCED
        if all(side % by == 0 and side // by >= other for side, other in zip(size, least, strict=True)) or by == 1
    )


def _is_transparent_tiff(content: bytes) -> bool:
    """Whether OpenCV would multiply the colors by their opacity, as it does for TIFF alone."""
    if not content.startswith(TIFF_MAGIC):
        return False
    try:
        return Image.open(io.BytesIO(content)).mode == "RGBA"
    except OSError:
        return False


def _decode_pillow(content: bytes, path: Path) -> np.ndarray:
    """The thorough way, for what OpenCV refuses: either it succeeds, or it knows why not."""
    try:
        picture: Image.Image = Image.open(io.BytesIO(content))
        if picture.width * picture.height > MOST_PIXELS:
            raise BadImage(
                path,
                f"{path}: expected at most {MOST_PIXELS:,} pixels, got {picture.width} x {picture.height}. Cut it into tiles.",
            )
        picture = ImageOps.exif_transpose(picture)
        if picture.mode[0] in "IF":
            raise BadImage(
                path, f"{path}: expected 8 or 16 bits per channel, got mode {picture.mode}. Convert the file."
            )
        return np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError) as error:  # Pillow's PNG reader raises SyntaxError
        raise BadImage(
            path, f"{path}: expected a complete picture, got {len(content)} bytes that do not decode: {error}."
        ) from error


def image_size(path: Path) -> tuple[int, int] | None:
    """(h, w) of the upright picture, from the file's header; None if it is no picture."""
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            turned = picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # what Pillow raises for broken headers
        return None
    return (width, height) if turned else (height, width)
