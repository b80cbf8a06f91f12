"""Decoding of image files; the only place where images are decoded.

Pixels are RGB in 8 bits, or what a `PixelFormat` says: any number of channels, with the values of the file.

The orientation is that of Pillow's `exif_transpose` for every format and decoder, so the original frame is the upright
image. `image_size`, `verify_image` and `read_image` agree on it. Files are untrusted: only regular files are opened, and
the size that a header claims is checked before memory is allocated.
"""

from __future__ import annotations

import io
import logging
import os
import re
import stat
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, get_args

import cv2
import numpy as np
from PIL import ExifTags, Image

from fpn_det.array_io import NPY_MAGIC, TIFF_MAGIC, StoredArray, is_array, open_array

MAX_PIXELS = 1 << 28  # default limit of width * height: 768 MiB of RGB
MAX_PNG_CHUNKS = 1 << 20
MAX_BYTES_PER_PIXEL, MAX_METADATA_BYTES = 8, 1 << 24  # limits of the file size
Image.MAX_IMAGE_PIXELS = None  # replaced by the limit of this module, which also applies to OpenCV
warnings.filterwarnings("ignore", module=r"PIL\.")  # such as corrupt EXIF data, which has no effect on the pixels
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)  # `array_io` may read what it cannot

# Suffixes of files that are taken for images in a folder, see `only_images`. HEIC files are listed to be refused with a reason.
IMAGE_SUFFIXES = frozenset(
    ".avif .bmp .dib .gif .heic .heif .j2k .jfif .jp2 .jpe .jpeg .jpg .mpo .npy .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split()
)

JPEG_MAGIC = b"\xff\xd8"
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


Dtype = Literal["uint8", "uint16", "float32"]
SHORT = {"uint8": "8 bits", "uint16": "16 bits"}


@dataclass(frozen=True)
class PixelFormat:
    """Channels and dtype of decoded images."""

    channels: int = 3
    dtype: str = "uint8"  # numpy's name

    def __str__(self) -> str:
        return f"{self.channels} channel{'s' * (self.channels != 1)} of {SHORT.get(self.dtype, self.dtype)}"

    @property
    def bytes_per_pixel(self) -> int:
        return self.channels * np.dtype(self.dtype).itemsize

    @property
    def settings(self) -> str:
        """The words by which files of this format are read; numbers of other types become float32."""
        dtype = self.dtype if self.dtype in get_args(Dtype) else "float32"
        return f"data.channels={self.channels} data.dtype={dtype}"


RGB = PixelFormat()  # pictures, for people: any file with up to four channels is read in this format


@dataclass(frozen=True)
class ImageHeader:
    """Properties of an image file that can be read without decoding its pixels."""

    height: int  # px, upright
    width: int  # px, upright
    orientation: int  # EXIF, 1..8; the stored image is rotated by 90 degrees from 5 on
    format: str  # Pillow's name; NPY for arrays
    stored: PixelFormat  # of the file


def read_image(
    path: Path, reduction: int = 1, max_pixels: int = MAX_PIXELS, pixel_format: PixelFormat = RGB
) -> np.ndarray:
    """Decode an image file to the upright image [h, w, C].

    RGB: grey is repeated, 16-bit values are shifted to 8 bits, transparency is ignored, and of several frames the first is
    returned. Any other format: the values of the file, which must be of that format; floating-point numbers and wider
    integers are converted to float32.

    Args:
        path: of the file.
        reduction: 2, 4 or 8 decodes a JPEG file at that fraction of its size, which is faster; sides are rounded up. Of
            RGB only.
        max_pixels: largest width * height.
        pixel_format: of the result.

    Raises:
        BadImage: the file is missing, not a regular file, empty, truncated, too large, not an image, or of another format.
    """
    return decode_image(read_file(path, max_pixels, pixel_format), path, reduction, max_pixels, pixel_format)


def read_for_display(path: Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image file to u8 [h, w, 3] for people.

    Of more or fewer than three channels the first three are shown, or the first as grey. Values of more than 8 bits are
    stretched from their 2nd to their 98th percentile, channel by channel.

    Raises:
        BadImage: see `read_image`.
    """
    content = read_file(path, max_pixels)
    try:
        picture, header = _open_image(content, path, max_pixels)
    except BadImage:
        if not is_array(content):
            raise
        return to_display(_decode_values(content, path, max_pixels)[0])
    if header.stored.dtype == "uint8":
        return decode_image(content, path, max_pixels=max_pixels)
    with _refusing_what_exceeds_memory(content, path):
        if header.format == "TIFF" and header.stored.channels > 1:
            with suppress(BadImage):  # without tifffile: Pillow has the upper 8 bits of such files
                return to_display(_decode_values(content, path, max_pixels)[0])
        pixels = _upright(_picture_values(picture, header, content, path), header.orientation)
        return to_display(pixels.astype(header.stored.dtype, copy=False))


def to_display(pixels: np.ndarray) -> np.ndarray:
    """Convert pixels [h, w, C] of any dtype to u8 [h, w, 3], see `read_for_display`."""
    shown = pixels[..., :3] if pixels.shape[2] >= 3 else np.repeat(pixels[..., :1], 3, axis=2)
    if shown.dtype == np.uint8:
        return np.ascontiguousarray(shown)
    low, high = np.percentile(shown, (2, 98), axis=(0, 1)).astype(np.float32)
    share = (shown.astype(np.float32) - low) / np.maximum(high - low, np.float32(1e-6))
    return (share.clip(0, 1) * 255).round().astype(np.uint8)


def only_images(paths: Iterable[Path]) -> list[Path]:
    """Select the image files among paths, by their suffix. A .npy file beside an image of the same name is a cache of it."""
    images = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]
    others = {path.with_suffix("") for path in images if path.suffix.lower() != ".npy"}
    return [path for path in images if path.suffix.lower() != ".npy" or path.with_suffix("") not in others]


def read_file(path: Path, max_pixels: int = MAX_PIXELS, pixel_format: PixelFormat = RGB) -> bytes:
    """Read the content of a regular file.

    Raises:
        BadImage: it cannot be read, is not a regular file, is empty, or is larger than any image of `max_pixels`.
    """
    with _open_regular(path) as file:
        widest = max(MAX_BYTES_PER_PIXEL, 2 * pixel_format.bytes_per_pixel)  # float64 becomes float32
        size, limit = os.fstat(file.fileno()).st_size, max_pixels * widest + MAX_METADATA_BYTES
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


def decode_image(
    content: bytes, path: Path, reduction: int = 1, max_pixels: int = MAX_PIXELS, pixel_format: PixelFormat = RGB
) -> np.ndarray:
    """Decode the content of an image file; see `read_image`.

    Args:
        content: of the file.
        path: for messages.
        reduction, max_pixels, pixel_format: as of `read_image`.
    """
    if pixel_format != RGB:
        return _decode_values(content, path, max_pixels, pixel_format)[0]
    with _refusing_what_exceeds_memory(content, path):
        if content.startswith(NPY_MAGIC):
            return _decode_array_to_rgb(content, path, max_pixels)
        picture, header = _open_image(content, path, max_pixels)
        if header.format in OPENCV_FORMATS:
            flags = COLOR | (REDUCED[reduction] if content.startswith(JPEG_MAGIC) else 0)
            pixels = _decode_opencv(content, flags)
            if pixels is not None:
                return _upright(pixels, header.orientation)
        return _decode_pillow(picture, header, path, len(content))


@contextmanager
def _refusing_what_exceeds_memory(content: bytes, path: Path) -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise BadImage(
            path, f"{path}: expected an image that fits into memory, got one of {len(content):,} bytes that does not."
        ) from error


def verify_image(
    content: bytes, path: Path, max_pixels: int = MAX_PIXELS, pixel_format: PixelFormat | None = RGB
) -> ImageHeader:
    """Check that the content of an image file decodes, at reduced size where that is faster, and return its header.

    Args:
        content: of the file.
        path: for messages.
        max_pixels: as of `read_image`.
        pixel_format: None takes any.

    Raises:
        BadImage: `decode_image` would raise it.
    """
    if pixel_format is None:
        try:
            return verify_image(content, path, max_pixels)
        except BadImage:
            return _decode_values(content, path, max_pixels)[1]
    if pixel_format != RGB:
        return _decode_values(content, path, max_pixels, pixel_format)[1]
    if content.startswith(NPY_MAGIC):
        decode_image(content, path, max_pixels=max_pixels)
        return _header_of(_open_stored(content, path, max_pixels))
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
            return _size_in(file)
    except Exception:  # the readers raise many types for broken files
        return None


def _size_in(file: BinaryIO) -> tuple[int, int]:
    start = file.read(len(NPY_MAGIC))
    file.seek(0)
    if not start.startswith(NPY_MAGIC):
        try:
            picture = Image.open(file)
            if picture.width * picture.height > MAX_PIXELS and picture.format == "PNG":
                return picture.height, picture.width  # its orientation may need decoding
            header = _read_header(picture, file)
            return header.height, header.width
        except Exception:
            if not is_array(start):
                raise
    header = _header_of(open_array(file))  # .npy, or a TIFF file that Pillow does not read
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


def image_to_values(picture: Image.Image) -> np.ndarray:
    """Convert a PIL image to its values [h, w, C], upright, as `read_image` returns them for its file in another format than RGB."""
    picture.load()  # a TIFF image is upright only after this
    return _upright(_values_of(picture), _orientation(picture.getexif()))


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


# Channels and dtype of Pillow's modes.
MODES = {
    "1": PixelFormat(1),
    "L": PixelFormat(1),
    "LA": PixelFormat(2),
    "RGBA": PixelFormat(4),
    "CMYK": PixelFormat(4),
    "I": PixelFormat(1, "int32"),
    "F": PixelFormat(1, "float32"),
}
BITS_PER_SAMPLE, SAMPLES_PER_PIXEL = 258, 277  # tags of TIFF
PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}  # by color type; a palette has RGB


def _format_of(picture: Image.Image, start: bytes) -> PixelFormat:
    """Channels and dtype of an opened picture, whose file begins with `start`."""
    if picture.format == "PNG":
        return PixelFormat(PNG_CHANNELS.get(start[25], 3), "uint16" if start[24] == 16 else "uint8")
    if picture.mode.startswith("I;16"):
        return PixelFormat(1, "uint16")
    if picture.format == "TIFF":  # whose samples of 16 bits have a mode of 8 bits
        tags = picture.tag_v2  # type: ignore[attr-defined]
        samples, bits = tags.get(SAMPLES_PER_PIXEL, 1), tags.get(BITS_PER_SAMPLE, (1,))
        if samples > 1:
            return PixelFormat(samples, "uint16" if max(bits) > 8 else "uint8")
    return MODES.get(picture.mode, RGB)


def _open_stored(content: bytes, path: Path, max_pixels: int) -> StoredArray:
    """Open an array without decoding it, and check the size that it claims."""
    try:
        stored = open_array(io.BytesIO(content))
    except ValueError as error:
        raise BadImage(path, f"{path}: {error}.") from None
    if stored.height * stored.width > max_pixels:
        raise BadImage(path, _too_large(path, max_pixels, stored.width, stored.height))
    return stored


def _decode_stored(stored: StoredArray, path: Path) -> np.ndarray:
    """Decode an opened array to [h, w, C], as stored."""
    try:
        return stored.decode()
    except ValueError as error:
        raise BadImage(path, f"{path}: {error}.") from None


def _header_of(stored: StoredArray) -> ImageHeader:
    sides = (stored.height, stored.width) if stored.orientation < 5 else (stored.width, stored.height)
    return ImageHeader(*sides, stored.orientation, stored.kind, PixelFormat(stored.channels, stored.dtype))


def _decode_values(
    content: bytes, path: Path, max_pixels: int, wanted: PixelFormat | None = None
) -> tuple[np.ndarray, ImageHeader]:
    """Decode to the values of the file, upright [h, w, C].

    Args:
        content, path, max_pixels: as of `decode_image`.
        wanted: format that the file must have; None takes any of at most MAX_BYTES_PER_PIXEL on average.
    """
    with _refusing_what_exceeds_memory(content, path):
        if is_array(content):
            stored = _open_stored(content, path, max_pixels)
            header = _header_of(stored)
            limit = max_pixels * MAX_BYTES_PER_PIXEL
            if wanted is None and stored.num_bytes > limit:
                raise BadImage(path, f"{path}: expected an image of at most {limit:,} bytes, got {stored.num_bytes:,}.")
            _check_format(header.stored, wanted, path)
            pixels = _decode_stored(stored, path)
        else:
            picture, header = _open_image(content, path, max_pixels)
            _check_format(header.stored, wanted, path)
            pixels = _picture_values(picture, header, content, path)
        pixels = _upright(pixels, header.orientation)
        if wanted is not None and wanted.dtype == "float32":
            pixels = pixels.astype(np.float32, copy=False)
            if not np.isfinite(pixels).all():
                raise BadImage(path, f"{path}: expected finite values, got NaN or infinity. Replace them in the file.")
        return np.ascontiguousarray(pixels), header


def _picture_values(picture: Image.Image, header: ImageHeader, content: bytes, path: Path) -> np.ndarray:
    """Decode an opened picture to [h, w, C] in the format of its file."""
    stored = header.stored
    values = _decode_opencv(content, cv2.IMREAD_UNCHANGED) if header.format in OPENCV_FORMATS else None
    if values is not None:
        pixels = values.reshape(*values.shape[:2], -1)
        if pixels.shape[2] >= 3:
            # BGR or BGRA; of grey and alpha, OpenCV repeats the grey
            order = [0, 3] if stored.channels == 2 else [2, 1, 0, 3][: pixels.shape[2]]
            pixels = pixels[..., order]
        if PixelFormat(pixels.shape[2], pixels.dtype.name) == stored:
            return pixels
    _load(picture, path, len(content))
    return _values_of(picture)


def _values_of(picture: Image.Image) -> np.ndarray:
    """Values [h, w, C] of a decoded picture; colors of a palette as RGB."""
    if MODES.get(picture.mode, RGB) == RGB and not picture.mode.startswith("I;16"):
        picture = picture.convert("RGB")
    pixels = np.asarray(picture.convert("L") if picture.mode == "1" else picture)
    return pixels.reshape(*pixels.shape[:2], -1)


def _check_format(found: PixelFormat, wanted: PixelFormat | None, path: Path) -> None:
    """Refuse a file of another format. Any numbers may become float32."""
    if wanted is None:
        return
    if found.channels != wanted.channels or (found.dtype != wanted.dtype and wanted.dtype != "float32"):
        raise BadImage(
            path,
            f"{path}: expected {wanted}, as data.channels and data.dtype say, got {found}. Set {found.settings}.",
        )


def _decode_array_to_rgb(content: bytes, path: Path, max_pixels: int) -> np.ndarray:
    stored = _open_stored(content, path, max_pixels)
    pixels = _decode_stored(stored, path)  # an array has no orientation
    rgb = array_to_rgb(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    if rgb is None:
        found = PixelFormat(stored.channels, stored.dtype)
        raise BadImage(path, _no_picture(path, found))
    return rgb


def _no_picture(path: Path, found: PixelFormat) -> str:
    return f"{path}: expected a picture of 8 or 16 bits, got {found}. Set {found.settings}."


def _too_large(path: Path, max_pixels: int, width: int, height: int) -> str:
    return (
        f"{path}: expected at most {max_pixels:,} pixels, got {width} x {height}. "
        "Cut the image into tiles or set data.max_image_pixels."
    )


def _open_regular(path: Path) -> BinaryIO:
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
        if content.startswith(TIFF_MAGIC):
            stored = _open_stored(content, path, max_pixels)  # tells what is wrong with it, or what it holds
            found = PixelFormat(stored.channels, stored.dtype)
            raise BadImage(path, f"{path}: expected a picture, got {found}. Set {found.settings}.") from None
        reason = str(error).strip() or type(error).__name__
        reason = "the format is unknown" if "cannot identify" in reason else reason
        raise BadImage(
            path, f"{path}: expected a complete image, got {len(content):,} bytes that do not decode: {reason}."
        ) from error
    if header is None:
        raise BadImage(path, _too_large(path, max_pixels, width, height))
    return picture, header


def _read_header(picture: Image.Image, file: BinaryIO) -> ImageHeader:
    """Read the header of an image that was opened but not decoded."""
    kind = picture.format or ""
    place = file.tell()
    file.seek(0)
    stored = _format_of(picture, file.read(26))
    file.seek(place)
    width, height = picture.size
    if kind == "PNG" and "exif" not in picture.info and not _has_late_metadata(file):
        orientation = _orientation(Image.Image.getexif(picture))  # that of PngImageFile would decode the pixels
    else:
        orientation = _orientation(picture.getexif())
    if kind == "TIFF":  # Pillow 10.3 and later swap the sides already
        width, height = (int(picture.tag_v2[tag]) for tag in (256, 257))  # type: ignore[attr-defined]
    if orientation >= 5:
        width, height = height, width
    return ImageHeader(height, width, orientation, kind, stored)


def _has_late_metadata(file: BinaryIO) -> bool:
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
    """Transpose stored pixels [h, w, C] by their EXIF orientation."""
    if orientation == 1:
        return pixels
    pixels = np.ascontiguousarray(pixels)
    whole = pixels.view(f"V{pixels.shape[2] * pixels.itemsize}")[..., 0]  # [h, w]; moved twice as fast as by channels
    if orientation >= 5:
        whole = whole.T
    if orientation in (2, 3, 6, 7):
        whole = whole[:, ::-1]
    if orientation in (3, 4, 7, 8):
        whole = whole[::-1]
    return np.ascontiguousarray(whole)[..., None].view(pixels.dtype)


def _decode_opencv(content: bytes, flags: int) -> np.ndarray | None:
    """Decode with OpenCV; None if it fails. In memory, because from a path it fills truncated files with grey."""
    try:
        return cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error:
        return None


def _decode_pillow(picture: Image.Image, header: ImageHeader, path: Path, size: int) -> np.ndarray:
    """Decode an opened image with Pillow, which either succeeds or gives a reason."""
    _load(picture, path, size)
    try:
        return image_to_rgb(picture)
    except MemoryError:
        raise
    except Exception as error:  # a mode that has no RGB
        if header.stored.dtype != "uint8":
            raise BadImage(path, _no_picture(path, header.stored)) from None
        raise BadImage(path, f"{path}: {error}.") from error


def _load(picture: Image.Image, path: Path, size: int) -> None:
    """Let Pillow decode an opened image of `size` bytes."""
    try:
        picture.load()
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise many types for broken files
        reason = str(error).strip() or type(error).__name__
        raise BadImage(
            path, f"{path}: expected a complete image, got {size:,} bytes that do not decode: {reason}."
        ) from error


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
