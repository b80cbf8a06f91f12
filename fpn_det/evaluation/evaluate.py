"""From a model and a loader to numbers, and from numbers to files.

Every rank detects on its own images; the detections travel as plain arrays to rank 0, are scored there once, and the
numbers travel back.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fpn_det.evaluation.coco import DetectionTable, Evaluation, EvaluationSettings, score
from fpn_det.evaluation.diagnosis import ABOUT_ZERO, diagnose
from fpn_det.models.detector import Detector
from fpn_det.models.roi_align import LevelAssigner
from fpn_det.models.views import Views
from fpn_det.runtime import broadcast_object, gather_objects
from fpn_det.structures import Annotations, Batch, Detections


def evaluate(
    model: Detector,
    loader: Iterable[Batch],
    annotations: Annotations,
    settings: EvaluationSettings,
    dtype: torch.dtype | None = None,
    tta: Views | None = None,
    with_losses: bool = False,
) -> Evaluation:
    """Detect on the images of `loader` and score the detections of all ranks, on all ranks.

    The other ranks wait while rank 0 scores (half a minute for 5,000 images of 100 detections).

    Args:
        model: the bare module; its modes are afterwards what they were.
        loader: this rank's images, on the model's device. Over all ranks every image comes once.
        annotations: the ground truth, whose rows `Batch.indices` are.
        settings: what is counted.
        dtype: that of autocast; None computes as the model is.
        tta: test-time augmentation; None looks once.
        with_losses: measure the losses too, as the metric `loss` and its terms as statistics. The same anchors and boxes are
            sampled every time.
    """
    start = time.perf_counter()
    finder = model.without_roi_head() if settings.target == "proposals" else model
    assigner, cap = finder.assigner, finder.max_detections
    images: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    tables: list[DetectionTable] = []
    levels = torch.zeros(assigner.num_levels, dtype=torch.int64)
    losses: dict[str, Tensor] = {}  # summed over images
    with evaluation_mode(model):
        for batch in loader:
            with torch.autocast(batch.pixels.device.type, dtype, enabled=dtype is not None):
                detections = finder.detect(batch, tta)
                for name, mean in (_losses(model, batch) if with_losses else {}).items():
                    losses[name] = losses.get(name, 0) + mean * len(batch)
            levels = levels.to(detections.boxes.device) + count_levels(detections, assigner)
            batch_images, table = to_host(detections.to_original(batch), batch.indices)
            images.append(batch_images)
            tables.append(table)

    shards = gather_objects(
        (np.concatenate(images), DetectionTable.join(tables), levels.cpu().numpy(), _to_floats(losses))
    )
    scored = None
    if shards is not None:
        evaluated, found, counts, sums = (list(column) for column in zip(*shards, strict=True))
        scored = score(annotations, DetectionTable.join(found), np.concatenate(evaluated), settings, cap)
        per_image = sum(counts) / max(scored.num_images, 1)
        names = [f"detections/P{assigner.first + index}" for index in range(assigner.num_levels)]
        statistics = dict(zip(names, per_image.tolist(), strict=True))
        means = {name: sum(part.get(name, 0.0) for part in sums) / scored.num_images for part in sums for name in part}
        metrics: dict[str, float | None] = {
            **scored.metrics,
            **{name: means.pop(name) for name in ("loss",) if name in means},
        }
        ap = metrics.get("AP")
        causes = (
            ()
            if ap is None or ap >= ABOUT_ZERO
            else diagnose(annotations, scored.detections, np.concatenate(evaluated))
        )
        seconds = time.perf_counter() - start
        scored = replace(
            scored, metrics=metrics, statistics=statistics | means, seconds=seconds, diagnosis=tuple(causes)
        )
    told = broadcast_object(scored and replace(scored, detections=DetectionTable.join([])))
    return scored or told


@torch.no_grad()
def _losses(model: Detector, batch: Batch) -> dict[str, Tensor]:
    losses = model(batch, step=0)
    return {"loss": losses.total(), **{f"val_loss/{name}": term for name, term in losses.terms.items()}}


def _to_floats(scalars: dict[str, Tensor]) -> dict[str, float]:
    return dict(zip(scalars, torch.stack(list(scalars.values())).tolist(), strict=True)) if scalars else {}


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards every module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def count_levels(detections: Detections, assigner: LevelAssigner) -> Tensor:
    """How many detections have the size of each level [L], on the device. Boxes are in the input frame."""
    levels = assigner(detections.boxes)
    return torch.stack([((levels == index) & detections.valid).sum() for index in range(assigner.num_levels)])


def to_host(detections: Detections, indices: Tensor) -> tuple[NDArray[np.int64], DetectionTable]:
    """The images of a batch, and its detections as flat arrays, in one transfer.

    For that everything travels as int32: the floats as the bits they are.
    """
    num_images, limit = detections.scores.shape
    columns = (
        indices[:, None].to(detections.scores.device),
        detections.labels,
        detections.valid,
        detections.scores.float().contiguous().view(torch.int32),
        detections.boxes.float().contiguous().view(torch.int32).flatten(1),
    )
    packed = torch.cat([column.int() for column in columns], dim=1).cpu().numpy()  # the one transfer
    images, labels, valid, scores, boxes = np.split(packed, np.cumsum([1, limit, limit, limit]), axis=1)
    kept = valid.astype(bool)
    table = DetectionTable(
        images.repeat(limit, axis=1)[kept].astype(np.int64),
        np.ascontiguousarray(boxes).view(np.float32).reshape(num_images, limit, 4)[kept],
        np.ascontiguousarray(scores).view(np.float32)[kept],
        labels[kept].astype(np.int64),
    )
    return images[:, 0].astype(np.int64), table


def write_evaluation(
    folder: Path,
    evaluation: Evaluation,
    annotations: Annotations,
    step: int,
    checkpoint: str,
    weights: Literal["ema", "raw"],
) -> None:
    """Leave an evaluation in `folder`: `metrics.json`, a line more in `metrics.jsonl`, and `predictions.json`.

    Lines of this step and later ones, which an interrupted run may have left, are replaced. Rank 0 only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        **evaluation.metrics,
        "step": step,
        "checkpoint": checkpoint,
        "weights": weights,
        "num_images": evaluation.num_images,
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
    """A file that takes the place of `path` when it is complete: a reader finds the old one or the new one."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with unfinished.open("w") as file:
            yield file
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
