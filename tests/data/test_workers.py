from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch

from fpn_det.annotations.reading import read_annotations
from fpn_det.data import workers
from fpn_det.data.collation import Collator
from fpn_det.data.dataset import DetectionDataset
from fpn_det.data.loaders import EvalLoader, typical_bytes
from fpn_det.data.transforms import Pipeline, ResizeShortestSide
from fpn_det.data.workers import ReceivedBuffers, Workers, check_shared_memory
from fpn_det.runtime import Ranks


@pytest.fixture
def small(monkeypatch, tmp_path) -> None:
    """Limit shared memory to 64 MiB, the default of Docker."""
    monkeypatch.setattr(workers, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=64 << 20))


def test_shared_memory_is_counted_before_workers_start(small, monkeypatch):
    image = 800 * 1088 * 3  # 2.49 MiB
    check_shared_memory(image, 2, 4, 3)  # 4 * 3 * 2 = 24 of them: 60 MiB
    check_shared_memory(image, 1000, 0, 3)  # without workers no memory is shared
    with pytest.raises(
        ValueError, match=r"data\.num_workers=4: expected 478 MiB .* got 64 MiB free in .*docker run --shm-size=1g"
    ):
        check_shared_memory(image, 16, 4, 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="of each of 32 workers"):
        check_shared_memory(image, 2, 4, 3)


def test_shared_memory_depends_on_resize_on(document, write, pictures, small):
    dataset = DetectionDataset(
        read_annotations(write(document), pictures), Pipeline([ResizeShortestSide([480, 4800], 6400)]), seed=0
    )
    # 48 x 64 is the median size, and 4800 x 6400 the largest that it is resized to
    assert typical_bytes(dataset, Collator(32, "batch", "device")) == 48 * 64 * 3
    assert typical_bytes(dataset, Collator(32)) == 4800 * 6400 * 3
    assert typical_bytes(dataset, Collator(32, (32, 64))) == 32 * 64 * 3
    with pytest.raises(ValueError, match=r"data\.num_workers=1: expected"):
        EvalLoader(dataset, 1, Ranks(), Collator(32), Workers(1), torch.device("cpu"))
    EvalLoader(dataset, 1, Ranks(), Collator(32, resize_on="device"), Workers(1), torch.device("cpu"))


def test_received_buffers_are_page_locked_once_and_released():
    calls: list[tuple[str, int]] = []

    def register(address: int, size: int) -> bool:
        calls.append(("register", address))
        return size < 1000  # a larger one is refused

    buffers = ReceivedBuffers(register, lambda address: calls.append(("unregister", address)))
    small, other, large = (torch.empty(size, dtype=torch.uint8).untyped_storage() for size in (10, 20, 2000))
    for _ in range(3):
        buffers.keep((0, 0), small)
        buffers.keep((0, 1), other)
    assert calls == [("register", small.data_ptr()), ("register", other.data_ptr())]
    buffers.keep((0, 0), large)  # the worker has enlarged its buffer
    assert calls[2:] == [("unregister", small.data_ptr()), ("register", large.data_ptr())]
    buffers.close()
    assert calls[4:] == [("unregister", other.data_ptr())]
    buffers.close()
    assert len(calls) == 5


def test_workers_reuse_the_memory_of_their_buffers(document, write, pictures):
    """Page-locking pays only if the same few addresses come back."""
    dataset = DetectionDataset(read_annotations(write(document), pictures), Pipeline([]), seed=0)
    loader = EvalLoader(dataset, 1, Ranks(), Collator(32, (64, 96)), Workers(1), torch.device("cpu"))
    addresses, buffers = set(), ReceivedBuffers()
    for packed in loader._packed_batches:
        buffers.keep(packed.buffer, packed.pixels.untyped_storage())
        addresses.add(packed.pixels.data_ptr())
    assert len(addresses) == workers.BUFFERS_PER_WORKER
