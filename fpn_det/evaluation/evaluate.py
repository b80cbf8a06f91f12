"""Evaluation of a detector: run it on all images, score the detections, write the results.

Each rank detects on its own images. Rank 0 gathers the detections as arrays, scores them and broadcasts the metrics.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fpn_det.evaluation.coco import Evaluation, score
from fpn_det.evaluation.config import EvaluationConfig
from fpn_det.evaluation.detection_table import DetectionTable
from fpn_det.evaluation.diagnosis import ABOUT_ZERO, diagnose
from fpn_det.models.detector import Detector
from fpn_det.models.roi_align import LevelAssigner
from fpn_det.models.tiles import detect_all
from fpn_det.models.views import Views
from fpn_det.models.weights import refuse_nonfinite_weights
from fpn_det.runtime import broadcast_object, gather_objects
from fpn_det.structures import Annotations, Batch, Detections

WeightsKind = Literal["ema", "raw", "exported"]


def evaluate(
    model: Detector,
    loader: Iterable[Batch],
    annotations: Annotations,
    config: EvaluationConfig,
    dtype: torch.dtype | None = None,
    tta: Views | None = None,
    with_losses: bool = False,
) -> Evaluation:
    """Detect on the images of `loader` and score the detections of all ranks. Every rank returns the metrics.

    The other ranks wait while rank 0 scores.

    Args:
        model: the bare module. Its modes (training, eval) are restored afterwards.
        loader: images of this rank, on the model's device, each batch followed by those of its tiles, if there are any; over
            all ranks every image exactly once.
        annotations: the ground truth; `Batch.indices` are its rows.
        config: metrics to compute.
        dtype: of autocast; None disables it.
        tta: test-time augmentation; None detects on the image as it is.
        with_losses: also compute the losses of the whole images, as the metric `loss` and its terms as statistics. Anchors and proposals are sampled
            with the seed of step 0, so evaluations of the same weights give the same losses.

    Raises:
        ValueError: the weights are not finite.
    """
    start = time.perf_counter()
    detector = model.without_roi_head() if config.target == "proposals" else model
    refuse_nonfinite_weights(detector.state_dict(), "evaluate")
    with evaluation_mode(model):
        shard = _detect(model, detector, loader, dtype, tta, with_losses)
    shards = gather_objects(shard)
    evaluation = None
    if shards is not None:
        evaluation = _score_shards(shards, annotations, config, detector)
        evaluation = replace(evaluation, seconds=time.perf_counter() - start)
    # detections stay on rank 0
    broadcast = broadcast_object(evaluation and replace(evaluation, detections=DetectionTable.join([])))
    return evaluation or broadcast


@dataclass(frozen=True)
class _Shard:
    """Detections of one rank."""

    images: NDArray[np.int64]  # rows of Annotations
    detections: DetectionTable
    per_level: NDArray[np.int64]  # [L], number of detections by pyramid level
    losses: dict[str, float]  # sums over images


def _detect(
    model: Detector,
    detector: Detector,
    loader: Iterable[Batch],
    dtype: torch.dtype | None,
    tta: Views | None,
    with_losses: bool,
) -> _Shard:
    """Detect on the images of this rank; `detector` is the model, or the model without its ROI head."""
    assigner = detector.assigner
    images: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    tables: list[DetectionTable] = []
    per_level = torch.zeros(assigner.num_levels, dtype=torch.int64)
    losses: dict[str, Tensor] = {}
    for batch, detections in detect_all(detector, loader, dtype, tta):
        if with_losses:
            with torch.autocast(batch.pixels.device.type, dtype, enabled=dtype is not None):
                for name, mean in _losses(model, batch).items():
                    losses[name] = losses.get(name, 0) + mean * len(batch)
        per_level = per_level.to(detections.boxes.device) + count_levels(detections, assigner)
        batch_images, table = to_host(detections.to_original(batch), batch.indices)
        images.append(batch_images)
        tables.append(table)
    return _Shard(np.concatenate(images), DetectionTable.join(tables), per_level.cpu().numpy(), _to_floats(losses))


def _score_shards(
    shards: list[_Shard], annotations: Annotations, config: EvaluationConfig, detector: Detector
) -> Evaluation:
    """Score the detections of all ranks."""
    images = np.concatenate([shard.images for shard in shards])
    detections = DetectionTable.join([shard.detections for shard in shards])
    evaluation = score(annotations, detections, images, config, detector.max_detections)

    per_image = np.sum([shard.per_level for shard in shards], axis=0) / max(len(images), 1)
    first = detector.assigner.first
    statistics = {f"detections/P{level}": mean for level, mean in enumerate(per_image.tolist(), first)}
    names = dict.fromkeys(name for shard in shards for name in shard.losses)
    means = {name: sum(shard.losses.get(name, 0.0) for shard in shards) / len(images) for name in names}
    metrics = dict(evaluation.metrics)
    if "loss" in means:
        metrics["loss"] = means.pop("loss")
    ap = metrics.get("AP")
    diagnosis = diagnose(annotations, detections, images) if ap is not None and ap < ABOUT_ZERO else []
    return replace(evaluation, metrics=metrics, statistics=statistics | means, diagnosis=tuple(diagnosis))


@torch.no_grad()
def _losses(model: Detector, batch: Batch) -> dict[str, Tensor]:
    losses = model(batch, step=0)
    return {"loss": losses.total(), **{f"val_loss/{name}": term for name, term in losses.terms.items()}}


def _to_floats(scalars: dict[str, Tensor]) -> dict[str, float]:
    """Copy scalars to the host in one transfer."""
    if not scalars:
        return {}
    return dict(zip(scalars, torch.stack(list(scalars.values())).tolist(), strict=True))


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Set the model to evaluation mode within this context; the mode of every module is restored afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def count_levels(detections: Detections, assigner: LevelAssigner) -> Tensor:
    """Count the detections assigned to each pyramid level, i64 [L], on the device. Boxes are in the input frame."""
    levels = assigner(detections.boxes)
    return torch.stack([((levels == index) & detections.valid).sum() for index in range(assigner.num_levels)])


def to_host(detections: Detections, indices: Tensor) -> tuple[NDArray[np.int64], DetectionTable]:
    """Copy the detections of a batch to the host in one transfer. Returns the rows of its images and the detections.

    All columns are packed as int32; floats keep their bits.

    Args:
        detections: in the original frame.
        indices: i64 [B], rows of Annotations.
    """
    num_images, limit = detections.scores.shape
    levels = [] if detections.anchor_levels is None else [detections.anchor_levels]
    columns = (
        indices[:, None].to(detections.scores.device),
        detections.labels,
        detections.valid,
        detections.scores.float().contiguous().view(torch.int32),
        detections.boxes.float().contiguous().view(torch.int32).flatten(1),
        *levels,
    )
    packed = torch.cat([column.int() for column in columns], dim=1).cpu().numpy()  # the one transfer
    widths = [1, limit, limit, limit, 4 * limit]
    images, labels, valid, scores, boxes, anchor_levels = np.split(packed, np.cumsum(widths), axis=1)
    kept = valid.astype(bool)
    table = DetectionTable(
        images.repeat(limit, axis=1)[kept].astype(np.int64),
        np.ascontiguousarray(boxes).view(np.float32).reshape(num_images, limit, 4)[kept],
        np.ascontiguousarray(scores).view(np.float32)[kept],
        labels[kept].astype(np.int64),
        anchor_levels[kept].astype(np.int64) if levels else None,
    )
    return images[:, 0].astype(np.int64), table


def write_evaluation(
    folder: Path,
    evaluation: Evaluation,
    annotations: Annotations,
    step: int,
    checkpoint: str,
    weights: WeightsKind,
    changed: Mapping[str, Any] | None = None,
) -> None:
    """Write an evaluation to `folder`: `metrics.json`, `predictions.json`, and one line appended to `metrics.jsonl`.

    Lines of this step and of later ones, which an interrupted run may have written, are replaced. Rank 0 only.

    Args:
        folder: created if it does not exist.
        step: training steps of the weights.
        checkpoint: file name of the weights.
        weights: `ema` for the moving average of the weights, `exported` for a file of fpn-det export.
        changed: settings that are others than in the training of the weights, by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        **evaluation.metrics,
        "step": step,
        "checkpoint": checkpoint,
        "weights": weights,
        "num_images": evaluation.num_images,
        "engine": evaluation.engine,
        "changed_settings": changed or {},
        "score_thresholds": evaluation.score_thresholds and asdict(evaluation.score_thresholds),
        "per_class": evaluation.per_class,
    }
    with replaced(folder / "predictions.json") as file:
        file.write("[")
        for number, row in enumerate(evaluation.detections.results(annotations)):
            file.write((",\n" if number else "\n") + json.dumps(row))
        file.write("\n]\n")
    history = folder / "metrics.jsonl"
    lines = history.read_text().splitlines() if history.is_file() else []
    earlier = [line for line in lines if json.loads(line)["step"] < step]
    with replaced(history) as file:
        file.writelines(f"{line}\n" for line in [*earlier, json.dumps(record, allow_nan=False)])
    with replaced(folder / "metrics.json") as file:
        file.write(json.dumps(record, indent=2, allow_nan=False) + "\n")


@contextmanager
def replaced(path: Path) -> Iterator[IO[str]]:
    """Open a temporary file that replaces `path` when it is complete, so that readers see the old file or the new one."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with unfinished.open("w") as file:
            yield file
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
