from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from videos import RATE, counted_frames, write_sound, write_video

from fpn_det.image_io import BadImage
from fpn_det.inference import video
from fpn_det.inference.video import VideoWriter, read_batches, read_frame, read_frames, read_header

pytest.importorskip("av")


def number_of(pixels: np.ndarray) -> int:
    """The number of a frame of `counted_frames`, from its brightness in the center."""
    height, width = pixels.shape[:2]
    return round((float(pixels[height // 2, width // 2].mean()) - 20) / 5)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".avi", ".ts"])
def test_every_frame_is_read_once_and_in_order(tmp_path, suffix):
    file = write_video(tmp_path / f"clip{suffix}", counted_frames(30))
    frames = list(read_frames(file))
    assert [number_of(pixels) for pixels in frames] == list(range(30))
    assert all(pixels.shape == (96, 128, 3) and pixels.dtype == np.uint8 for pixels in frames)
    red, grey = frames[10][8, 8].astype(int), frames[10][50, 100].astype(int)
    assert abs(red - [255, 0, 0]).max() < 12 and abs(grey - 70).max() < 4
    header = read_header(file)
    assert header.rate == RATE and header.num_frames == 30
    assert number_of(read_frame(file, 17)) == 17
    with pytest.raises(BadImage, match="expected a frame of number 30, got fewer"):
        read_frame(file, 30)


@pytest.mark.parametrize(("rotation", "corner"), [(90, (-8, 8)), (180, (-8, -8)), (-90, (8, -8))])
def test_the_rotation_of_the_camera_is_applied(tmp_path, rotation, corner):
    """A turn by 90 degrees counterclockwise brings the upper left corner to the lower left."""
    file = write_video(tmp_path / "clip.mp4", counted_frames(3), rotation=rotation)
    for pixels in read_frames(file):
        assert pixels.shape == ((96, 128, 3) if rotation == 180 else (128, 96, 3))
        assert abs(pixels[corner].astype(int) - [255, 0, 0]).max() < 12


@pytest.mark.parametrize("size", [(96, 128), (97, 128), (96, 129)])
def test_a_written_video_has_the_frames_size_and_rate(tmp_path, size):
    frames = counted_frames(20, *size)
    writer = VideoWriter(tmp_path / "out.mp4", Fraction(24000, 1001))
    for pixels in frames:
        writer.add(pixels)
        assert not (tmp_path / "out.mp4").exists()
    writer.close()
    assert [file.name for file in tmp_path.iterdir()] == ["out.mp4"]
    found = list(read_frames(tmp_path / "out.mp4"))
    assert len(found) == 20 and read_header(tmp_path / "out.mp4").rate == Fraction(24000, 1001)
    for pixels, expected in zip(found, frames, strict=True):
        assert pixels.shape == expected.shape
        assert abs(pixels[8, 8].astype(int) - expected[8, 8]).max() < 12
        assert abs(pixels[60, 100].astype(int) - expected[60, 100]).max() < 4


def test_frames_of_another_size_are_scaled_to_the_first(tmp_path):
    writer = VideoWriter(tmp_path / "out.mp4", RATE)
    for side in (96, 48):
        writer.add(np.full((side, side, 3), 200, np.uint8))
    writer.close()
    assert [pixels.shape for pixels in read_frames(tmp_path / "out.mp4")] == [(96, 96, 3)] * 2


def test_without_frames_no_file_is_written(tmp_path):
    VideoWriter(tmp_path / "out.mp4", RATE).close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_a_truncated_video_gives_its_frames_and_then_one_sentence(tmp_path, suffix):
    random = np.random.default_rng(0)
    noise = [random.integers(0, 256, (96, 128, 3), dtype=np.uint8) for _ in range(60)]
    file = write_video(tmp_path / f"clip{suffix}", noise)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    batches = []
    with pytest.raises(BadImage, match=r"clip.*: expected a complete video, got \d+ frames and then: .*\.") as error:
        for batch in read_batches(file, 8):
            batches.append(len(batch))
    assert "\n" not in str(error.value)
    assert set(batches[:-1]) == {8} and 15 < sum(batches) < 45


@pytest.mark.parametrize("suffix", [".mp4", ".avi"])
def test_a_video_that_is_cut_within_its_last_frame_is_not_complete(tmp_path, suffix):
    random = np.random.default_rng(0)
    noise = [random.integers(0, 256, (96, 128, 3), dtype=np.uint8) for _ in range(5)]
    content = write_video(tmp_path / f"clip{suffix}", noise, rate=Fraction(5)).read_bytes()
    end = content.rindex(b"idx1") if suffix == ".avi" else len(content)
    file = tmp_path / f"cut{suffix}"
    file.write_bytes(content[: end - 1000])
    with pytest.raises(BadImage, match=r"cut.*: expected a complete video, got [45] frames and then: the file ends\."):
        list(read_frames(file))


def test_files_without_frames_are_refused_in_one_sentence(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video" * 100)
    (tmp_path / "folder.mp4").mkdir()
    whole = write_video(tmp_path / "whole.mp4", counted_frames(9)).read_bytes()
    (tmp_path / "no_index.mp4").write_bytes(whole.replace(b"moov", b"none"))
    write_sound(tmp_path / "sound.mp4")
    for name, message in (
        ("empty.mp4", "expected a video, got an empty file"),
        ("text.mp4", "expected a video, got 800 bytes that cannot be opened"),
        ("folder.mp4", "expected a video, got no regular file"),
        ("none.mp4", "expected a video, got no regular file"),
        ("no_index.mp4", "bytes that cannot be opened"),
        ("sound.mp4", "expected a video, got a file without pictures: audio"),
    ):
        for read in (read_header, lambda path: list(read_frames(path))):
            with pytest.raises(BadImage, match=message) as error:
                read(tmp_path / name)
            assert error.value.path == tmp_path / name and str(error.value).startswith(str(tmp_path / name))


def test_a_playlist_fetches_nothing(tmp_path):
    (tmp_path / "list.mp4").write_text(
        "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"
    )
    with pytest.raises(BadImage):
        list(read_frames(tmp_path / "list.mp4"))


def test_a_frame_with_too_many_pixels_is_refused(tmp_path):
    file = write_video(tmp_path / "clip.mp4", counted_frames(3))
    with pytest.raises(BadImage, match="expected at most 1,000 pixels, got 128 x 96"):
        list(read_frames(file, max_pixels=1000))


def test_names_with_colons_spaces_and_percent_signs_are_files(tmp_path):
    file = write_video(tmp_path / "a.mp4", counted_frames(3)).rename(tmp_path / "http: %03d, 1.mp4")
    assert len(list(read_frames(file))) == 3


def test_batches_hold_all_frames_in_order(tmp_path):
    file = write_video(tmp_path / "clip.mp4", counted_frames(11))
    batches = list(read_batches(file, 4))
    assert [len(batch) for batch in batches] == [4, 4, 3]
    assert [number_of(pixels) for batch in batches for pixels in batch] == list(range(11))


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "av", None)
    with pytest.raises(
        ValueError, match=r"clip.mp4: expected PyAV, .* got none. Install it: pip install 'fpn_det\[video\]'"
    ):
        read_header(tmp_path / "clip.mp4")
