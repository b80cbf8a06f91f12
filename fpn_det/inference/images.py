"""Images to predict: what a person names becomes a list of files, PIL images and arrays."""

from __future__ import annotations

import glob
import re
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fpn_det.image_io import IMAGE_SUFFIXES, MAX_PIXELS, array_to_rgb, decode_image, image_to_rgb, read_image

ImageInput = str | Path | Image.Image | np.ndarray

VIDEO_SUFFIXES = frozenset(".avi .m4v .mkv .mov .mp4 .mpeg .mpg .ts .webm .wmv".split())
URL = re.compile(r"https?://", re.IGNORECASE)
TIMEOUT_S = 30.0
MAX_BYTES = 1 << 28  # of a download


def find_images(source: ImageInput | Sequence[ImageInput], download: bool = False) -> list[ImageInput]:
    """List the images that `source` names, in the order of the names.

    Args:
        source: a file; a folder, of which all images are taken, those of its subfolders too; a pattern such as
            `photos/*.jpg`; a text file with one path per line, relative to its folder or to the current one; a URL; a PIL
            image; an array; or a list of these.
        download: fetch URLs; False refuses them.

    Returns:
        Files as paths, everything else as it is.

    Raises:
        ValueError: a file, folder or pattern names no image, or a URL is not wanted or cannot be fetched.
    """
    if not isinstance(source, str | Path):
        if isinstance(source, Sequence):
            return [image for item in source for image in find_images(item, download)]
        return [source]
    if URL.match(str(source)):
        if not download:
            raise ValueError(f"predict: expected files, got the URL {source}. Set download=True to fetch it.")
        return [fetch(str(source))]
    return list(find_files(source))


def find_files(source: str | Path) -> list[Path]:
    """List the image and video files that a path, folder, pattern or list of paths names; see `find_images`."""
    path = Path(source)
    if path.is_dir():
        known = IMAGE_SUFFIXES | VIDEO_SUFFIXES
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in known and file.is_file())
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


def read_pixels(image: ImageInput, reduction: int = 1, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode or convert an image to u8 [h, w, 3] RGB, upright.

    Args:
        image: a path, a PIL image, or a u8 or u16 array [h, w, 3] RGB or [h, w] grey.
        reduction: of a JPEG file, see `image_io.read_image`.
        max_pixels: largest width * height of a file.

    Raises:
        ValueError: it is of another type, or cannot be read.
    """
    if isinstance(image, str | Path):
        return read_image(Path(image), reduction, max_pixels)
    if isinstance(image, Image.Image):
        return image_to_rgb(image)
    pixels = array_to_rgb(image) if isinstance(image, np.ndarray) else None
    if pixels is None:
        found = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else f"a {type(image).__name__}"
        raise ValueError(
            f"predict: expected paths, PIL images, or uint8 or uint16 arrays [h, w, 3] RGB or [h, w] grey, got {found}."
        )
    return pixels


def fetch(url: str) -> np.ndarray:
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
    return decode_image(content, Path(url.rpartition("/")[2] or url))


def _read_list(path: Path) -> list[Path]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a text file with one path per line, got: {error}.") from None
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise ValueError(f"{path}: expected one path per line, got an empty file.")
    return [beside if (beside := path.parent / name).exists() else Path(name) for name in names]
