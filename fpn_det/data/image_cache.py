"""Decoded pictures on disk: reading them takes a tenth of the time of decoding, and thirty times the space of JPEG."""

from __future__ import annotations

import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np

from fpn_det.image_io import read_image

LEAST_FREE = 0.1  # of the disk: a cache that would leave less does not grow


class PictureCache:
    """Reads pictures, and keeps what came out for the next time; any number of processes may share one.

    A file is known by its path, size and time of change: one that was replaced is decoded again. What belongs to files
    that are gone stays: to make room, delete the folder.

    Raises:
        ValueError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"data.cache: expected a folder that can be written, got {folder}: {error.strerror}."
            ) from error

    def read(self, path: Path, reduction: int = 1) -> np.ndarray:
        """As `read_image` does."""
        kept = self._place(path, reduction)
        if kept is None:
            return read_image(path, reduction)
        with suppress(OSError, ValueError, EOFError):  # not there, or torn by a crash of the machine
            return np.load(kept)
        pixels = read_image(path, reduction)
        self._keep(pixels, kept)
        return pixels

    def _place(self, path: Path, reduction: int) -> Path | None:
        """Where the pixels of a file are kept; None if there is no such file."""
        try:
            stat = path.stat()
        except OSError:
            return None
        text = f"{path.absolute()} {stat.st_size} {stat.st_mtime_ns} {reduction}"
        name = hashlib.sha256(text.encode()).hexdigest()[:32]
        return self.folder / name[:2] / f"{name}.npy"  # not all files in one folder

    def _keep(self, pixels: np.ndarray, kept: Path) -> None:
        """Write aside, then rename, so that nobody meets half a file. A disk that is full is no reason to stop."""
        unfinished = kept.with_suffix(f".{os.getpid()}.unfinished")
        with suppress(OSError):
            disk = shutil.disk_usage(self.folder)
            if disk.free - pixels.nbytes < LEAST_FREE * disk.total:
                return
            kept.parent.mkdir(exist_ok=True)
            try:
                with unfinished.open("wb") as file:
                    np.save(file, pixels)
                unfinished.replace(kept)
            finally:
                unfinished.unlink(missing_ok=True)
