"""An exported file as a detector: `detect(batch)` through onnxruntime, OpenVINO or torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from fpn_det.export.graph import INPUTS, canvas_of, on_canvas
from fpn_det.export.libraries import imported
from fpn_det.export.program import read_program
from fpn_det.export.writing import SUFFIXES, Metadata
from fpn_det.models.detector import Detector
from fpn_det.models.views import Views
from fpn_det.structures import Batch, Detections

REQUIRED = ("class_names", "category_ids", "config", "dtype", "size", "step")
Run = Callable[[np.ndarray, np.ndarray], list[Any]]


def is_exported(path: str | Path | None) -> TypeGuard[str | Path]:
    """True for the name of an exported file."""
    return path is not None and Path(path).suffix.lower() in SUFFIXES.values()


class ExportedFile:
    """An exported file, opened for inference.

    Attributes:
        metadata: what the file says about itself.
        dtype: of the images.
        size: (H, W) of its canvas; None = any.

    Raises:
        ValueError: there is no such file, it is damaged, or it was not written by fpn-det export.
    """

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{path}: expected an exported model, got no such file.")
        openers = {".onnx": _open_onnx, ".xml": _open_openvino, ".pt2": _open_program}
        opener = openers[self.path.suffix.lower()]
        imported({".onnx": "onnxruntime", ".xml": "openvino", ".pt2": "torch"}[self.path.suffix.lower()])
        try:
            self._run, texts = opener(self.path, threads)
            self.metadata: Metadata = {name: json.loads(text) for name, text in texts.items() if name in _NAMES}
        except Exception as error:  # of any kind: a damaged file may raise anything
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
            raise ValueError(
                f"{path}: expected a model of fpn-det export, got a damaged or foreign file ({reason})."
            ) from None
        if missing := [name for name in REQUIRED if name not in self.metadata]:
            raise ValueError(
                f"{path}: expected a model of fpn-det export, got one without {', '.join(missing)} in its metadata."
            )
        if not _is_usable(self.metadata):
            raise ValueError(f"{path}: expected metadata of fpn-det export, got others. Export the checkpoint again.")
        self.dtype: torch.dtype = getattr(torch, self.metadata["dtype"])
        self.size: tuple[int, int] | None = tuple(self.metadata["size"]) if self.metadata["size"] else None

    def canvas(self, height: int, width: int) -> tuple[int, int]:
        """(H, W) to which images of a size are padded before the file gets them."""
        return canvas_of(self.size, height, width)

    def __call__(self, images: Tensor, sizes: Tensor) -> Detections:
        """Detect objects; see `Graph.forward`.

        Raises:
            ValueError: the batch is empty, or of another dtype or size than the file takes.
        """
        where = f"{self.path.name}"
        if images.dim() != 4 or images.shape[3] != 3 or not images.numel() or sizes.shape != (len(images), 2):
            raise ValueError(
                f"{where}: expected images [B, H, W, 3] and sizes [B, 2] of at least one image, got "
                f"{list(images.shape)} and {list(sizes.shape)}."
            )
        if images.dtype != self.dtype:
            raise ValueError(f"{where}: expected images of {self.dtype}, got {images.dtype}.")
        height, width = self.canvas(images.shape[1], images.shape[2])
        if images.shape[1] > height or images.shape[2] > width:
            raise ValueError(
                f"{where}: expected images of at most {height} x {width} px (h x w), got {images.shape[1]} x "
                f"{images.shape[2]}. Export with a larger size, or with size=batch."
            )
        outputs = self._run(on_canvas(images, self.size).numpy(), sizes.contiguous().numpy())
        boxes, scores, labels, valid, _ = (torch.as_tensor(np.asarray(output)) for output in outputs)
        return Detections(boxes, scores, labels, valid)


class ExportedDetector(nn.Module):
    """An exported file in the place of a `Detector`: for prediction and evaluation, on the CPU.

    Args:
        file: the file.
        detector: of the settings in its metadata, for what follows from them; its weights are not read.
    """

    def __init__(self, file: ExportedFile, detector: Detector) -> None:
        super().__init__()
        self.file = file
        self.stride = detector.stride
        self.num_classes = len(file.metadata["class_names"])
        self.assigner = detector.assigner
        self.max_detections = detector.max_detections

    def detect(self, batch: Batch, views: Views | None = None) -> Detections:
        """Detections in the input frame.

        Raises:
            ValueError: test-time augmentation is asked for.
        """
        if views is not None and views != Views():
            raise ValueError(
                f"{self.file.path}: expected no test-time augmentation of an exported model, got {views}. "
                "Use the checkpoint for that."
            )
        found = self.file(batch.pixels.cpu().permute(0, 2, 3, 1), batch.sizes.cpu())
        device = batch.pixels.device
        return Detections(*(value.to(device) for value in (found.boxes, found.scores, found.labels, found.valid)))

    def without_roi_head(self) -> Detector:
        """Refuse: the file has no such output."""
        raise ValueError(f"{self.file.path}: expected a checkpoint to evaluate proposals, got an exported model.")


_NAMES = {
    *REQUIRED,
    "score_thresholds",
    "preprocessing",
    "versions",
    "checkpoint",
    "sha256",
    "precision",
    "opset",
    "step",
}


def _is_usable(metadata: Metadata) -> bool:
    """True if the metadata that readers rely on have their types."""
    names, ids, size = metadata["class_names"], metadata["category_ids"], metadata["size"]
    is_size = isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
    return (
        isinstance(names, list)
        and isinstance(ids, list)
        and 0 < len(names) == len(ids)
        and all(isinstance(name, str) for name in names)
        and all(type(each) is int for each in [*ids, metadata["step"]])
        and isinstance(metadata["config"], str)
        and metadata["dtype"] in ("uint8", "float32")
        and (size is None or is_size)
    )


def _open_onnx(path: Path, threads: int | None) -> tuple[Run, dict[str, str]]:
    onnxruntime = imported("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return (
        lambda images, sizes: session.run(None, dict(zip(INPUTS, (images, sizes), strict=True))),
        session.get_modelmeta().custom_metadata_map,
    )


def _open_openvino(path: Path, threads: int | None) -> tuple[Run, dict[str, str]]:
    openvino = imported("openvino")
    model = openvino.Core().read_model(path)
    texts = {name: item.astype(str) for name, item in model.get_rt_info(["fpn_det"]).astype(dict).items()}
    # CPUs with bfloat16 would otherwise use it, and differ from the weights' precision
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    return lambda images, sizes: [np.array(value) for value in compiled([images, sizes]).values()], texts


def _open_program(path: Path, threads: int | None) -> tuple[Run, dict[str, str]]:
    program, texts = read_program(path)

    @torch.no_grad()
    def run(images: np.ndarray, sizes: np.ndarray) -> list[Any]:
        return list(program(torch.from_numpy(images), torch.from_numpy(sizes)))

    return run, texts
