"""The export of a checkpoint: trace, write, prove, and only then give the file its name."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fpn_det.composition import from_saved
from fpn_det.config import EXPORTED, DetectorConfig, is_exported
from fpn_det.evaluation.evaluate import evaluate
from fpn_det.export.exported import ExportedDetector, ExportedFile
from fpn_det.export.graph import Graph, on_canvas
from fpn_det.export.metadata import Metadata, Precision
from fpn_det.export.proof import NUM_IMAGES, cases, compare
from fpn_det.export.writing import Format, refuse_unsupported, require_libraries, write
from fpn_det.image_io import RGB
from fpn_det.models.detector import Detector
from fpn_det.runs.checkpoint import fill_model, find_checkpoint
from fpn_det.runs.folder import versions
from fpn_det.runtime import Ranks
from fpn_det.schema import Count, Fraction
from fpn_det.structures import Annotations

AP_TOLERANCES: dict[Precision, float] = {"fp32": 0.001, "fp16": 0.003, "int8": 0.01}
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class ExportConfig(DetectorConfig):
    """Export of a trained detector. Model, data and preprocessing are those of its run."""

    run: str | None = None  # run folder, whose best checkpoint is exported; or
    checkpoint: str | None = None  # checkpoint file
    weights: Literal["auto", "ema", "raw"] = "auto"  # auto = the moving average if the checkpoint has one
    format: Format = "onnx"  # or openvino; torch = torch.export
    output: str | None = None  # file; null = beside the checkpoint
    size: Literal["batch"] | tuple[Count, Count] = "batch"  # any height and width, or (H, W) px of all batches
    precision: Precision = "fp32"  # type: ignore[assignment] # of weights and features; fp16; int8 with openvino
    calibration_images: Count = 128  # of the training set, by which int8 finds the ranges of features
    verify: Literal["images", "ap"] = "images"  # ap: also the AP on the validation set; always for fp16 and int8
    ap_tolerance: Fraction | None = None  # of that AP, from torch's; null = 0.001, fp16 0.003, int8 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision == "int8" and self.format != "openvino":
            raise ValueError(
                f"precision: expected fp32 or fp16 for format={self.format}, got int8. Set format=openvino."
            )
        if self.data.pixel_format != RGB:
            raise ValueError(
                f"export: expected a detector of RGB pictures of 8 bits, got one of {self.data.pixel_format}. Predict with torch."
            )
        if self.model.get("rpn", "") is None:
            raise ValueError(
                "export: expected a detector that proposes its own boxes, got one without an RPN. It needs proposals."
            )


def export(config: ExportConfig, say: Callable[[str], None] = print) -> Path:
    """Export a checkpoint and prove the file. Returns its path.

    Args:
        config: settings.
        say: called with each line of the report.

    Raises:
        ValueError: the detector cannot be exported, or the file does not give what the detector gives; it is not left.
    """
    source, state = find_checkpoint(config.run, config.checkpoint)
    path = Path(config.output) if config.output else source.with_suffix(EXPORTED[config.format])
    if path.suffix != EXPORTED[config.format]:
        raise ValueError(f"output: expected a name that ends in {EXPORTED[config.format]}, got {path}.")
    require_libraries(config.format, config.precision)
    detector = config.build_model(len(state["class_names"])).eval()
    fill_model(detector, state, str(source), config.weights)
    refuse_unsupported(detector, config.format)
    annotations = config.data.read_split("val", state["class_names"], config.seed)
    size = None if config.size == "batch" else config.size
    metadata = Metadata(
        class_names=list(state["class_names"]),
        category_ids=list(state.get("category_ids") or range(1, len(state["class_names"]) + 1)),
        config=settings_of(config, from_saved(state["config"], str(source), config.allow_targets)),
        step=state["progress"]["step"],
        dtype=config.data.transforms(train=False).dtype.name,
        size=size,
        precision=config.precision,
        score_thresholds=state.get("score_thresholds"),
        preprocessing=config.data.eval_transforms,
        checkpoint=source.name,
        sha256=hashlib.sha256(source.read_bytes()).hexdigest(),
        versions=versions(),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # the proof reads the files under another name, in a folder beside, so that a failed one leaves nothing
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export_") as folder:
        unfinished = Path(folder) / path.name
        # OpenVINO halves the weights itself
        graph = Graph(detector, half=config.precision == "fp16" and config.format != "openvino")
        program = graph.trace(size, getattr(torch, metadata.dtype))
        calibration = (
            _calibration(config, state["class_names"], detector.stride, size) if config.precision == "int8" else []
        )
        write(program, config.format, unfinished, metadata, calibration)
        exported, _ = open_exported(unfinished, config.allow_targets)
        _prove(detector, exported, annotations, config, say)
        for file in Path(folder).iterdir():
            file.replace(path.parent / file.name)
    say(f"written: {path} ({path.stat().st_size / 2**20:.1f} MiB)")
    return path


def saved_settings(run: str | None, checkpoint: str | None) -> str:
    """The settings of a run, a checkpoint or an exported file, as text.

    Raises:
        ValueError: there is no such file, or it cannot be read.
    """
    if checkpoint is not None and is_exported(checkpoint):
        return ExportedFile(checkpoint).metadata.config
    return find_checkpoint(run, checkpoint)[1]["config"]


def settings_of(config: ExportConfig, run: DetectorConfig) -> str:
    """The settings in a file: those of the run, with what the export changed of detector, data and evaluation, as text.

    The precision stays that of the run: that of the file is not among those of a run.
    """
    changed = {name: getattr(config, name) for name in ("model", "data", "evaluation", "tile")}
    return replace(run, **changed).to_yaml()


def open_exported(path: str | Path, allow_targets: Sequence[str] = ()) -> tuple[ExportedDetector, DetectorConfig]:
    """Open an exported file as a detector, and read its settings.

    Args:
        path: the file.
        allow_targets: packages whose classes its settings may name too.

    Raises:
        ValueError: there is no such file, or it cannot be read.
    """
    file = ExportedFile(path)
    config = from_saved(file.metadata.config, str(path), allow_targets)
    return ExportedDetector(file, config.build_model(len(file.metadata.class_names))), config


def _calibration(
    config: ExportConfig, class_names: list[str], stride: int, size: tuple[int, int] | None
) -> list[tuple[Tensor, Tensor]]:
    """Images of the training set, evenly spread, as a file of `size` takes them, and their sizes."""
    annotations = config.data.read_split("train", class_names, config.seed)
    rows = _spread(len(annotations), config.calibration_images)
    batches = config.single_images(annotations, rows, stride, CPU)
    return [(on_canvas(batch.pixels.permute(0, 2, 3, 1), batch.sizes, size), batch.sizes) for batch in batches]


def _spread(total: int, count: int) -> list[int]:
    """At most `count` of the numbers below `total`, evenly spread."""
    return list(range(0, total, max(1, total // count)))[:count]


def _prove(
    detector: Detector,
    exported: ExportedDetector,
    annotations: Annotations,
    config: ExportConfig,
    say: Callable[[str], None],
) -> None:
    rows = _spread(len(annotations), NUM_IMAGES)
    loader = config.single_images(annotations, rows, detector.stride, CPU)
    found = compare(detector, exported, cases(loader))
    say(
        f"{found.images} images ({found.empty or 'none'} without detections), {found.detections} detections: boxes differ by at "
        f"most {found.box:.2g} px of the picture files, scores by {found.score:.2g}, {len(found.unmatched)} detections on one "
        "side only"
    )
    if not found.detections:
        say("The detector finds nothing in these images, so they prove little.")
    if config.precision == "fp32" and not found.is_within_tolerance:
        reasons = "; ".join(found.unmatched[:3]) or "see the differences above"
        raise ValueError(f"export: expected the detections of torch, got others: {reasons}. No file was left.")
    if config.verify == "ap" or config.precision != "fp32":
        aps, metric = [], config.evaluation.metric_names[0]
        for model in (detector, exported):
            batches = config.eval_loader(annotations, detector.stride, Ranks(), CPU, "val")
            aps.append(evaluate(model, batches, annotations, config.evaluation).metrics[metric] or 0.0)  # type: ignore[arg-type]
        limit = AP_TOLERANCES[config.precision] if config.ap_tolerance is None else config.ap_tolerance
        say(f"{metric} on {len(annotations)} images: {aps[1]:.4f}, of torch {aps[0]:.4f}")
        if abs(aps[0] - aps[1]) > limit:
            raise ValueError(
                f"export: expected an {metric} within {limit} of torch's {aps[0]:.4f}, got {aps[1]:.4f}. No file was left. "
                "Set ap_tolerance to accept it."
            )
