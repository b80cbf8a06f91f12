"""Video files: their frames, one after the other in constant memory, and new files of drawn frames; the only PyAV.

A frame is upright: the rotation in the file's display matrix is applied, as players do. Sound is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fpn_det.image_io import MAX_PIXELS, BadImage

try:
    import av
except ImportError:
    av = None

T = TypeVar("T")

ENCODERS = ("libx264", "mpeg4")  # the first that PyAV's build has; mpeg4 is part of every build
DEFAULT_RATE = Fraction(25)  # frames per second of a file that states none
# What a file states of itself may be off by this much without a fault.
TOLERANCE_S, TOLERANCE = 0.5, 0.02
ONLY_LOCAL = {"protocol_whitelist": "file"}  # a playlist in place of a video must not fetch anything


def check_support(path: Path) -> None:
    """Check that videos can be read.

    Raises:
        ValueError: PyAV is not installed.
    """
    if av is None:
        raise ValueError(
            f"{path}: expected PyAV, which reads videos, got none. Install it: pip install 'fpn_det[video]'."
        )


@dataclass(frozen=True)
class VideoHeader:
    """Statements of a video file about itself."""

    rate: Fraction  # frames per second, on average
    num_frames: int  # estimated where the file only states its duration; 0 if it states neither


def read_header(path: Path) -> VideoHeader:
    """Read the header of a video file.

    Raises:
        BadImage: it cannot be opened, or has no pictures.
        ValueError: PyAV is not installed.
    """
    with _opened(path) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate or DEFAULT_RATE
        count = stream.frames or (round(container.duration * rate / av.time_base) if container.duration else 0)
    return VideoHeader(Fraction(rate), max(count, 0))


def read_frames(path: Path, max_pixels: int = MAX_PIXELS) -> Iterator[np.ndarray]:
    """Yield the frames of a video file in their order, u8 [h, w, 3] RGB.

    Args:
        path: of the file.
        max_pixels: largest width * height.

    Raises:
        BadImage: the file cannot be opened, has no pictures, or is damaged or truncated, after the frames that could be read.
        ValueError: PyAV is not installed.
    """
    count, num_packets, end_s, is_cut, problem = 0, 0, 0.0, False, ""
    with _opened(path) as (container, stream):
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > max_pixels:
            raise BadImage(
                path,
                f"{path}: expected at most {max_pixels:,} pixels, got {width} x {height}. Set data.max_image_pixels.",
            )
        stream.thread_type = "AUTO"
        try:
            for packet in container.demux():  # of all streams: the last one shows where the file ends
                if packet.pts is not None:
                    end_s = max(end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                if packet.stream is not stream:
                    continue
                if packet.size:
                    num_packets += 1
                    is_cut = packet.is_corrupt
                try:
                    frames = packet.decode()
                except av.FFmpegError:
                    if count:
                        raise
                    continue  # a recording may begin within a group of pictures
                for frame in frames:
                    yield _upright(frame)
                    count += 1
        except av.FFmpegError as error:
            problem = error.strerror or str(error)
        # within the last packet, or after it
        if not problem and (is_cut or _is_truncated(container, stream, end_s, num_packets)):
            problem = "the file ends"
    if not count:
        raise BadImage(path, f"{path}: expected a video, got a file of which no frame can be decoded.")
    if problem:
        raise BadImage(
            path,
            f"{path}: expected a complete video, got {count:,} frames and then: {problem}. Copy or download it again.",
        )


def _is_truncated(container: Any, stream: Any, end_s: float, num_packets: int) -> bool:
    """Compare the end of a file with the duration that it states, if it does."""
    duration_s, start_s = ((value or 0) / av.time_base for value in (container.duration, container.start_time))
    missing_s = duration_s - (end_s - start_s)
    if container.format.name == "avi":  # its duration is only estimated from the size of the file
        missing_s = float((stream.frames - num_packets) / (stream.average_rate or DEFAULT_RATE))
    return missing_s > max(TOLERANCE_S, TOLERANCE * duration_s)


def read_frame(path: Path, number: int, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode one frame, and to that end those before it.

    Raises:
        BadImage: it cannot be decoded.
    """
    frame = next(islice(read_frames(path, max_pixels), number, None), None)
    if frame is None:
        raise BadImage(path, f"{path}: expected a frame of number {number}, got fewer frames.")
    return frame


def read_batches(path: Path, batch_size: int, max_pixels: int = MAX_PIXELS) -> Iterator[list[np.ndarray]]:
    """Yield the frames of a video in lists of `batch_size`, the last one shorter. The next list is decoded in a thread.

    Raises:
        BadImage: as `read_frames`, after all frames that could be read.
    """

    def collect() -> Iterator[list[np.ndarray]]:
        batch: list[np.ndarray] = []
        problem = None
        try:
            for frame in read_frames(path, max_pixels):
                batch.append(frame)
                if len(batch) == batch_size:
                    yield batch
                    batch = []
        except BadImage as error:
            problem = error
        if batch:
            yield batch
        if problem is not None:
            raise problem

    return _ahead(collect())


class VideoWriter:
    """Writes frames to an MP4 file, which appears under its name once it is complete.

    Args:
        path: of the file; its folder must exist.
        rate: frames per second.
    """

    def __init__(self, path: Path, rate: Fraction) -> None:
        self.path = path
        self._rate = rate.limit_denominator(1001)  # of 30000 / 1001; a time base has few digits in MPEG-4
        self._unfinished = path.with_name(f".unfinished_{path.name}")
        self._container: Any = None
        self._stream: Any = None

    def add(self, pixels: np.ndarray) -> None:
        """Write a frame, u8 [h, w, 3]. A frame of another size than the first is scaled to that."""
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        if self._container is None:
            self._open(*pixels.shape[:2])
        self._container.mux(self._stream.encode(self._converted(frame)))

    def close(self) -> None:
        """Complete the file. Without frames there is none."""
        if self._container is not None:
            self._container.mux(self._stream.encode(None))
            self._container.close()
            self._unfinished.replace(self.path)

    def _open(self, height: int, width: int) -> None:
        encoder = next(name for name in ENCODERS if name in av.codecs_available)
        self._container = av.open(f"file:{self._unfinished}", "w", format="mp4")
        self._stream = self._container.add_stream(encoder, rate=self._rate)
        self._stream.width, self._stream.height = width, height
        # the usual format holds color for pairs of rows and columns
        is_odd = encoder == "libx264" and (height % 2 or width % 2)
        self._stream.pix_fmt = "yuv444p" if is_odd else "yuv420p"
        self._stream.codec_context.colorspace = av.video.reformatter.Colorspace.ITU709
        self._stream.codec_context.color_range = av.video.reformatter.ColorRange.MPEG

    def _converted(self, frame: Any) -> Any:
        stream = self._stream
        return frame.reformat(
            stream.width, stream.height, stream.pix_fmt, dst_colorspace="ITU709", dst_color_range="MPEG"
        )


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open a video file; yields its container and its stream of pictures."""
    check_support(path)
    if not path.is_file():
        raise BadImage(path, f"{path}: expected a video, got no regular file.")
    try:
        container = av.open(f"file:{path}", options=ONLY_LOCAL)
    except (av.FFmpegError, UnicodeError) as error:
        size = path.stat().st_size
        got = f"{size:,} bytes that cannot be opened: {getattr(error, 'strerror', error)}" if size else "an empty file"
        raise BadImage(path, f"{path}: expected a video, got {got}. Copy or download it again.") from error
    with container:
        # a song may have its cover as a stream of pictures
        pictures = (one for one in container.streams.video if not one.disposition & av.stream.Disposition.attached_pic)
        stream = next(pictures, None)
        if stream is None:
            found = ", ".join(sorted({one.type for one in container.streams})) or "nothing"
            raise BadImage(path, f"{path}: expected a video, got a file without pictures: {found}.")
        yield container, stream


def _upright(frame: Any) -> np.ndarray:
    """Return the pixels of a frame, rotated as its display matrix says."""
    pixels = frame.to_ndarray(format="rgb24")
    quarters = round(frame.rotation / 90) % 4  # counterclockwise
    return np.ascontiguousarray(np.rot90(pixels, quarters)) if quarters else pixels


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield items while the next one is made in a thread."""
    with ThreadPoolExecutor(1) as pool:
        task = pool.submit(next, items, None)
        while (item := task.result()) is not None:
            task = pool.submit(next, items, None)
            yield item
