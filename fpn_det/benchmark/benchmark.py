"""The benchmark: every measure for both detectors, in turns."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torchvision

from fpn_det.benchmark.config import BenchmarkConfig
from fpn_det.benchmark.contestants import make_contestants
from fpn_det.benchmark.gpu_counts import gpu_counts
from fpn_det.benchmark.loaders import make_streams, write_images
from fpn_det.benchmark.measures import alternate, count, peak_memory_mib, throughput
from fpn_det.runtime import keep_freed_memory, pick_device

SECONDS = {
    "train": "train_step_s",
    "inference": "inference_s",
    "roi_align": "roi_align_s",
    "rpn_loss": "rpn_loss_s",
    "nms": "nms_s",
}


def measure(config: BenchmarkConfig) -> Iterator[tuple[str, list[float]]]:
    """Yield the name of each measure with its two values, fpn_det's first, as soon as they are known."""
    device = pick_device(config.device)
    keep_freed_memory(device)  # as training and prediction do
    if config.threads:
        torch.set_num_threads(config.threads)
    if "memory" in config.only:  # first, while this process is small
        yield "peak_memory_mib", peak_memory_mib(config)
    timed = [part for part in SECONDS if part in config.only]
    if timed or "reads" in config.only:
        contestants = make_contestants(config, device)
    for part in timed:
        runs = [getattr(contestant, part)() for contestant in contestants]
        yield SECONDS[part], alternate(runs, config.repeats, device)
    if "reads" in config.only:
        counters = [count(contestant.train()) for contestant in contestants]
        yield "host_reads", [counter.host_reads for counter in counters]
        yield "operators", [counter.operators for counter in counters]
        # the counts of a GPU with a large batch: neither the size of images nor the number of RoIs changes them
        few = (*config.overrides, "model.roi_head.sampler.num_samples=32")
        wide = replace(config, batch_size=16, size=(128, 160), nms="batched", overrides=few)
        counters = [count(contestant.train()) for contestant in make_contestants(wide, device)]
        yield "host_reads_batch_16", [counter.host_reads for counter in counters]
        yield "operators_batch_16", [counter.operators for counter in counters]
    if "gpu_counts" in config.only:
        yield from gpu_counts(config)
    if "loader" in config.only:
        with TemporaryDirectory() as generated:
            if config.data is None:
                write_images(Path(generated), config.size)
            for name, streams in make_streams(config, Path(config.data or generated), device).items():
                yield name, throughput(streams, config.repeats)


def describe(config: BenchmarkConfig) -> dict[str, object]:
    """The options and the machine, for the file of the results."""
    device = pick_device(config.device)
    return asdict(config) | {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device} ({platform.processor() or platform.machine()})",
        "threads": config.threads or torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
