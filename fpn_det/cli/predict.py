"""Detect objects in images.

Reads the files that `source` names and writes predictions.json (COCO results; images.json has the ids of the files),
predictions.csv and annotated pictures to the folder `out`. Repeated after an interruption, the command continues.
Files that cannot be read are listed in unreadable.txt. Without `score`, a detection is kept from the score on
that gave the best F1 in the evaluation of the checkpoint; `score=0` keeps everything, as AP needs it.

Examples:
  fpn-det predict run=runs/demo source=photos
  fpn-det predict run=runs/demo source='photos/*.jpg' out=found score=0.5
  fpn-det predict checkpoint=model.pt source=list.txt draw=false score=0 batch_size=8
  fpn-det predict checkpoint=model.onnx source=photos
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fpn_det.cli.eval import saved_settings
from fpn_det.cli.launch import launch
from fpn_det.composition import literal
from fpn_det.config import EvalConfig
from fpn_det.data.sampling import evaluation_batches
from fpn_det.export.export import open_exported
from fpn_det.export.exported import ExportedDetector, is_exported
from fpn_det.inference.folder import UNREADABLE, Entry, PredictionFolder, as_error, draw_all, picture_names, sizes_of
from fpn_det.inference.images import find_files, is_video
from fpn_det.inference.predictor import build_predictor
from fpn_det.models.detector import Detector
from fpn_det.models.weights import refuse_nonfinite_weights
from fpn_det.runs.checkpoint import fill_model, find_checkpoint, remark_on
from fpn_det.runs.log import PLAIN_WIDTH
from fpn_det.runtime import Ranks, pick_device
from fpn_det.schema import Count, Fraction
from fpn_det.structures import ScoreThresholds
from fpn_det.terminal import SafeConsole, shown_path


@dataclass(frozen=True, kw_only=True)
class PredictConfig(EvalConfig):
    """Settings of the run or checkpoint, what to predict, and which detections to keep."""

    source: str  # image file, folder, pattern such as 'photos/*.jpg', or text file with one path per line
    out: str = "predictions"  # folder of the results
    draw: bool = True  # also write annotated pictures
    score: Fraction | None = None  # least score; null = that of the best F1 in the evaluation of the checkpoint
    classes: list[str] | None = None  # names of the classes to keep; null = all
    max_detections: Count | None = None  # per image; null = as many as the model gives
    size: Count | None = None  # shorter side of the model's input, px; null = as in the evaluation
    batch_size: Count | None = None  # images at a time; null = data.eval_batch_size


def main() -> None:
    """Predict with the detector that the command line names."""
    sys.argv[1:] = [_literal(word) for word in sys.argv[1:]]
    launch(predict, PredictConfig, "predict", saved_settings)


def _literal(word: str) -> str:
    """A pattern such as `photos/[ab]*.jpg` needs no quotes."""
    name, _, text = word.partition("=")
    return literal(name, text) if name in ("source", "out") and not text.startswith(("'", '"')) else word


def predict(config: PredictConfig, words: Sequence[str]) -> None:
    """Predict, and write the results.

    Raises:
        ValueError: nothing can be read, or an option is impossible.
    """
    console = SafeConsole(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    files = list(dict.fromkeys(find_files(config.source)))
    if videos := [file for file in files if is_video(file)]:
        raise ValueError(f"source: expected images, got the video {videos[0]}. Extract its frames first.")
    if config.batch_size is not None:
        config = replace(config, data=replace(config.data, eval_batch_size=config.batch_size))
    path, state, model, device = _open(config)
    if remark := remark_on(path):
        console.print(remark, markup=False)
    names = state["class_names"]
    ids = state.get("category_ids") or list(range(1, len(names) + 1))
    predictor = build_predictor(
        config,
        model,
        names,
        device,
        config.tta,
        ids,
        ScoreThresholds.read(state.get("score_thresholds"), str(path)),
        config.data.num_workers,
    )
    thresholds = predictor.thresholds(config.score)
    selection = predictor.selection(config.score, config.classes, config.max_detections)
    console.print(f"{len(files)} images, {path}. Kept: {thresholds.origin}.", markup=False, soft_wrap=True)

    settings = asdict(config) | {"checkpoint": str(path), "step": state["step"], "device": None}
    settings["data"] = {"eval_batch_size": config.data.eval_batch_size, "eval_transforms": config.data.eval_transforms}
    folder = PredictionFolder(Path(config.out), files, settings)
    batches = evaluation_batches(sizes_of(files), config.data.eval_batch_size, Ranks())
    rows = folder.remaining(batches)
    if len(rows) < len(files):
        console.print(f"{len(files) - len(rows)} images are done already.")
    numbers = {files[row]: row for row in rows}
    pictures = picture_names(files)
    columns = TextColumn("predicting"), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, expand=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(files), completed=len(files) - len(rows))

        def skip(bad) -> None:
            folder.add([as_error(bad, numbers)])
            bar.advance(task)

        found = predictor.stream([files[row] for row in rows], selection, config.size, [row + 1 for row in rows], skip)
        if config.draw:
            found = draw_all(found, lambda one: folder.folder / "pictures" / pictures[one.image_id - 1])
        for one in found:
            folder.add([Entry(one.image_id - 1, one.size, one.to_coco())])
            bar.advance(task)
    count, errors = folder.finish(names, ids)
    if len(errors) == len(files):
        raise ValueError(f"source: expected images, got {len(files)} files that cannot be read. The first: {errors[0]}")
    if errors:
        console.print(
            f"{len(errors)} of {len(files)} files could not be read: {shown_path(folder.folder / UNREADABLE)}"
        )
    console.print(f"{count} detections: {shown_path(folder.folder)}", markup=False, soft_wrap=True)


def _open(config: PredictConfig) -> tuple[Path, dict[str, Any], Detector | ExportedDetector, torch.device]:
    """The file that is asked for, what it says about itself, and its detector with the device to run it on."""
    if is_exported(config.checkpoint):
        exported = open_exported(config.checkpoint)
        return exported.file.path, exported.file.metadata, exported, pick_device("cpu")
    path, state = find_checkpoint(config.run, config.checkpoint)
    model = config.build_model(len(state["class_names"]))
    fill_model(model, state, str(path), config.weights)
    refuse_nonfinite_weights(model.state_dict(), str(path))
    return path, state | {"step": state["progress"]["step"]}, model, pick_device(config.device)
