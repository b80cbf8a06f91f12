"""The memory in which pixels travel from a worker to the main process, and whether there is room for it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path("/dev/shm")


class SharedBuffers:
    """A worker's buffers for pixels, used in turn; each grows to the largest batch that it has to hold."""

    def __init__(self, count: int) -> None:
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * count
        self.slot = count - 1  # the one handed out last

    def __call__(self, *shape: int) -> Tensor:
        """The next buffer, as u8 of this shape. What was in it is overwritten."""
        self.slot = (self.slot + 1) % len(self._buffers)
        size = int(np.prod(shape))
        if len(self._buffers[self.slot]) < size:
            self._buffers[self.slot] = torch.empty(size, dtype=torch.uint8).share_memory_()
        return self._buffers[self.slot][:size].view(shape)


def check_room(image_bytes: int, num_images: int, num_workers: int, num_buffers: int) -> None:
    """Whether the workers of all ranks of this machine can have their buffers.

    Args:
        image_bytes: of an image of the usual size.
        num_images: in a batch.
        num_buffers: of each worker, with a batch in each.

    Raises:
        ValueError: they cannot: later, the system would end a worker by a bus error.
    """
    if not num_workers or not FOLDER.is_dir():
        return
    workers = num_workers * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed, free = workers * num_buffers * num_images * image_bytes, shutil.disk_usage(FOLDER).free
    if needed > free:
        raise ValueError(
            f"data.num_workers={num_workers}: expected {needed >> 20} MiB of shared memory for {num_buffers} batches of {num_images} images "
            f"of each of {workers} workers, got {free >> 20} MiB free in {FOLDER}. Use fewer workers or smaller batches, or give the "
            f"container more: docker run --shm-size={max(2 * needed >> 30, 1)}g."
        )
