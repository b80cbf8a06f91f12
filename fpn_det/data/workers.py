"""Worker processes: their start and end, and the shared memory through which they send pixels."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

PREFETCH = 2  # batches per worker that are ready or in the making
# One buffer more than prefetched batches: the main process reads one while the worker fills the others.
BUFFERS_PER_WORKER = PREFETCH + 1
PR_SET_PDEATHSIG = 1  # of Linux
SHARED_MEMORY = Path("/dev/shm")

StartMethod = Literal["fork", "spawn", "forkserver"]


@dataclass(frozen=True)
class Workers:
    """The processes that read and transform images."""

    count: int = 0  # 0 works in the main process
    start_method: StartMethod | None = None  # null = the platform's default


def load_in_workers(dataset: Dataset, keys: Iterable, workers: Workers) -> DataLoader:
    """Iterate over `dataset[key]` for each of the keys, in their order."""
    Finalize(None, _kill_workers, exitpriority=0)  # unlike atexit, it also runs in children of multiprocessing
    return DataLoader(
        dataset,
        sampler=keys,
        batch_size=None,  # an item is a whole batch
        collate_fn=_identity,
        num_workers=workers.count,
        prefetch_factor=PREFETCH if workers.count else None,
        worker_init_fn=_set_up_worker,
        persistent_workers=workers.count > 0,
        multiprocessing_context=workers.start_method if workers.count else None,
        generator=torch.Generator(),  # seeds the workers, which draw nothing from it; keeps the global generator as it is
    )


def _identity(item: Any) -> Any:
    return item


def _set_up_worker(worker: int) -> None:
    """Limit a worker to one thread, and leave the handling of signals to the main process.

    On Linux, the kernel kills the worker when the main process ends for any reason: it might wait forever to send a batch.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _kill_workers() -> None:
    """Kill the workers at exit: multiprocessing would send SIGTERM, which they ignore, and wait for them."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report their end as an error
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


class SharedBuffers:
    """A worker's ring of pixel buffers. Each buffer grows to the largest batch that it has held."""

    def __init__(self, count: int) -> None:
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * count
        self.current = count - 1  # index of the buffer returned last

    def __call__(self, *shape: int) -> Tensor:
        """Return the next buffer as a u8 tensor of this shape. Its previous content is lost."""
        self.current = (self.current + 1) % len(self._buffers)
        size = int(np.prod(shape))
        if len(self._buffers[self.current]) < size:
            self._buffers[self.current] = torch.empty(size, dtype=torch.uint8).share_memory_()
        return self._buffers[self.current][:size].view(shape)


class ReceivedBuffers:
    """Keeps the workers' buffers mapped in the main process from one use to the next, and page-locked for CUDA.

    From page-locked memory, CUDA copies directly and asynchronously. Otherwise the main process would have to copy the pixels of
    every batch to pinned memory first.

    Args:
        register: page-locks (address, bytes) and returns True on success; None does not page-lock.
        unregister: reverts it for an address.
    """

    def __init__(
        self, register: Callable[[int, int], bool] | None = None, unregister: Callable[[int], None] | None = None
    ) -> None:
        self._register = register
        self._unregister = unregister
        self._storages: dict[tuple[int, int], torch.UntypedStorage] = {}
        self._page_locked: set[tuple[int, int]] = set()

    def keep(self, buffer: tuple[int, int], storage: torch.UntypedStorage) -> None:
        """Keep the memory of a buffer until it is replaced by other memory, which happens when the worker enlarges it.

        Args:
            buffer: (worker, number).
            storage: its memory in this process.
        """
        known = self._storages.get(buffer)
        if known is not None and known.data_ptr() == storage.data_ptr():
            return
        self._release(buffer)
        self._storages[buffer] = storage
        if self._register is not None and self._register(storage.data_ptr(), storage.nbytes()):
            self._page_locked.add(buffer)

    def close(self) -> None:
        """Release all buffers. No copy from them may be in progress."""
        for buffer in list(self._storages):
            self._release(buffer)

    def _release(self, buffer: tuple[int, int]) -> None:
        storage = self._storages.pop(buffer, None)
        if storage is not None and buffer in self._page_locked:
            self._page_locked.remove(buffer)
            assert self._unregister is not None
            self._unregister(storage.data_ptr())


def cuda_host_register(address: int, size: int) -> bool:
    """Page-lock memory for CUDA; returns False if the driver refuses."""
    return int(torch.cuda.cudart().cudaHostRegister(address, size, 0)) == 0


def cuda_host_unregister(address: int) -> None:
    """Revert `cuda_host_register`."""
    torch.cuda.cudart().cudaHostUnregister(address)


def check_shared_memory(image_bytes: int, num_images: int, num_workers: int, num_buffers: int) -> None:
    """Check that shared memory suffices for the buffers of all workers of this machine.

    Without this check a worker would die of a bus error, which has no message.

    Args:
        image_bytes: of an image of median size.
        num_images: per batch.
        num_workers: of each rank.
        num_buffers: per worker; each holds a batch.

    Raises:
        ValueError: it does not.
    """
    if not num_workers or not SHARED_MEMORY.is_dir():
        return
    workers = num_workers * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed, free = workers * num_buffers * num_images * image_bytes, shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise ValueError(
            f"data.num_workers={num_workers}: expected {needed >> 20} MiB of shared memory for {num_buffers} batches of {num_images} images "
            f"of each of {workers} workers, got {free >> 20} MiB free in {SHARED_MEMORY}. Use fewer workers or smaller batches, or give the "
            f"container more: docker run --shm-size={max(2 * needed >> 30, 1)}g."
        )
