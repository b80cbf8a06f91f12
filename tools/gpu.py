"""Measure on a GPU and write the figures to docs/gpu.md: python tools/gpu.py [batch_size=16] [size=[800,1344]] ...

Runs the benchmark beside torchvision in each precision, compiled and captured, lists the operators that deterministic mode cannot
make deterministic, and trains the demo on drawn shapes. `make gpu` runs the gpu tests before it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
import torchvision

from fpn_det import api
from fpn_det.benchmark.config import BenchmarkConfig
from fpn_det.benchmark.contestants import make_contestants
from fpn_det.cli.arguments import run_command
from fpn_det.schema import Count

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- figures of tools/gpu.py -->", "<!-- end of the figures -->"
Variant = Literal["fp32", "tf32", "bf16", "fp16", "compiled", "captured"]
# options of the benchmark
VARIANTS: dict[Variant, tuple[str, ...]] = {
    "fp32": ("precision=fp32",),
    "tf32": ("precision=tf32",),
    "bf16": ("precision=bf16",),
    "fp16": ("precision=fp16",),
    "compiled": ("precision=bf16", "compile=true"),
    "captured": ("precision=bf16", "capture=true"),
}
PARTS, ONCE = "train,inference,memory,roi_align", "nms,loader"  # measured in each variant, and in none of them
NOT_DETERMINISTIC = re.compile(r"^(\S+) does not have a deterministic implementation")


@dataclass(frozen=True)
class Setting:
    """Options of the measurement."""

    batch_size: Count = 16  # images of the benchmark
    size: tuple[Count, Count] = (800, 1344)  # of these images, (h, w) px
    variants: tuple[Variant, ...] = get_args(Variant)  # what is measured; compiled and captured ones in bf16
    page: str = str(ROOT / "docs" / "gpu.md")  # file that has the marks between which the figures are written


@dataclass
class Figures:
    """Results of a card."""

    machine: str  # card and versions
    benchmarks: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)  # by variant and measure
    not_deterministic: list[str] = field(default_factory=list)  # operators
    training: str = ""  # time and AP of the short training

    def markdown(self) -> str:
        """The section of the page."""
        lines = [f"Measured on {self.machine}.", ""]
        lines += ["| variant | measure | ours | torchvision | ratio |", "|---|---|---|---|---|"]
        for variant, measures in self.benchmarks.items():
            for name, row in measures.items():
                lines.append(
                    f"| {variant} | {name} | {row['ours']:.4g} | {row['torchvision']:.4g} | {row['ratio']:.3f} |"
                )
        operators = ", ".join(f"`{name}`" for name in self.not_deterministic) or "none"
        return "\n".join([*lines, "", f"Operators without a deterministic version: {operators}.", "", self.training])


def put_into(page: str, section: str) -> str:
    """The text of a page with `section` between its marks.

    Raises:
        ValueError: the page has not each mark once.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"page: expected the marks {BEGIN} and {END} once each. Restore docs/gpu.md.")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{section}\n\n{END}{rest.split(END)[1]}"


def machine() -> str:
    """Card, memory and versions."""
    card = torch.cuda.get_device_properties(0)
    versions = f"CUDA {torch.version.cuda}, torch {torch.__version__}, torchvision {torchvision.__version__}"
    return f"{card.name} ({card.total_memory / 2**30:.0f} GiB), {versions}"


def benchmark(setting: Setting, parts: str, options: Sequence[str], folder: Path) -> dict[str, dict[str, float]]:
    """Measures of the benchmark with these options, in a process of its own, so that no memory is left over."""
    output = folder / "benchmark.json"
    words = ["device=cuda", f"only=[{parts}]", f"batch_size={setting.batch_size}", f"output={output}", *options]
    words += ["size=[{},{}]".format(*setting.size)]
    subprocess.run([sys.executable, str(ROOT / "tools" / "benchmark.py"), *words], check=True)
    return {name: row for name, row in json.loads(output.read_text()).items() if "ratio" in row}


def not_deterministic() -> list[str]:
    """Operators of a training step that torch's deterministic mode cannot make deterministic."""
    ours, _ = make_contestants(BenchmarkConfig(device="cuda", size=(128, 160)), torch.device("cuda"))
    step = ours.train()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.use_deterministic_algorithms(False)
    found = (NOT_DETERMINISTIC.match(str(warning.message)) for warning in caught)
    return sorted({match[1] for match in found if match})


def train(folder: Path) -> str:
    """Train the demo on drawn shapes, and describe the result in a sentence."""
    data, run = folder / "shapes", folder / "run"
    words = ["--out", str(data), "--size", "160", "160", "--classes", "disk", "square", "triangle", "star"]
    subprocess.run([sys.executable, str(ROOT / "datasets" / "make_shapes.py"), *words], check=True)
    start = time.monotonic()
    api.train(["experiment=demo", "device=cuda", "precision=bf16", f"data.root={data}", f"run_dir={run}"])
    minutes = (time.monotonic() - start) / 60
    metrics = api.evaluate(run, ["device=cuda"]).metrics
    return f"`experiment=demo precision=bf16`: AP {metrics['AP']:.3f}, AP50 {metrics['AP50']:.3f} in {minutes:.1f} minutes."


def measure(setting: Setting) -> None:
    """Measure everything and write the section."""
    if not torch.cuda.is_available():
        raise ValueError(f"gpu: expected a CUDA device, torch {torch.__version__} sees none here.")
    page = Path(setting.page)
    put_into(page.read_text(), "")  # refuses a page without marks before time is spent
    figures = Figures(machine())
    with tempfile.TemporaryDirectory() as folder:
        for variant in setting.variants:
            figures.benchmarks[variant] = benchmark(setting, PARTS, VARIANTS[variant], Path(folder))
        figures.benchmarks["any"] = benchmark(setting, ONCE, [], Path(folder))
        figures.not_deterministic = not_deterministic()
        figures.training = train(Path(folder))
    page.write_text(put_into(page.read_text(), figures.markdown()))
    print(f"written: {page}")


if __name__ == "__main__":
    run_command(measure, Setting)
