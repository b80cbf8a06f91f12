"""Write a traced graph as ONNX, OpenVINO or torch.export, with its metadata in the file."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fpn_det.export.graph import INPUTS, OUTPUTS
from fpn_det.export.libraries import imported
from fpn_det.export.metadata import OPSET, Metadata, Precision
from fpn_det.export.program import write_program
from fpn_det.export.quantization import quantize
from fpn_det.models.layers import DeformableConv2d

Format = Literal["onnx", "openvino", "torch"]


def require_libraries(format: Format, precision: Precision) -> None:
    """Refuse before a detector is traced, which takes a minute, if a library that writes or runs the file is missing.

    Raises:
        ValueError: it is not installed.
    """
    runtimes = {
        "onnx": ("onnx", "onnxscript", "onnxruntime"),
        "openvino": ("onnx", "onnxscript", "openvino"),
        "torch": (),
    }
    for name in (*runtimes[format], *(["nncf"] if precision == "int8" else [])):
        imported(name)


def refuse_unsupported(detector: nn.Module, format: Format) -> None:
    """Refuse a detector before it is traced.

    Raises:
        ValueError: a part of the detector has no operator in the format.
    """
    if format == "openvino" and any(isinstance(module, DeformableConv2d) for module in detector.modules()):
        raise ValueError(
            "format: expected a detector of operators that OpenVINO reads, got deformable convolutions and format=openvino. "
            "Set format=onnx or format=torch, or train with model.backbone.deformable=[]."
        )


def write(
    program: ExportedProgram,
    format: Format,
    path: Path,
    metadata: Metadata,
    calibration: Sequence[tuple[Tensor, Tensor]] = (),
) -> None:
    """Write a program, which serves once, to a file, or for OpenVINO to a pair of files.

    Args:
        program: see `Graph.trace`.
        metadata: its `precision` is that of OpenVINO's weights, and with int8 of activations; in the others the program has it.
        calibration: images and sizes of batches, for int8.

    Raises:
        ValueError: a library is missing, or the program has an operator that the format lacks.
    """
    if format == "torch":
        write_program(program, path, asdict(metadata))
    elif format == "onnx":
        write_onnx(program, path, metadata)
    else:
        with tempfile.TemporaryDirectory() as folder:
            write_onnx(program, Path(folder) / "model.onnx", metadata)
            write_openvino(Path(folder) / "model.onnx", path, metadata, calibration)


def write_onnx(program: ExportedProgram, path: Path, metadata: Metadata) -> None:
    """Write an ONNX file of standard operators. The program serves once."""
    try:
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(INPUTS),
            output_names=list(OUTPUTS),
            custom_translation_table=_translations(),
            verbose=False,
        )
    except Exception as error:  # of any kind: the exporter's errors have no common class
        reason = str(error.__cause__ or error).strip().splitlines()[0][:200]
        raise ValueError(f"export: expected operators that ONNX opset {OPSET} has, got another: {reason}.") from error
    assert exported is not None
    exported.model.metadata_props.update(metadata.texts())
    exported.save(str(path))


def write_openvino(
    onnx_file: Path,
    path: Path,
    metadata: Metadata,
    calibration: Sequence[tuple[Tensor, Tensor]] = (),
) -> None:
    """Convert an ONNX file of `write_onnx` to OpenVINO: <name>.xml, and its weights beside it in <name>.bin. See `write`."""
    openvino = imported("openvino")
    model = openvino.convert_model(str(onnx_file))
    if metadata.precision == "int8":
        model = quantize(model, calibration)
    for name, text in metadata.texts().items():
        model.set_rt_info(text, ["fpn_det", name])
    openvino.save_model(model, str(path), compress_to_fp16=metadata.precision == "fp16")


def _translations() -> dict[Any, Callable]:
    """Operators that the exporter does not know, in ONNX."""
    from onnxscript import opset18 as op

    def suppress(boxes, scores, valid, labels, iou_threshold: float, batched: bool):
        assert labels is None, "groups are images and classes"
        lowest = op.Constant(value_float=-3.0e38)
        scores = op.Unsqueeze(op.Where(valid, scores, lowest), op.Constant(value_ints=[1]))  # [P, K] -> [P, 1, K]
        most = op.Constant(value_ints=[2**31 - 1])
        boxes = op.Reshape(boxes, op.Constant(value_ints=[0, -1, 4]))  # OpenVINO's quantization loses the 4 otherwise
        limits = op.Constant(value_floats=[iou_threshold]), op.Constant(value_floats=[-2.0e38])
        kept = op.Gather(op.NonMaxSuppression(boxes, scores, most, *limits), op.Constant(value_ints=[0, 2]), axis=1)
        number = op.Slice(op.Shape(kept), op.Constant(value_ints=[0]), op.Constant(value_ints=[1]))
        ones = op.Expand(op.Constant(value_int=1), number)
        return op.Cast(op.ScatterND(op.Expand(op.Constant(value_int=0), op.Shape(valid)), kept, ones), to=9)

    def sort(x, stable: bool = True, dim: int = -1, descending: bool = False):
        # of equal values ONNX's TopK gives the first one first
        return op.TopK(x, op.Gather(op.Shape(x), op.Constant(value_ints=[dim])), axis=dim, largest=int(descending))

    return {torch.ops.fpn_det.suppress.default: suppress, torch.ops.aten.sort.stable: sort}
