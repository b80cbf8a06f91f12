"""Race fpn_det against torchvision's Faster R-CNN: same machine, same run, in turns.

python tools/benchmark.py [only=train,inference] [name=value ...] [model.<setting of r50_fpn>=value ...]

Names and defaults are in _benchmark/setting.py. Both get equal weights, images and targets, and as many proposals and
RoIs. Prints a table and writes benchmark.json: medians of both, ratio = ours / torchvision, and the setting.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torchvision
from rich.console import Console
from rich.table import Table

from _benchmark.contestants import make_contestants
from _benchmark.loader_memory import FEW, MANY, NUM_WORKERS, loader_growth_mib
from _benchmark.loaders import make_streams, write_images
from _benchmark.measures import alternate, count, peak_memory_mib, throughput
from _benchmark.setting import Setting, parse
from fpn_det.runtime import pick_device

SECONDS = {"train": "train_step_s", "inference": "inference_s", "roi_align": "roi_align_s", "rpn_loss": "rpn_loss_s"}


def measure(setting: Setting) -> Iterator[tuple[str, list[float]]]:
    """The name of each measure with its two values, ours first, in the order in which they are ready."""
    device = pick_device(setting.device)
    if setting.threads:
        torch.set_num_threads(setting.threads)
    if "memory" in setting.only:  # first, while this process is small
        yield "peak_memory_mib", peak_memory_mib(setting)
    timed = [part for part in SECONDS if part in setting.only]
    if timed or "reads" in setting.only:
        contestants = make_contestants(setting, device)
    for part in timed:
        runs = [getattr(contestant, part)() for contestant in contestants]
        yield SECONDS[part], alternate(runs, setting.repeats, device)
    if "reads" in setting.only:
        counters = [count(contestant.train()) for contestant in contestants]
        yield "host_reads", [counter.host_reads for counter in counters]
        yield "operators", [counter.operators for counter in counters]
        # what a GPU would do with a large batch; neither small images nor few RoIs change the counts
        few = (*setting.overrides, "model.roi_head.sampler.num_samples=32")
        wide = replace(setting, batch_size=16, size=(128, 160), nms="batched", overrides=few)
        counters = [count(contestant.train()) for contestant in make_contestants(wide, device)]
        yield "host_reads_batch_16", [counter.host_reads for counter in counters]
        yield "operators_batch_16", [counter.operators for counter in counters]
    if "loader" in setting.only:
        with TemporaryDirectory() as generated:
            if setting.data is None:
                write_images(Path(generated), setting.size)
            for name, streams in make_streams(setting, Path(setting.data or generated), device).items():
                yield name, throughput(streams, setting.repeats)


def describe(setting: Setting) -> dict[str, object]:
    """The setting, and where it was measured."""
    device = pick_device(setting.device)
    return asdict(setting) | {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device} ({platform.processor() or platform.machine()})",
        "threads": setting.threads or torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def main() -> None:
    """Measure, show, write."""
    try:
        setting = parse(sys.argv[1:])
        pick_device(setting.device)
    except ValueError as error:
        sys.exit(str(error))
    height, width = setting.size
    title = f"batch {setting.batch_size}, {height}x{width}, {setting.precision}"
    table = Table("measure", "ours", "torchvision", "ours / torchvision", title=title)
    results: dict[str, dict[str, float]] = {}
    console = Console()
    with console.status("measuring"):
        for name, (ours, peer) in measure(setting):
            results[name] = {"ours": ours, "torchvision": peer, "ratio": ours / peer}
            table.add_row(name, f"{ours:.4g}", f"{peer:.4g}", f"{ours / peer:.3f}")
            console.log(f"{name}: {ours:.4g} / {peer:.4g}")
    console.print(table)
    if "memory" in setting.only and Path("/proc/self/smaps_rollup").exists():
        growth = loader_growth_mib()
        results["loader_growth_mib"] = growth
        rows = ", ".join(f"{name} {mib:.1f}" for name, mib in growth.items())
        console.print(
            f"MiB that {MANY:,} images instead of {FEW} add to a loader, by kind of its {NUM_WORKERS} workers: {rows}"
        )
    output = Path(setting.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results | {"setting": describe(setting)}, indent=2) + "\n")
    console.print(f"written: {output}")


if __name__ == "__main__":
    main()
