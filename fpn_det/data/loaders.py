"""Loaders: batches on the device, read ahead by worker processes and copied ahead on a side stream.

The content of a batch is a function of the step alone. It does not depend on the number of workers or on timing.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from dataclasses import replace
from itertools import chain, count
from pathlib import Path

import torch
from torch.utils.data import Dataset, get_worker_info

from fpn_det.data.bad_images import OnBadImage, load_available
from fpn_det.data.collation import Collator, PackedBatch
from fpn_det.data.dataset import DetectionDataset
from fpn_det.data.flip_resize import Size
from fpn_det.data.largest_batch import largest_batch
from fpn_det.data.sampling import GlobalBatches, Key, evaluation_batches, micro_batches
from fpn_det.data.tiles import Tiles
from fpn_det.data.workers import (
    BUFFERS_PER_WORKER,
    ReceivedBuffers,
    SharedBuffers,
    Workers,
    check_shared_memory,
    cuda_host_register,
    cuda_host_unregister,
    load_in_workers,
)
from fpn_det.image_io import BadImage
from fpn_det.runtime import Ranks
from fpn_det.structures import Batch, tensors_of

TILE_BYTES = 1 << 27  # pixels of one image's tiles that are made together; the image is decoded again for the next ones


class TrainLoader:
    """This rank's share of the global batches, divided into micro-batches; endless over the epochs.

    Args:
        dataset: reads and transforms the images.
        batches: images of each step.
        ranks: this rank and their number.
        accumulate: micro-batches per step.
        collator: makes the batches.
        workers: processes that make them.
        device: that batches are copied to.
        on_bad_image: called for each image that was replaced because it is bad, when its batch arrives.

    Raises:
        ValueError: shared memory does not suffice, or the transforms do not allow to resize on the device.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        batches: GlobalBatches,
        ranks: Ranks,
        accumulate: int,
        collator: Collator,
        workers: Workers,
        device: torch.device,
        on_bad_image: OnBadImage | None = None,
    ) -> None:
        self._micro_batch_size = batches.batch_size // (ranks.world_size * accumulate)
        check_shared_memory(typical_bytes(dataset, collator), self._micro_batch_size, workers.count, BUFFERS_PER_WORKER)
        self._batches = batches
        self._ranks = ranks
        self._accumulate = accumulate
        self._maker = _BatchMaker(dataset, collator)
        self._workers = workers
        self._device = device
        self._on_bad_image = on_bad_image

    @property
    def tiles(self) -> Tiles | None:
        """The tiles of the training images, if they are cut."""
        return self._maker.dataset.tiles

    @property
    def steps_per_epoch(self) -> int:
        return self._batches.steps_per_epoch

    @property
    def images_per_epoch(self) -> int:
        """Images and tiles that an epoch shows, repetitions included."""
        return self._batches.images_per_epoch

    @property
    def batch_size(self) -> int:
        """Images per step over all ranks and micro-batches; less than requested if the data set is smaller."""
        return self._batches.batch_size

    def iterate(self, first_step: int) -> Iterator[Batch]:
        """Yield the micro-batches of step `first_step` and all later steps on the device. Starts workers of its own."""
        return _on_device(self.packed_batches(first_step), self._device, self._on_bad_image)

    def packed_batches(self, first_step: int) -> Iterable[PackedBatch | ValueError]:
        """Yield the micro-batches as the workers send them."""
        keys = chain.from_iterable(map(self.keys, count(first_step)))
        return load_in_workers(self._maker, keys, self._workers)

    def rebuild(self, step: int) -> list[Batch]:
        """Make the micro-batches of one step in this process, on the device."""
        return list(_on_device((self._maker[keys] for keys in self.keys(step)), self._device, self._on_bad_image))

    def largest(self, num_images: int | None = None) -> Batch:
        """Make the micro-batch that needs the most memory, with black images, on the device.

        Args:
            num_images: in the batch; None takes this rank's micro-batch size.
        """
        maker = self._maker
        return largest_batch(maker.dataset, num_images or self._micro_batch_size, maker.collator).to(self._device)

    def keys(self, step: int) -> list[list[Key]]:
        """Return the keys of this rank's images for each micro-batch of a step."""
        _, indices = self._batches.slice(step)
        rows, epochs = (
            micro_batches(part, self._ranks, self._accumulate).tolist()
            for part in (indices, self._batches.occurrences(step))
        )
        return [
            [Key(row, epoch, step) for row, epoch in zip(*pair, strict=True)] for pair in zip(rows, epochs, strict=True)
        ]


class EvalLoader:
    """This rank's images of a data set, sorted by aspect ratio. Over all ranks, every image occurs exactly once.

    Batches of tiles (`Batch.windows`) follow the batch of their images. A bad image is reported once.

    Args:
        dataset: reads and transforms the images, and their tiles if it has any.
        batch_size: images per batch on this rank.
        ranks: this rank and their number.
        collator: makes the batches.
        workers: processes that make them.
        device: that batches are copied to.
        on_bad_image: called for each image that is left out because it is bad; None makes bad images an error.

    Raises:
        ValueError: shared memory does not suffice, or the transforms do not allow to resize on the device.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        batch_size: int,
        ranks: Ranks,
        collator: Collator,
        workers: Workers,
        device: torch.device,
        on_bad_image: OnBadImage | None = None,
    ) -> None:
        batches = evaluation_batches(dataset.annotations.sizes, batch_size, ranks)
        check_shared_memory(typical_bytes(dataset, collator), batch_size, workers.count, BUFFERS_PER_WORKER)
        tiles, most = dataset.tiles, batch_size
        if tiles:
            tile_bytes = sent_bytes(dataset, collator, tuple(tiles.sizes.amax(dim=0).tolist()))
            most_batches = -(-int(tiles.offsets.diff().max()) // batch_size)  # of the tiles of one image
            most = min(max(TILE_BYTES // tile_bytes // batch_size, 1), most_batches) * batch_size
            check_shared_memory(tile_bytes, most, workers.count, BUFFERS_PER_WORKER)
        keys: list[list[Key]] = []
        for batch in batches:
            keys.append([Key(index, 0) for index in batch.tolist()])
            for index in batch.tolist():
                rows = tiles.rows_of(index) if tiles else range(0)
                keys += [[Key(row, 0) for row in rows[start : start + most]] for start in range(0, len(rows), most)]
        self._batch_size = batch_size
        self._num_batches = sum(-(-len(part) // batch_size) for part in keys)
        maker = _BatchMaker(dataset, collator, skip_bad=on_bad_image is not None, marks_tiles=True)
        self._packed_batches = load_in_workers(maker, keys, workers)
        self._device = device
        self._on_bad_image = on_bad_image

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        on_bad_image = self._on_bad_image and _once(self._on_bad_image)
        for batch in _on_device(self._packed_batches, self._device, on_bad_image):
            if len(batch) <= self._batch_size:
                yield batch
            else:
                for start in range(0, len(batch), self._batch_size):
                    yield batch.select(slice(start, start + self._batch_size))


def _once(on_bad_image: OnBadImage) -> OnBadImage:
    """Report a file once, not for each of its tiles again."""
    reported: set[Path] = set()

    def report(bad: BadImage) -> None:
        if bad.path not in reported:
            reported.add(bad.path)
            on_bad_image(bad)

    return report


class _BatchMaker(Dataset):
    """Makes whole batches of their keys in a worker.

    Errors of the data are returned rather than raised: torch's loader would turn an exception into a traceback.

    Args:
        skip_bad: leave bad images out of their batch.
        marks_tiles: tell the windows of tiles.
    """

    def __init__(
        self, dataset: DetectionDataset, collator: Collator, skip_bad: bool = False, marks_tiles: bool = False
    ) -> None:
        if collator.resize_on == "device":
            dataset.transform.check_resize_is_last()
        self.dataset = dataset
        self.collator = collator
        self._skip_bad = skip_bad
        self._marks_tiles = marks_tiles
        self._buffers = SharedBuffers(BUFFERS_PER_WORKER)

    def __getitem__(self, keys: list[Key]) -> PackedBatch | ValueError:
        try:
            if self._skip_bad:
                examples, bad = load_available(self.dataset.__getitem__, keys)
            else:
                examples, bad = [self.dataset[key] for key in keys], []
            worker = get_worker_info()
            if worker is None or not examples:
                packed = self.collator.pack(examples, bad)
            else:
                packed = self.collator.pack(examples, bad, self._buffers)
                packed = replace(packed, buffer=(worker.id, self._buffers.current))
            if self._marks_tiles:
                windows = [example.window for example in examples if example.window is not None]
                packed = replace(packed, windows=windows)
            return packed
        except ValueError as error:
            return error


def typical_bytes(dataset: DetectionDataset, collator: Collator) -> int:
    """Return the bytes that a worker sends for an image of median size."""
    sizes = dataset.sizes
    if not len(sizes):
        return 0
    height, width = sizes[sizes.prod(dim=1).argsort()[len(sizes) // 2]].tolist()
    return sent_bytes(dataset, collator, (height, width))


def sent_bytes(dataset: DetectionDataset, collator: Collator, size: Size) -> int:
    """Return the bytes that a worker sends for an image or tile of `size` (h, w) in the original frame."""
    height, width = size
    if collator.resize_on == "worker":
        canvas = collator.canvas
        height, width = canvas if isinstance(canvas, tuple) else dataset.transform.largest(size)
    return height * width * dataset.transform.pixel_format.bytes_per_pixel


def _receive(
    items: Iterable[PackedBatch | ValueError], device: torch.device, on_bad_image: OnBadImage | None
) -> Generator[tuple[PackedBatch, Batch], None, None]:
    """Unpack what the workers send, into memory from which the device can copy.

    For CUDA, the pixels stay in the worker's buffer, which may be overwritten as soon as the next item is requested: until
    then they must be copied.

    Raises:
        ValueError: a worker met an error in the data.
    """
    is_cuda = device.type == "cuda"
    buffers = ReceivedBuffers(cuda_host_register, cuda_host_unregister) if is_cuda else ReceivedBuffers()
    try:
        for item in items:
            if isinstance(item, ValueError):
                raise item
            for bad in item.bad_images:
                assert on_bad_image is not None, "bad images are only left out or replaced with a callback"
                on_bad_image(bad)
            if not item.indices:
                continue
            batch = item.unpack()
            if item.buffer is not None:
                buffers.keep(item.buffer, item.pixels.untyped_storage())
            is_copied_by_finish = bool(item.decoded_shapes) and device.type == "cpu"
            if is_cuda:
                batch = batch.pin_memory()  # copies the pixels only if their buffer could not be page-locked
            elif item.buffer is not None and not is_copied_by_finish:
                batch = replace(batch, pixels=batch.pixels.clone())
            yield item, batch
    finally:
        buffers.close()


def _on_device(
    items: Iterable[PackedBatch | ValueError], device: torch.device, on_bad_image: OnBadImage | None = None
) -> Iterator[Batch]:
    """Yield batches on the device. With CUDA, the next batch is copied and resized while the model uses this one."""
    received = _receive(items, device, on_bad_image)
    if device.type != "cuda":
        for packed, batch in received:
            yield packed.finish(batch.to(device))
        return
    side = torch.cuda.Stream(device)
    ready: Batch | None = None
    try:
        for packed, batch in received:
            torch.cuda.current_stream(device).wait_stream(side)  # `ready` has arrived; no other copy is in progress yet
            with torch.cuda.stream(side):
                batch = batch.to(device)
                copied = side.record_event()
                coming = packed.finish(batch)
            if ready is not None:
                yield _used_on_current_stream(ready)
            ready = coming
            copied.synchronize()  # the buffer may be overwritten now; the copy has long been done, while the model ran
        if ready is not None:
            torch.cuda.current_stream(device).wait_stream(side)
            yield _used_on_current_stream(ready)
    finally:
        side.synchronize()  # an abandoned copy must end before its buffer is released
        received.close()


def _used_on_current_stream(batch: Batch) -> Batch:
    """Keep the memory of a batch of the side stream from being reused while the current stream uses it."""
    for tensor in tensors_of(batch):
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return batch
