"""Measure seconds in alternation, peak memory in a separate process, and counts of operators and host reads."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fpn_det.benchmark.config import BenchmarkConfig
from fpn_det.benchmark.contestants import Run, make_contestants
from fpn_det.benchmark.loaders import Stream
from fpn_det.runtime import pick_device


def alternate(runs: Sequence[Run], repeats: int, device: torch.device) -> list[float]:
    """Median seconds of each run. Runs alternate, so that a change of the clock rate affects all of them."""
    seconds: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()  # allocates, compiles, chooses algorithms
    for _ in range(repeats):
        for run, measured in zip(runs, seconds, strict=True):
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            measured.append(time.perf_counter() - start)
    return [statistics.median(measured) for measured in seconds]


def throughput(streams: Sequence[Stream], repeats: int) -> list[float]:
    """Median images per second of each stream, in alternation. The start of the workers is not measured."""
    rates: list[list[float]] = [[] for _ in streams]
    for _ in range(repeats):
        for stream, measured in zip(streams, rates, strict=True):
            batches = stream()
            next(batches)
            start = time.perf_counter()
            num_images = sum(batches)
            measured.append(num_images / (time.perf_counter() - start))
    return [statistics.median(measured) for measured in rates]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory_mib(config: BenchmarkConfig) -> list[float]:
    """Peak memory of two training steps, each detector in a process of its own.

    On CUDA the memory of tensors, elsewhere the resident memory of the process.
    """
    peaks = []
    for index in range(2):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            peaks.append(pool.submit(_peak_of, index, config).result())
    return peaks


def _peak_of(index: int, config: BenchmarkConfig) -> float:
    device = pick_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    contestant = make_contestants(config, device)[index]
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    step = contestant.train()
    step()
    step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # KiB on Linux, bytes on macOS. On Linux a new process inherits the peak of its parent.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


class Counter(TorchDispatchMode):
    """Counts dispatched operators, and host reads: operators whose result on the host depends on values on the device.

    Counts do not depend on the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0
        self.host_reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators += 1
        self.host_reads += host_reads(func, args)
        return func(*args, **(kwargs or {}))


def host_reads(operator, args) -> int:
    """Values on the device that the host needs for the result of an operator."""
    if operator is torch.ops.aten.index.Tensor:
        return _masks(args[1])
    if operator in (torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default):
        is_fill = args[2].numel() == 1 and not args[2].is_cuda  # dispatched as masked_fill
        return 0 if is_fill else _masks(args[1])
    if operator is torch.ops.torchvision.nms.default:
        return 1
    waits = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)
    return int(any(tag in operator.tags for tag in waits))


def _masks(indices) -> int:
    return sum(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def count(run: Run) -> Counter:
    """Count the host reads and operators of one run."""
    run()  # fills caches, creates the state of the optimizer
    with Counter() as counter:
        run()
    return counter
