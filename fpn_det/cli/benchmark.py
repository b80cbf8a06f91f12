"""Compare speed and memory with torchvision's Faster R-CNN, in the same process, in turns.

Both detectors get equal weights, images and targets, and as many proposals and RoIs. Prints a table and writes
benchmark.json: medians of both, ratio = fpn_det / torchvision, and the options. A dotted name is a setting of
experiment=r50_fpn.

Examples:
  fpn-det benchmark only=train,inference
  fpn-det benchmark device=cuda precision=bf16 batch_size=8 size=[800,1088]
  fpn-det benchmark only=export batch_size=1 threads=2
  fpn-det benchmark only=loader data=datasets/coco num_workers=8
"""

from __future__ import annotations

import json
from pathlib import Path

from rich.table import Table

from fpn_det.benchmark.benchmark import describe, measure
from fpn_det.benchmark.config import BenchmarkConfig
from fpn_det.benchmark.exports import export_seconds
from fpn_det.benchmark.loader_memory import FEW, MANY, NUM_WORKERS, loader_growth_mib
from fpn_det.cli.arguments import run_command
from fpn_det.runtime import pick_device
from fpn_det.terminal import standard_console


def main() -> None:
    """Run the benchmark with the options of the command line."""
    run_command(benchmark, BenchmarkConfig)


def benchmark(config: BenchmarkConfig) -> None:
    """Measure, print and write."""
    config.compose()  # refuses a setting that r50_fpn does not have
    pick_device(config.device)
    height, width = config.size
    title = f"batch {config.batch_size}, {height}x{width}, {config.precision}"
    table = Table("measure", "ours", "torchvision", "ours / torchvision", title=title)
    results: dict[str, dict[str, float]] = {}
    console = standard_console()
    with console.status("measuring"):
        for name, (ours, peer) in measure(config):
            results[name] = {"ours": ours, "torchvision": peer, "ratio": ours / peer if peer else float("nan")}
            table.add_row(name, f"{ours:.4g}", f"{peer:.4g}", f"{results[name]['ratio']:.3f}")
            console.log(f"{name}: {ours:.4g} / {peer:.4g}")
    if table.row_count:
        console.print(table)
    if "memory" in config.only and Path("/proc/self/smaps_rollup").exists():
        growth = loader_growth_mib()
        results["loader_growth_mib"] = growth
        rows = ", ".join(f"{name} {mib:.1f}" for name, mib in growth.items())
        console.print(
            f"MiB that {MANY:,} images instead of {FEW} add to a loader, by start method of its {NUM_WORKERS} workers: {rows}"
        )
    if "export" in config.only:
        seconds = export_seconds(config)
        results["export_s"] = seconds
        torch_s = seconds["torch"]
        shown = ", ".join(f"{name} {each:.4g} ({each / torch_s:.3f} of torch)" for name, each in seconds.items())
        console.print(f"seconds of a batch by exported files on the CPU: {shown}")
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results | {"setting": describe(config)}, indent=2) + "\n")
    console.print(f"written: {output}")
