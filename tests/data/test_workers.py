from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch
from fpn_det.data.loading import EvalLoader, usual_bytes
from fpn_det.data.shared_memory import check_room

from fpn_det.annotations.reading import read_annotations
from fpn_det.data import shared_memory
from fpn_det.data.dataset import DetectionDataset
from fpn_det.data.transforms import Pipeline, ResizeShortestSide
from fpn_det.runtime import Ranks


@pytest.fixture
def small(monkeypatch, tmp_path) -> None:
    """64 MiB, as Docker gives."""
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=64 << 20))


def test_shared_memory_is_counted_before_workers_start(small, monkeypatch):
    image = 800 * 1088 * 3  # 2.49 MiB
    check_room(image, 2, 4, 3)  # 4 * 3 * 2 = 24 of them: 60 MiB
    check_room(image, 1000, 0, 3)  # without workers nothing is shared
    with pytest.raises(
        ValueError, match=r"data\.num_workers=4: expected 478 MiB .* got 64 MiB free in .*docker run --shm-size=1g"
    ):
        check_room(image, 16, 4, 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="of each of 32 workers"):
        check_room(image, 2, 4, 3)


def test_what_travels_depends_on_where_it_is_resized(document, write, pictures, small):
    dataset = DetectionDataset(
        read_annotations(write(document), pictures), Pipeline([ResizeShortestSide([480, 4800], 6400)]), seed=0
    )
    # 48 x 64 is the usual size, and 4800 x 6400 the most that becomes of it
    assert usual_bytes(dataset, "batch", "device") == 48 * 64 * 3
    assert usual_bytes(dataset, "batch", "worker") == 4800 * 6400 * 3
    assert usual_bytes(dataset, (32, 64), "worker") == 32 * 64 * 3
    with pytest.raises(ValueError, match=r"data\.num_workers=1: expected"):
        EvalLoader(dataset, 1, Ranks(), 1, 32, "batch", torch.device("cpu"))
    EvalLoader(dataset, 1, Ranks(), 1, 32, "batch", torch.device("cpu"), "device")
