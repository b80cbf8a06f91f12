"""Arrays in files: NumPy's .npy, and TIFF with any number of channels and values of any width.

A header is read before any pixel, so that its claims can be checked before memory is allocated, and pixels never take more
than it claims. TIFF needs the package tifffile (extra `tiff`); of its vendor dialects nothing but the plain pages is read.
"""

from __future__ import annotations

import logging
import lzma
import math
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, BinaryIO

import numpy as np

NPY_MAGIC = b"\x93NUMPY"
TIFF_MAGIC = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
MAX_PAGES = 1024
REDUCED_OR_MASK = 1 | 4  # bits of a TIFF page's NewSubfileType
ORIENTATION = 274
MAX_TILE = 1 << 26  # values in a tile or strip that is larger than its image
# Compressions that tifffile unpacks without imagecodecs, but then whatever the size of the result.
UNPACKERS: dict[int, Callable[[], Any]] = {
    8: zlib.decompressobj,
    32946: zlib.decompressobj,
    34925: lzma.LZMADecompressor,
    50013: zlib.decompressobj,
}


@dataclass(frozen=True)
class StoredArray:
    """An image that was opened but not decoded."""

    height: int  # px, as stored
    width: int  # px, as stored
    channels: int
    dtype: str  # numpy's name
    orientation: int  # EXIF, 1..8
    kind: str  # NPY or TIFF
    decode: Callable[[], np.ndarray]  # gives [h, w, C], as stored, in the byte order of the machine

    @property
    def num_bytes(self) -> int:
        """Memory that the decoded pixels take."""
        return self.height * self.width * self.channels * np.dtype(self.dtype).itemsize


def is_array(content: bytes) -> bool:
    """True for the content, or its first bytes, of a file that `open_array` may read."""
    return content.startswith((NPY_MAGIC, *TIFF_MAGIC))


def open_array(file: BinaryIO) -> StoredArray:
    """Read the header of a .npy or TIFF file, whose pixels can be decoded while the file is open.

    An array is [h, w, C], or [h, w] for one channel. The channels of a TIFF file are the samples of its page, or its pages
    of one sample; pages of a reduced size and masks are left out.

    Raises:
        ValueError: it is damaged or holds something else; gives the reason only.
    """
    file.seek(0)
    is_npy = file.read(len(NPY_MAGIC)) == NPY_MAGIC
    file.seek(0)
    return _open_npy(file) if is_npy else _open_tiff(file)


def _open_npy(file: BinaryIO) -> StoredArray:
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    except Exception as error:  # a damaged header may raise anything
        raise ValueError(f"expected a complete .npy file, got a damaged header: {_first_line(error)}") from None
    if len(shape) not in (2, 3) or dtype.hasobject or dtype.kind not in "buif" or not math.prod(shape):
        raise ValueError(
            f"expected an array [h, w, C] or [h, w] of numbers, got {dtype} {list(shape)}. Move the channels to the end"
        )
    start, size = file.tell(), file.seek(0, os.SEEK_END)
    if size - start < math.prod(shape) * dtype.itemsize:
        raise ValueError(f"expected a complete .npy file, got {size:,} bytes that end too early")

    def decode() -> np.ndarray:
        file.seek(0)
        values = np.load(file, allow_pickle=False).reshape(*shape[:2], -1)
        return values.astype(dtype.newbyteorder("="), copy=False)

    return StoredArray(shape[0], shape[1], (*shape, 1)[2], dtype.name, 1, "NPY", decode)


def _open_tiff(file: BinaryIO) -> StoredArray:
    try:
        import tifffile
    except ImportError:
        raise ValueError("expected the package tifffile, got none. Install it: pip install 'fpn_det[tiff]'") from None
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # damage is an error here, not a message beside it
    try:
        pages = _plain_pages(tifffile.TiffFile(file, name="image"))  # that of an open file may be a number
        first = pages[0]
        shape, axes, dtype = tuple(first.shape), str(first.axes), np.dtype(first.dtype)
        tag = first.tags.get(ORIENTATION)
        orientation = int(tag.value) if tag is not None and tag.value in range(1, 9) else 1
    except Exception as error:  # the reader raises many types for broken files
        raise ValueError(f"expected a complete TIFF file, got a damaged header: {_first_line(error)}") from None
    sides = dict(zip(axes, shape, strict=True))
    samples = sides.get("S", 1)
    if set(axes) - set("YXS") or not {"Y", "X"} <= set(axes) or (samples > 1 and len(pages) > 1):
        raise ValueError(
            f"expected one page with its channels as samples, or a page for each channel, got {len(pages)} pages with axes {axes} "
            f"{list(shape)}"
        )
    if math.prod(first.chunks) > max(math.prod(shape), MAX_TILE):
        raise ValueError(f"expected tiles no larger than the image, got {list(first.chunks)} for {list(shape)}")

    def decode() -> np.ndarray:
        try:
            if find_spec("imagecodecs") is None:  # which stops at the declared size by itself
                for page in pages:
                    _check_unpacked_size(page, file)
            planes = [page.asarray() for page in pages]
        except MemoryError:
            raise
        except Exception as error:
            hint = ". Install it: pip install imagecodecs" if "imagecodecs" in str(error) else ""
            raise ValueError(
                f"expected a complete TIFF file, got pixels that do not decode: {_first_line(error)}{hint}"
            ) from None
        if len(planes) > 1 or samples == 1:
            return np.stack([plane.reshape(sides["Y"], sides["X"]) for plane in planes], axis=2)
        return np.moveaxis(planes[0], axes.index("S"), -1)

    channels = samples if len(pages) == 1 else len(pages)
    return StoredArray(sides["Y"], sides["X"], channels, dtype.name, orientation, "TIFF", decode)


def _plain_pages(file: Any) -> list[Any]:
    """The pages that show the image: those of the first one's size and type, without reduced ones and masks."""
    pages = [page.aspage() for _, page in zip(range(MAX_PAGES), file.pages, strict=False)]
    first = pages[0]
    return [
        page
        for page in pages
        if (page.shape, page.dtype, page.axes) == (first.shape, first.dtype, first.axes)
        and (page is first or not int(page.subfiletype) & REDUCED_OR_MASK)
    ]


def _check_unpacked_size(page: Any, file: BinaryIO) -> None:
    """Refuse a page whose compressed tiles or strips unpack to more than its header claims: a small file could fill the memory.

    Raises:
        ValueError: one does; or its compressed data is damaged, as zlib.error or lzma.LZMAError.
    """
    unpacker = UNPACKERS.get(int(page.compression))
    if unpacker is None:
        return
    most = math.prod(page.chunks) * page.dtype.itemsize
    for start, size in zip(page.dataoffsets, page.databytecounts, strict=True):
        file.seek(start)
        if len(unpacker().decompress(file.read(size), most + 1)) > most:
            raise ValueError(f"{size:,} bytes unpack to more than the {most:,} that the header claims")


def _first_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
