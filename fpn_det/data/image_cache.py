"""Cache of decoded images on disk: ten times as fast as decoding JPEG files, and thirty times as large."""

from __future__ import annotations

import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np

from fpn_det.image_io import MAX_PIXELS, RGB, PixelFormat, read_image

MIN_FREE_FRACTION = 0.1  # of the disk; the cache stops growing at this limit


class ImageCache:
    """Reads images through a folder of decoded ones, which any number of processes may share.

    An entry is identified by the path, size and modification time of its file, so a file that was replaced is decoded
    again. Entries are never removed; delete the folder to free the space.

    Args:
        folder: created if it does not exist.
        max_pixels: largest width * height of an image.
        pixel_format: of the images.

    Raises:
        ValueError: the folder cannot be created.
    """

    def __init__(self, folder: Path, max_pixels: int = MAX_PIXELS, pixel_format: PixelFormat = RGB) -> None:
        self.folder = folder
        self.max_pixels = max_pixels
        self.pixel_format = pixel_format
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"data.cache: expected a folder that can be written, got {folder}: {error.strerror}. "
                "Choose another folder or set data.cache=null."
            ) from error

    def read(self, path: Path, reduction: int = 1) -> np.ndarray:
        """Return what `image_io.read_image` returns, from the cache if possible."""
        entry = self._entry(path, reduction)
        if entry is None:
            return read_image(path, reduction, self.max_pixels, self.pixel_format)
        with suppress(OSError, ValueError, EOFError):  # no entry yet, or one cut short by a crash of the machine
            return np.load(entry)
        pixels = read_image(path, reduction, self.max_pixels, self.pixel_format)
        self._write(pixels, entry)
        return pixels

    def _entry(self, path: Path, reduction: int) -> Path | None:
        """Return the path of the entry of a file; None if the file does not exist."""
        try:
            stat = path.stat()
        except OSError:
            return None
        identity = f"{path.absolute()} {stat.st_size} {stat.st_mtime_ns} {reduction}"
        identity += "" if self.pixel_format == RGB else f" {self.pixel_format}"
        name = hashlib.sha256(identity.encode()).hexdigest()[:32]
        return self.folder / name[:2] / f"{name}.npy"  # 256 subfolders

    def _write(self, pixels: np.ndarray, entry: Path) -> None:
        """Write to a temporary file and rename it, so that no process reads half an entry. A full disk is not an error."""
        unfinished = entry.with_suffix(f".{os.getpid()}.unfinished")
        with suppress(OSError):
            disk = shutil.disk_usage(self.folder)
            if disk.free - pixels.nbytes < MIN_FREE_FRACTION * disk.total:
                return
            entry.parent.mkdir(exist_ok=True)
            try:
                with unfinished.open("wb") as file:
                    np.save(file, pixels)
                unfinished.replace(entry)
            finally:
                unfinished.unlink(missing_ok=True)
