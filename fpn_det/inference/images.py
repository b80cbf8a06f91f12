"""Images to predict: what a person names becomes a list of files, PIL images and arrays."""

from __future__ import annotations

import glob
import re
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fpn_det.annotations.files import non_empty_lines, walk_files
from fpn_det.image_io import (
    MAX_PIXELS,
    RGB,
    PixelFormat,
    array_to_rgb,
    decode_image,
    image_to_rgb,
    image_to_values,
    only_images,
    read_for_display,
    read_image,
    to_display,
)

ImageInput = str | Path | Image.Image | np.ndarray

VIDEO_SUFFIXES = frozenset(".avi .m4v .mkv .mov .mp4 .mpeg .mpg .ts .webm .wmv".split())
URL = re.compile(r"https?://", re.IGNORECASE)
TIMEOUT_S = 30.0
MAX_BYTES = 1 << 28  # of a download


def find_images(
    source: ImageInput | Sequence[ImageInput], download: bool = False, pixel_format: PixelFormat = RGB
) -> list[ImageInput]:
    """List the images that `source` names, in the order of the names.

    Args:
        source: a file; a folder, of which all images are taken, those of its subfolders too, except hidden ones; a pattern such as
            `photos/*.jpg`; a text file with one path per line, relative to its folder or to the current one; a URL; a PIL
            image; an array; or a list of these.
        download: fetch URLs; False refuses them.
        pixel_format: of what is fetched.

    Returns:
        Files as paths, everything else as it is.

    Raises:
        ValueError: a file, folder or pattern names no image, or a URL is not wanted or cannot be fetched.
    """
    if not isinstance(source, str | Path):
        if isinstance(source, Sequence):
            return [image for item in source for image in find_images(item, download, pixel_format)]
        return [source]
    if URL.match(str(source)):
        if not download:
            raise ValueError(f"predict: expected files, got the URL {source}. Set download=True to fetch it.")
        return [fetch(str(source), pixel_format)]
    return list(find_files(source))


def find_files(source: str | Path) -> list[Path]:
    """List the image and video files that a path, folder, pattern or list of paths names; see `find_images`."""
    path = Path(source)
    if not str(source):
        raise ValueError("source: expected a file, folder or pattern, got an empty text.")
    if path.is_dir():
        found = list(walk_files(path))
        files = sorted([*only_images(found), *(file for file in found if is_video(file))])
        if not files:
            raise ValueError(f"source: expected images in the folder {path}, got none.")
        return files
    if path.suffix.lower() == ".txt":
        return _read_list(path)
    if not path.exists() and glob.has_magic(str(source)):
        files = sorted(Path(name) for name in glob.glob(str(source), recursive=True) if Path(name).is_file())
        if not files:
            raise ValueError(f"source: expected files that match {source}, got none.")
        return files
    if not path.exists():
        raise ValueError(f"source: expected a file, folder or pattern, got {source}, which does not exist.")
    return [path]


def is_video(path: Path) -> bool:
    """Return whether the suffix of a file is that of a video."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def read_pixels(
    image: ImageInput, reduction: int = 1, max_pixels: int = MAX_PIXELS, pixel_format: PixelFormat = RGB
) -> np.ndarray:
    """Decode or convert an image to [h, w, C], upright.

    Args:
        image: a path, a PIL image, or an array: for RGB u8 or u16 [h, w, 3] or [h, w] grey, else [h, w, C] of the format.
        reduction: of a JPEG file, see `image_io.read_image`.
        max_pixels: largest width * height of a file.
        pixel_format: of the result.

    Raises:
        ValueError: it is of another type, or cannot be read.
    """
    if isinstance(image, str | Path):
        return read_image(Path(image), reduction, max_pixels, pixel_format)
    if pixel_format != RGB:
        values = image_to_values(image) if isinstance(image, Image.Image) else np.asarray(image)
        return _of_format(values, pixel_format)
    if isinstance(image, Image.Image):
        try:
            return image_to_rgb(image)
        except ValueError as error:
            raise ValueError(f"predict: {error}.") from None
    pixels = array_to_rgb(image) if isinstance(image, np.ndarray) else None
    if pixels is None:
        found = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else f"a {type(image).__name__}"
        raise ValueError(
            f"predict: expected paths, PIL images, or uint8 or uint16 arrays [h, w, 3] RGB or [h, w] grey, got {found}."
        )
    return pixels


def _of_format(pixels: np.ndarray, wanted: PixelFormat) -> np.ndarray:
    """Check that an array is of a format, [h, w] standing for one channel. Any numbers may become float32."""
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    fits = pixels.dtype.name == wanted.dtype or (wanted.dtype == "float32" and pixels.dtype.kind in "uif")
    if pixels.ndim not in (2, 3) or channels != wanted.channels or not pixels.size or not fits:
        raise ValueError(
            f"predict: expected paths or arrays [h, w, {wanted.channels}] of {wanted.dtype}, as the detector was trained on, "
            f"got {pixels.dtype} {list(pixels.shape)}."
        )
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise ValueError("predict: expected finite values, got NaN or infinity. Replace them.")
    return np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], channels), np.dtype(wanted.dtype))


def read_display(image: ImageInput, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode or convert an image to u8 [h, w, 3] for people, see `image_io.read_for_display`."""
    if isinstance(image, str | Path):
        return read_for_display(Path(image), max_pixels)
    if isinstance(image, Image.Image) and image.mode[0] in "IF":
        return to_display(image_to_values(image))
    if isinstance(image, np.ndarray) and image.ndim == 2:
        image = image[..., None]
    if isinstance(image, np.ndarray) and image.ndim == 3 and (image.shape[2] != 3 or image.dtype != np.uint8):
        return to_display(image)
    return read_pixels(image)


def fetch(url: str, pixel_format: PixelFormat = RGB) -> np.ndarray:
    """Download an image.

    Raises:
        ValueError: the server does not answer, or sends something else.
    """
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            content = answer.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ValueError(f"predict: expected an image at {url}, got: {getattr(error, 'reason', error)}.") from None
    if len(content) > MAX_BYTES:
        raise ValueError(f"predict: expected at most {MAX_BYTES:,} bytes at {url}, got more. Download it yourself.")
    return decode_image(content, Path(url.rpartition("/")[2] or url), pixel_format=pixel_format)


def _read_list(path: Path) -> list[Path]:
    names = non_empty_lines(path)
    if not names:
        raise ValueError(f"{path}: expected one path per line, got an empty file.")
    return [beside if (beside := path.parent / name).exists() else Path(name) for name in names]
