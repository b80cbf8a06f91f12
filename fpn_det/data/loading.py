"""Batches on the device, in time: worker processes read ahead, a side stream copies ahead.

What is in a batch follows from the step alone, never from the number of workers or from the time things take.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass, replace
from itertools import chain, count
from multiprocessing.util import Finalize
from typing import Any

import cv2
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from fpn_det.data.collation import Canvas, Parcel, ResizeOn, check_canvas, pack
from fpn_det.data.dataset import DetectionDataset, Example, Key
from fpn_det.data.largest_batch import largest_batch
from fpn_det.data.sampling import GlobalBatches, evaluation_batches, micro_batches
from fpn_det.data.shared_memory import SharedBuffers, check_room
from fpn_det.image_io import BadImage
from fpn_det.runtime import Ranks
from fpn_det.structures import Batch

PR_SET_PDEATHSIG = 1  # of Linux
READ_AHEAD = 2  # batches that each worker may have ready or in the making


class TrainLoader:
    """This rank's share of the global batches, `accumulate` micro-batches for each step, endless over the epochs.

    Args:
        batches: which images make a step.
        accumulate: micro-batches of a step.
        stride: what the canvas sides must divide by.
        canvas: `batch` or a fixed (H, W).
        resize_on: whether a worker makes the last flip and resize, or the device.
        start_method: of the workers: fork, spawn, forkserver, or None for the platform's own.
        tell: hears of each image that could not be used, when the batch arrives in which another one took its place.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        batches: GlobalBatches,
        ranks: Ranks,
        accumulate: int,
        num_workers: int,
        stride: int,
        canvas: Canvas,
        device: torch.device,
        resize_on: ResizeOn = "worker",
        start_method: str | None = None,
        tell: Callable[[BadImage], None] | None = None,
    ) -> None:
        num_images = batches.batch_size // (ranks.world_size * accumulate)
        check_room(usual_bytes(dataset, canvas, resize_on), num_images, num_workers, READ_AHEAD + 1)
        self._batches = batches
        self._ranks = ranks
        self._accumulate = accumulate
        self._maker = _BatchMaker(dataset, stride, canvas, resize_on)
        self._num_workers = num_workers
        self._device = device
        self._start_method = start_method
        self._tell = tell

    @property
    def steps_per_epoch(self) -> int:
        return self._batches.steps_per_epoch

    @property
    def batch_size(self) -> int:
        """Images of a step, over all ranks and micro-batches: what was asked for, or as many as the data set has."""
        return self._batches.batch_size

    def iterate(self, first_step: int) -> Iterator[Batch]:
        """The micro-batches of step `first_step` and of all that follow, on the device. Has its own workers."""
        return _on_device(self.parcels(first_step), self._device, self._tell)

    def parcels(self, first_step: int) -> Iterable[Parcel | ValueError]:
        """The same as the workers send them."""
        keys = chain.from_iterable(map(self.keys, count(first_step)))
        return _loader(self._maker, keys, self._num_workers, self._start_method)

    def rebuild(self, step: int) -> list[Batch]:
        """The micro-batches of one step, made again here and now, on the device."""
        return list(_on_device(map(self._maker.__getitem__, self.keys(step)), self._device, self._tell))

    def largest(self, num_images: int | None = None) -> Batch:
        """A micro-batch of this rank (or of `num_images`) that asks for the most memory, on the device; what it shows is black."""
        num_images = num_images or self.batch_size // (self._ranks.world_size * self._accumulate)
        maker = self._maker
        return largest_batch(maker.dataset, num_images, maker.stride, maker.canvas).to(self._device)

    def keys(self, step: int) -> list[list[Key]]:
        """Which images, of which epoch, this rank sees in each micro-batch of a step."""
        _, indices = self._batches.slice(step)
        rows, showings = (
            micro_batches(part, self._ranks, self._accumulate).tolist()
            for part in (indices, self._batches.showings(step))
        )
        return [list(zip(*pair, strict=True)) for pair in zip(rows, showings, strict=True)]


class EvalLoader:
    """This rank's images, once each; over all ranks every image exactly once. The order is by aspect ratio.

    Args:
        tell: hears of each image that cannot be used and is left out. Without, such an image is an error.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        batch_size: int,
        ranks: Ranks,
        num_workers: int,
        stride: int,
        canvas: Canvas,
        device: torch.device,
        resize_on: ResizeOn = "worker",
        start_method: str | None = None,
        tell: Callable[[BadImage], None] | None = None,
    ) -> None:
        batches = evaluation_batches(dataset.annotations.sizes, batch_size, ranks)
        check_room(usual_bytes(dataset, canvas, resize_on), batch_size, num_workers, READ_AHEAD + 1)
        keys = [[(index, 0) for index in batch.tolist()] for batch in batches]
        self._num_batches = len(keys)
        self._loader = _loader(
            _BatchMaker(dataset, stride, canvas, resize_on, tell is not None), keys, num_workers, start_method
        )
        self._device = device
        self._tell = tell

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        return _on_device(self._loader, self._device, self._tell)


class _BatchMaker(Dataset):
    """Makes whole batches from their keys, in a worker. What is wrong with the data travels back as a value.

    Raised in a worker, it would reach the user as a traceback of torch's loader.
    """

    def __init__(
        self, dataset: DetectionDataset, stride: int, canvas: Canvas, resize_on: ResizeOn, leave_out: bool = False
    ) -> None:
        if resize_on == "device":
            dataset.transform.check_resize_is_last()
        check_canvas(canvas, stride)
        self.dataset = dataset
        self.stride = stride
        self.canvas = canvas
        self._resize_on = resize_on
        self._leave_out = leave_out
        # one more than is read ahead: the main process copies out of one while the worker may fill the others
        self._buffers = SharedBuffers(READ_AHEAD + 1)

    def __getitem__(self, keys: list[Key]) -> Parcel | ValueError:
        examples: list[Example] = []
        bad: list[BadImage] = []
        try:
            for key in keys:
                try:
                    examples.append(self.dataset[key])
                except BadImage as error:
                    if not self._leave_out:
                        raise
                    bad.append(error)
            worker = get_worker_info()
            if worker is None or not examples:
                return pack(examples, self.stride, self.canvas, self._resize_on, bad)
            parcel = pack(examples, self.stride, self.canvas, self._resize_on, bad, self._buffers)
            return replace(parcel, slot=(worker.id, self._buffers.slot))
        except ValueError as error:
            return error


def usual_bytes(dataset: DetectionDataset, canvas: Canvas, resize_on: ResizeOn) -> int:
    """What an image of the usual size takes on its way from a worker."""
    sizes = dataset.annotations.sizes
    if not len(sizes):
        return 0
    height, width = sizes[sizes.prod(dim=1).argsort()[len(sizes) // 2]].tolist()
    if resize_on == "worker":
        height, width = dataset.transform.largest((height, width)) if canvas == "batch" else canvas
    return height * width * 3


def _loader(maker: _BatchMaker, keys: Iterable[list[Key]], num_workers: int, start_method: str | None) -> DataLoader:
    Finalize(None, _end_workers, exitpriority=0)  # unlike atexit, also in a process that multiprocessing has started
    return DataLoader(
        maker,
        sampler=keys,
        batch_size=None,  # an item is a batch already
        collate_fn=_as_it_is,
        num_workers=num_workers,
        prefetch_factor=READ_AHEAD if num_workers else None,
        worker_init_fn=_set_up_worker,
        persistent_workers=num_workers > 0,
        multiprocessing_context=start_method if num_workers else None,
        generator=torch.Generator(),  # it seeds workers, which draw nothing: the global generator is left alone
    )


def _as_it_is(item: Any) -> Any:
    return item


def _set_up_worker(worker: int) -> None:
    """A worker is one thread on one core, and leaves it to the main process what a signal to all processes means.

    It goes when the main process goes, however that ends: it might wait for ever to hand over its batch.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end_workers() -> None:
    """At exit, multiprocessing asks its daemons to end by SIGTERM and waits for them: ours would never hear it."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would take their end for an accident
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _receive(
    items: Iterable[Parcel | ValueError], device: torch.device, tell: Callable[[BadImage], None] | None
) -> Iterator[tuple[Parcel, Batch]]:
    """Unpack what the workers send, into memory of its own that the device can copy from."""
    mapped = {}  # keeps the shared buffers in this process's address space from one use to the next
    for item in items:
        if isinstance(item, ValueError):
            raise item
        for bad in item.bad:
            assert tell is not None, "who lets images be left out hears of them"
            tell(bad)
        if not item.indices:
            continue
        batch = item.unpack()
        if item.slot is not None:
            mapped[item.slot] = item.pixels.untyped_storage()
        if device.type == "cuda":
            batch = batch.pin_memory()
        elif item.slot is not None and not (
            item.given_sizes and device.type == "cpu"
        ):  # those are laid elsewhere at once
            batch = replace(batch, pixels=batch.pixels.clone())
        yield item, batch


def _on_device(
    items: Iterable[Parcel | ValueError], device: torch.device, tell: Callable[[BadImage], None] | None = None
) -> Iterator[Batch]:
    """Hand out batches on the device. With CUDA, the next one is copied and resized while the model works on this one."""
    if device.type != "cuda":
        for parcel, batch in _receive(items, device, tell):
            yield parcel.finish(batch.to(device))
        return
    side = torch.cuda.Stream(device)
    ready: Batch | None = None
    end: list[tuple[Parcel, Batch] | None] = [None]
    for upcoming in chain(_receive(items, device, tell), end):
        main = torch.cuda.current_stream(device)
        main.wait_stream(side)  # `ready` has arrived; nothing else is on its way yet
        with torch.cuda.stream(side):
            coming = upcoming[0].finish(upcoming[1].to(device)) if upcoming else None
        if ready is not None:
            for tensor in _tensors(ready):
                tensor.record_stream(main)  # else the side stream may overwrite it while it is in use
            yield ready
        ready = coming


def _tensors(record: Any) -> Iterator[Tensor]:
    for item in fields(record):
        value = getattr(record, item.name)
        if isinstance(value, Tensor):
            yield value
        elif is_dataclass(value):
            yield from _tensors(value)
