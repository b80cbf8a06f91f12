from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from fpn_det.annotations.reading import read_annotations
from fpn_det.data import image_cache
from fpn_det.data.dataset import DetectionDataset
from fpn_det.data.image_cache import ImageCache
from fpn_det.data.sampling import Key
from fpn_det.data.transforms import Pipeline
from fpn_det.image_io import read_image


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_cached_images_equal_decoded_ones(pictures, tmp_path, monkeypatch):
    cache = ImageCache(tmp_path)
    for number in (0, 1, 0):
        assert np.array_equal(cache.read(pictures / f"{number}.png"), read_image(pictures / f"{number}.png"))
    assert len(files(tmp_path)) == 2 and {path.suffix for path in files(tmp_path)} == {".npy"}
    monkeypatch.setattr(image_cache, "read_image", None)  # decoding would fail
    assert ImageCache(tmp_path).read(pictures / "1.png").shape == (64, 48, 3)


def test_a_file_that_changes_is_decoded_again(tmp_path):
    path = tmp_path / "a.png"
    cache = ImageCache(tmp_path / "cache")
    for value in (10, 20):
        cv2.imwrite(str(path), np.full((8, 8, 3), value, np.uint8))
        os.utime(path, ns=(value, value))
        assert cache.read(path)[0, 0, 0] == value
    with pytest.raises(ValueError, match=r"gone\.png: cannot be read"):
        cache.read(tmp_path / "gone.png")


def test_a_damaged_entry_is_written_again(pictures, tmp_path):
    cache = ImageCache(tmp_path)
    expected = cache.read(pictures / "0.png")
    (file,) = files(tmp_path)
    for content in (b"", file.read_bytes()[:100]):
        file.write_bytes(content)
        assert np.array_equal(cache.read(pictures / "0.png"), expected)
        assert np.array_equal(np.load(file), expected)


def test_a_full_disk_is_not_an_error(pictures, tmp_path, monkeypatch):
    cache = ImageCache(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=1000, free=100))
    assert cache.read(pictures / "0.png").shape == (48, 64, 3) and not files(tmp_path)
    monkeypatch.undo()

    def fail(file, pixels):
        raise OSError("no space left")

    monkeypatch.setattr(np, "save", fail)
    assert cache.read(pictures / "0.png").shape == (48, 64, 3) and not files(tmp_path)


def test_a_folder_that_cannot_be_created_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=r"data\.cache: expected a folder that can be written, got .*file/cache: Not a directory"
    ):
        ImageCache(tmp_path / "file" / "cache")


def test_a_data_set_does_not_depend_on_its_cache(document, write, pictures, tmp_path):
    annotations = read_annotations(write(document), pictures)
    plain, cached = (
        DetectionDataset(annotations, Pipeline([]), 0, read=read)
        for read in (read_image, ImageCache(tmp_path / "cache").read)
    )
    for _ in range(2):
        for index in range(8):
            assert np.array_equal(plain[Key(index, 0)].pixels, cached[Key(index, 0)].pixels)
    assert len(files(tmp_path / "cache")) == 8
