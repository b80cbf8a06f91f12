"""One look into every picture file: whether it decodes, how large it is, and what is in it, in bytes.

A look takes as long as reading and decoding, so many threads look at once, and what was seen is remembered under the
user's cache folder for as long as a file keeps its size and time of change.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
import PIL
from PIL import ExifTags, Image
from rich.console import Console
from rich.progress import track

from fpn_det.image_io import read_image

MOST_THREADS = 32
SEEN_WITH = f"1 {cv2.__version__} {PIL.__version__}"  # another decoder may see other things


@dataclass(frozen=True)
class ImageInfo:
    """What a picture file showed."""

    height: int = 0  # as a person sees it
    width: int = 0
    orientation: int = 1  # EXIF; from 5 on the sides are exchanged
    kind: str = ""  # Pillow's name of the format
    digest: str = ""  # of its bytes
    fault: str = ""  # why it cannot be used

    @property
    def is_turned(self) -> bool:
        return self.orientation >= 5


def inspect_images(paths: Iterable[str], folder: Path) -> dict[str, ImageInfo]:
    """A look at each of these files, from memory where nothing has changed since. Files that are not there are left out.

    Args:
        paths: the files.
        folder: under whose name the looks are remembered.
    """
    memory = _memory_of(folder)
    seen = _recall(memory)
    stamps = {path: stamp for path in dict.fromkeys(paths) if (stamp := _stamp(path)) is not None}
    new = [path for path, stamp in stamps.items() if path not in seen or seen[path][0] != stamp]
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        console = Console(stderr=True)
        looks = track(
            pool.map(_look, new),
            "looking at pictures",
            len(new),
            console=console,
            disable=not console.is_terminal or not new,
        )
        seen |= {path: (stamps[path], look) for path, look in zip(new, looks, strict=True)}
    if new:
        _remember(memory, seen)
    return {path: seen[path][1] for path in stamps}


def is_mislabeled(path: str, look: ImageInfo) -> bool:
    """Whether the ending of the file's name promises another format. It decodes all the same."""
    promised = Image.registered_extensions().get(os.path.splitext(path)[1].lower())
    return bool(promised and look.kind) and promised != look.kind and {promised, look.kind} != {"JPEG", "MPO"}


def _look(path: str) -> ImageInfo:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        return ImageInfo(fault=f"cannot be read: {error.strerror}")
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    if not content:
        return ImageInfo(digest=digest, fault="the file is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large pictures
            with Image.open(io.BytesIO(content)) as picture:
                (width, height), kind = picture.size, picture.format or ""
                orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow has many ways to refuse a broken header; `read_image` has the last word
        width, height, kind, orientation = 0, 0, "", 1
    try:
        # An eighth of the size is decoded in half of the time, and fails on the same files.
        small = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_REDUCED_GRAYSCALE_8) if height else None
        if small is None:
            height, width = read_image(Path(path)).shape[:2]
        elif orientation >= 5:
            height, width = width, height
    except (ValueError, cv2.error, MemoryError) as error:
        return ImageInfo(kind=kind, digest=digest, fault=str(error).removeprefix(f"{path}: "))
    return ImageInfo(height, width, orientation, kind, digest)


def _stamp(path: str) -> list[int] | None:
    """Size and time of change of a file; None if there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a null byte in the name
        return None
    return [status.st_size, status.st_mtime_ns]


def _memory_of(folder: Path) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (
        cache
        / "fpn_det"
        / f"pictures_{hashlib.blake2b(str(folder.absolute()).encode(), digest_size=8).hexdigest()}.json"
    )


def _recall(memory: Path) -> dict[str, tuple[list[int], ImageInfo]]:
    try:
        content = json.loads(memory.read_bytes())
        if content["seen_with"] != SEEN_WITH:
            return {}
        return {path: (stamp, ImageInfo(**look)) for path, (stamp, look) in content["looks"].items()}
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or half of one
        return {}


def _remember(memory: Path, seen: Mapping[str, tuple[list[int], ImageInfo]]) -> None:
    """Where the folder cannot be written, the next run looks again."""
    content = {"seen_with": SEEN_WITH, "looks": {path: (stamp, asdict(look)) for path, (stamp, look) in seen.items()}}
    unfinished = memory.with_suffix(f".{os.getpid()}")
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(content))
        unfinished.replace(memory)
    except OSError:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
