"""Seconds of detection by exported files beside torch, on the same images, in turns."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fpn_det.benchmark.config import BenchmarkConfig
from fpn_det.benchmark.contestants import NUM_CLASSES, make_contestants
from fpn_det.benchmark.measures import alternate
from fpn_det.export.exported import ExportedFile
from fpn_det.export.graph import Graph
from fpn_det.export.libraries import is_installed
from fpn_det.export.writing import SUFFIXES, Format, Precision, write

CPU = torch.device("cpu")
# Name of a file: its format and precision, and what it needs.
FILES: dict[str, tuple[Format, Precision, tuple[str, ...]]] = {
    "onnx": ("onnx", "fp32", ("onnx", "onnxscript", "onnxruntime")),
    "openvino": ("openvino", "fp32", ("onnx", "onnxscript", "openvino")),
    "openvino int8": ("openvino", "int8", ("onnx", "onnxscript", "openvino", "nncf")),
    "torch.export": ("torch", "fp32", ()),
}
METADATA: dict[str, Any] = {
    "class_names": [str(label) for label in range(NUM_CLASSES)],
    "category_ids": list(range(1, NUM_CLASSES + 1)),
    "config": "",
    "dtype": "uint8",
    "size": None,
    "step": 0,
}


def export_seconds(config: BenchmarkConfig) -> dict[str, float]:
    """Median seconds of a batch by torch and by each file whose libraries are installed, on `config.threads` threads of the CPU."""
    if config.threads:
        torch.set_num_threads(config.threads)
    ours, _ = make_contestants(config, CPU)
    batch = ours.batch
    images, sizes = batch.pixels.permute(0, 2, 3, 1).contiguous(), batch.sizes.contiguous()
    runs: dict[str, Callable[[], object]] = {"torch": ours.inference()}
    with TemporaryDirectory() as folder:
        program = Graph(ours.model).trace(None, torch.uint8)
        for number, (name, (format, precision, libraries)) in enumerate(FILES.items()):
            if all(map(is_installed, libraries)):
                path = (Path(folder) / str(number)).with_suffix(SUFFIXES[format])
                write(program, format, path, METADATA, precision, [(images, sizes)])
                runs[name] = partial(ExportedFile(path, torch.get_num_threads()), images, sizes)
        seconds = alternate(list(runs.values()), config.repeats, CPU)
    return dict(zip(runs, seconds, strict=True))
