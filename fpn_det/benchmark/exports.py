"""Seconds of detection by exported files beside torch, on the same images, in turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from fpn_det.benchmark.config import BenchmarkConfig
from fpn_det.benchmark.contestants import NUM_CLASSES, make_contestants
from fpn_det.benchmark.measures import alternate
from fpn_det.export.exported import ExportedFile
from fpn_det.export.graph import Graph
from fpn_det.export.libraries import is_installed
from fpn_det.export.metadata import Metadata, Precision
from fpn_det.export.writing import require_libraries, write_onnx, write_openvino

CPU = torch.device("cpu")


def export_seconds(config: BenchmarkConfig) -> dict[str, float]:
    """Median seconds of a batch by torch, ONNX and OpenVINO, as far as their libraries are installed, on the CPU.

    `openvino native` computes in the half precision of the processor, if it has one.

    Raises:
        ValueError: the libraries of ONNX are not installed.
    """
    require_libraries("onnx", "fp32")
    if config.threads:
        torch.set_num_threads(config.threads)
    ours, _ = make_contestants(config, CPU)
    batch = ours.batch
    images, sizes = batch.pixels.permute(0, 2, 3, 1).contiguous(), batch.sizes.contiguous()
    with TemporaryDirectory() as folder:
        files = {"onnx": Path(folder) / "model.onnx"}
        metadata = Metadata(
            class_names=[str(label) for label in range(NUM_CLASSES)], category_ids=list(range(1, NUM_CLASSES + 1))
        )
        write_onnx(Graph(ours.model).trace(None, torch.uint8), files["onnx"], metadata)
        precisions: dict[str, Precision] = {"openvino": "fp32", "openvino int8": "int8"}
        for name, precision in precisions.items():
            if is_installed("openvino") and (precision != "int8" or is_installed("nncf")):
                files[name] = Path(folder) / f"{precision}.xml"
                write_openvino(files["onnx"], files[name], replace(metadata, precision=precision), [(images, sizes)])
        runs: dict[str, Callable[[], object]] = {"torch": ours.inference()}
        threads = torch.get_num_threads()
        for name, file in files.items():
            runs[name] = partial(ExportedFile(file, threads), images, sizes)
        if "openvino" in files:
            runs["openvino native"] = partial(ExportedFile(files["openvino"], threads, native=True), images, sizes)
        seconds = alternate(list(runs.values()), config.repeats, CPU)
    return dict(zip(runs, seconds, strict=True))
