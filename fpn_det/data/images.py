"""From a picture file to RGB pixels, whatever the file is: the only place where pictures are decoded.

EXIF orientation is applied here and nowhere else, so the original frame is the picture as a person sees it.
"""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageOps

TIFF_MAGIC = (b"II*\x00", b"MM\x00*")


def read_image(path: Path) -> np.ndarray:
    """The upright picture as u8 [h, w, 3] RGB. Grey is repeated, 16 bits are scaled to 8, transparency is ignored.

    Raises:
        ValueError: the file is missing, empty, truncated or no picture.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}.") from error
    if not content:
        raise ValueError(f"{path}: expected a picture, got an empty file.")
    pixels = None if _is_transparent_tiff(content) else _decode_opencv(content)
    return _decode_pillow(content, path) if pixels is None else pixels


def _decode_opencv(content: bytes) -> np.ndarray | None:
    """The fast way. Decoding from memory refuses truncated files, which decoding from a path fills with grey."""
    try:
        return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error:  # more pixels than OpenCV admits
        return None


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
        picture = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
        if picture.mode[0] in "IF":
            raise ValueError(f"{path}: expected 8 or 16 bits per channel, got mode {picture.mode}. Convert the file.")
        return np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError) as error:  # Pillow's PNG reader raises SyntaxError
        raise ValueError(f"{path}: expected a complete picture, got {len(content)} bytes that do not decode: {error}.") from error


def image_size(path: Path) -> tuple[int, int] | None:
    """(h, w) of the upright picture, from the file's header; None if it is no picture."""
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            turned = picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # what Pillow raises for broken headers
        return None
    return (width, height) if turned else (height, width)
