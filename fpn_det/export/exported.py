"""An exported file as a detector: `detect(batch)` through onnxruntime, OpenVINO or torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fpn_det.export.graph import INPUTS, canvas_of, on_canvas
from fpn_det.export.libraries import imported
from fpn_det.export.metadata import Metadata
from fpn_det.export.program import read_program
from fpn_det.models.detector import Detector
from fpn_det.models.views import Views
from fpn_det.structures import Batch, Detections

Run = Callable[[np.ndarray, np.ndarray], list[Any]]


class ExportedFile:
    """An exported file, opened for inference.

    Args:
        path: of the file.
        threads: of its runtime; None = all cores.
        native: let OpenVINO compute in bfloat16 or float16 where the processor has it, instead of float32.

    Attributes:
        metadata: what the file says about itself.
        dtype: of the images.
        size: (H, W) of its canvas; None = any.

    Raises:
        ValueError: there is no such file, it is damaged, or it was not written by fpn-det export.
    """

    def __init__(self, path: str | Path, threads: int | None = None, native: bool = False) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{path}: expected an exported model, got no such file.")
        opener, library = _OPENERS[self.path.suffix.lower()]
        imported(library)
        try:
            self._run, texts = opener(self.path, threads, native)
            self.metadata = Metadata.read(texts)
        except Exception as error:  # of any kind: a damaged file may raise anything
            raise ValueError(
                f"{path}: expected a model of fpn-det export, got a damaged or foreign file ({_reason(error)})."
            ) from None
        self.dtype: torch.dtype = getattr(torch, self.metadata.dtype)
        self.size = self.metadata.size

    def canvas(self, height: int, width: int) -> tuple[int, int]:
        """(H, W) to which images of a size are padded before the file gets them."""
        return canvas_of(self.size, height, width)

    def __call__(self, images: Tensor, sizes: Tensor) -> Detections:
        """Detect objects; see `Graph.forward`.

        Raises:
            ValueError: the batch is empty, or of another dtype or size than the file takes.
        """
        where = self.path.name
        if images.dim() != 4 or images.shape[3] != 3 or not images.numel() or sizes.shape != (len(images), 2):
            raise ValueError(
                f"{where}: expected images [B, H, W, 3] and sizes [B, 2] of at least one image, got "
                f"{list(images.shape)} and {list(sizes.shape)}."
            )
        for name, values, dtype in (("images", images, self.dtype), ("sizes", sizes, torch.int64)):
            if values.dtype != dtype:
                raise ValueError(f"{where}: expected {name} of {dtype}, got {values.dtype}.")
        try:
            images = on_canvas(images, sizes, self.size)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        outputs = self._run(images.numpy(), sizes.contiguous().numpy())
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
        self.num_classes = len(file.metadata.class_names)
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


def _reason(error: Exception) -> str:
    """The first sentence of a message, without the places in OpenVINO's source that it begins with."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("Exception from")]
    return lines[0].split(". ")[0].strip().rstrip(".")[:150] if lines else type(error).__name__


def _open_onnx(path: Path, threads: int | None, native: bool) -> tuple[Run, dict[str, str]]:
    onnxruntime = imported("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return (
        lambda images, sizes: session.run(None, dict(zip(INPUTS, (images, sizes), strict=True))),
        session.get_modelmeta().custom_metadata_map,
    )


def _open_openvino(path: Path, threads: int | None, native: bool) -> tuple[Run, dict[str, str]]:
    openvino = imported("openvino")
    with path.open("rb") as file:
        if not file.read(100).lstrip().startswith(b"<"):  # OpenVINO would try other formats, and print of each
            raise ValueError("no XML")
    model = openvino.Core().read_model(path)
    texts = {name: item.astype(str) for name, item in model.get_rt_info(["fpn_det"]).astype(dict).items()}
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if not native:
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    return lambda images, sizes: [np.array(value) for value in compiled([images, sizes]).values()], texts


def _open_program(path: Path, threads: int | None, native: bool) -> tuple[Run, dict[str, str]]:
    program, texts = read_program(path)

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)  # the program has its own precision
    def run(images: np.ndarray, sizes: np.ndarray) -> list[Any]:
        return list(program(torch.from_numpy(images), torch.from_numpy(sizes)))

    return run, texts


_OPENERS = {
    ".onnx": (_open_onnx, "onnxruntime"),
    ".xml": (_open_openvino, "openvino"),
    ".pt2": (_open_program, "torch"),
}
