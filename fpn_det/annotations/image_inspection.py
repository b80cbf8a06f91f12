"""Inspection of image files: each file is decoded once, and its size, format, digest and faults are cached.

The cache lies in the user's cache folder; an entry is valid while its file keeps its size and modification time.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import cv2
import PIL
from PIL import Image
from rich.progress import Progress

from fpn_det.image_io import MAX_PIXELS, RGB, BadImage, PixelFormat, find_damaged_jpegs, read_file, verify_image
from fpn_det.terminal import SafeConsole

MAX_THREADS = 32
FILES_PER_ROUND = 512  # damage reported by the decoder is attributed by decoding the files of a round again
DECODERS = f"4 {cv2.__version__} {PIL.__version__}"  # results of other versions are not used


@dataclass(frozen=True)
class ImageInfo:
    """The result of the inspection of an image file."""

    height: int = 0  # px, upright
    width: int = 0  # px, upright
    orientation: int = 1  # EXIF, 1..8
    kind: str = ""  # Pillow's name of the format
    digest: str = ""  # of the file's bytes
    channels: str = ""  # in the file, with their bits
    fault: str = ""  # why it cannot be used

    @property
    def is_turned(self) -> bool:
        """True if the stored image is rotated by 90 degrees against the upright one."""
        return self.orientation >= 5


ImageInspector = Callable[[Iterable[str], Path], Mapping[str, ImageInfo]]


def inspect_images(
    paths: Iterable[str], folder: Path, max_pixels: int = MAX_PIXELS, pixel_format: PixelFormat | None = RGB
) -> dict[str, ImageInfo]:
    """Inspect image files; files without a valid cache entry are decoded in many threads.

    Args:
        paths: the files; one that does not exist, such as the target of a link, has a fault.
        folder: root of the data set, which has a cache file of its own.
        max_pixels: largest width * height; larger images have a fault.
        pixel_format: of the images; those that cannot be read in it have a fault. None takes any.
    """
    cache_file = _cache_file(folder)
    decoders = f"{DECODERS} {max_pixels} {pixel_format}"
    inspect = partial(_inspect, max_pixels=max_pixels, pixel_format=pixel_format)
    seen = _read_cache(cache_file, decoders)
    paths = list(dict.fromkeys(paths))
    stamps = {path: stamp for path in paths if (stamp := _stamp(path)) is not None}
    new = [path for path, stamp in stamps.items() if path not in seen or seen[path][0] != stamp]
    if new:
        seen |= {path: (stamps[path], info) for path, info in _inspect_all(new, inspect).items()}
        _write_cache(cache_file, decoders, seen)
    return {path: seen[path][1] if path in stamps else inspect(path) for path in paths}


def is_mislabeled(path: str, info: ImageInfo) -> bool:
    """True if the suffix of the file name is that of another format. Such a file is decoded all the same."""
    by_suffix = Image.registered_extensions().get(os.path.splitext(path)[1].lower())
    return bool(by_suffix and info.kind) and by_suffix != info.kind and {by_suffix, info.kind} != {"JPEG", "MPO"}


def _inspect_all(paths: Sequence[str], inspect: Callable[[str], ImageInfo]) -> dict[str, ImageInfo]:
    """Inspect files in threads, in rounds whose decoder messages are searched for damaged JPEG data."""
    infos: dict[str, ImageInfo] = {}
    # A descriptor of its own, because descriptor 2 is redirected while images are decoded.
    with os.fdopen(os.dup(2), "w", encoding=sys.stderr.encoding or "utf-8", errors="replace") as screen:
        console = SafeConsole(file=screen)
        with (
            ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool,
            Progress(console=console, disable=not console.is_terminal, transient=True) as progress,
        ):

            def decode(some: list[Path]) -> None:
                for path, info in zip(some, pool.map(inspect, map(str, some)), strict=True):
                    infos[str(path)] = info

            task = progress.add_task("checking images", total=len(paths))
            for start in range(0, len(paths), FILES_PER_ROUND):
                files = [Path(path) for path in paths[start : start + FILES_PER_ROUND]]
                for path, damage in find_damaged_jpegs(files, decode).items():
                    if not infos[str(path)].fault:
                        fault = f"the pixels are damaged ({damage}). Copy or download the file again"
                        infos[str(path)] = replace(infos[str(path)], fault=fault)
                progress.advance(task, len(files))
    return {path: infos[str(Path(path))] for path in paths}


def _inspect(path: str, max_pixels: int = MAX_PIXELS, pixel_format: PixelFormat | None = RGB) -> ImageInfo:
    digest = ""
    try:
        content = read_file(Path(path), max_pixels, pixel_format or RGB)
        digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        header = verify_image(content, Path(path), max_pixels, pixel_format)
    except BadImage as error:
        return ImageInfo(digest=digest, fault=str(error).removeprefix(f"{Path(path)}: ").rstrip("."))
    return ImageInfo(header.height, header.width, header.orientation, header.format, digest, str(header.stored))


def _stamp(path: str) -> list[int] | None:
    """Return size and modification time of a file; None if it does not exist."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a null byte in the name
        return None
    return [status.st_size, status.st_mtime_ns]


def _cache_file(folder: Path) -> Path | None:
    """Return the cache file of a data set; None without a home directory."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no home directory
        return None
    digest = hashlib.blake2b(os.fsencode(folder.absolute()), digest_size=8).hexdigest()
    return cache / "fpn_det" / f"pictures_{digest}.json"


def _read_cache(file: Path | None, decoders: str) -> dict[str, tuple[list[int], ImageInfo]]:
    if file is None:
        return {}
    try:
        content = json.loads(file.read_bytes())
        if content["decoders"] != decoders:
            return {}
        return {path: (stamp, ImageInfo(**info)) for path, (stamp, info) in content["images"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # missing or damaged
        return {}


def _write_cache(file: Path | None, decoders: str, seen: Mapping[str, tuple[list[int], ImageInfo]]) -> None:
    """Write the cache if possible; otherwise the next run inspects the files again."""
    if file is None:
        return
    content = {"decoders": decoders, "images": {path: (stamp, asdict(info)) for path, (stamp, info) in seen.items()}}
    unfinished = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(content))
        unfinished.replace(file)
    except OSError:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
