"""Video files for tests, written by PyAV."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

RATE = Fraction(30000, 1001)


def write_video(
    path: Path, frames: Sequence[np.ndarray], codec: str = "mpeg4", rotation: int = 0, rate: Fraction = RATE
) -> Path:
    """Write frames u8 [h, w, 3]; players turn them counterclockwise by `rotation` degrees."""
    import av

    # with the index in front, a cut file can be opened
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        if rotation:
            stream.set_display_rotation(rotation)
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def write_sound(path: Path) -> Path:
    """Write a file with half a second of silence and no pictures."""
    import av

    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def counted_frames(count: int, height: int = 96, width: int = 128) -> list[np.ndarray]:
    """Grey frames, brighter from one to the next, with a red upper left corner."""
    frames = []
    for number in range(count):
        pixels = np.full((height, width, 3), 20 + 5 * number, np.uint8)
        pixels[: height // 4, : width // 4] = 255, 0, 0
        frames.append(pixels)
    return frames
