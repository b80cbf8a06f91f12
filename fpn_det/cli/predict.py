"""Detect objects in images and videos.

Reads the files that `source` names and writes predictions.json (COCO results; images.json has the ids of the files),
predictions.csv, and annotated pictures and videos to the folder `out`. Repeated after an interruption, the command
continues. Files that cannot be read are listed in unreadable.txt. Videos need the extra `video`. Without `score`, a
detection is kept from the score on that gave the best F1 in the evaluation of the checkpoint; `score=0` keeps everything,
as AP needs it.

Examples:
  fpn-det predict run=runs/demo source=photos
  fpn-det predict run=runs/demo source='photos/*.jpg' out=found score=0.5
  fpn-det predict run=runs/demo source=aerial tile.size=640 tile.overlap=0.25
  fpn-det predict checkpoint=model.pt source=list.txt draw=false score=0
  fpn-det predict checkpoint=model.onnx source=photos
  fpn-det predict run=runs/demo source=clip.mp4
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
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
from fpn_det.image_io import BadImage
from fpn_det.inference.folder import (
    UNREADABLE,
    Entry,
    PredictionFolder,
    draw_pictures,
    draw_video,
    drawing_names,
    sizes_of,
)
from fpn_det.inference.images import find_files, is_video
from fpn_det.inference.predictor import Predictor, Preprocessing, build_predictor
from fpn_det.inference.selection import Selection
from fpn_det.inference.video import VideoHeader, check_support, read_header
from fpn_det.models.detector import Detector
from fpn_det.models.weights import refuse_nonfinite_weights
from fpn_det.runs.checkpoint import fill_model, find_checkpoint, remark_on
from fpn_det.runtime import Ranks, keep_freed_memory, pick_device
from fpn_det.schema import Count, Fraction
from fpn_det.structures import ScoreThresholds
from fpn_det.terminal import say, shown_path, standard_console


@dataclass(frozen=True, kw_only=True)
class PredictConfig(EvalConfig):
    """Settings of the run or checkpoint, what to predict, and which detections to keep."""

    source: str  # image or video file, folder, pattern such as 'photos/*.jpg', or text file with one path per line
    out: str = "predictions"  # folder of the results
    draw: bool = True  # also write annotated pictures and videos
    score: Fraction | None = None  # least score; null = that of the best F1 in the evaluation of the checkpoint
    classes: list[str] | None = None  # names of the classes to keep; null = all
    max_detections: Count | None = None  # per image or frame; null = as many as the model gives
    size: Count | None = None  # shorter side of the model's input, px; null = as in the evaluation
    batch_size: Count | None = None  # images or frames at a time; null = data.eval_batch_size


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
    console = standard_console()
    files = list(dict.fromkeys(find_files(config.source)))
    images = [row for row, file in enumerate(files) if not is_video(file)]
    videos = [row for row, file in enumerate(files) if is_video(file)]
    if videos:
        check_support(files[videos[0]])
    if config.batch_size is not None:
        config = replace(config, data=replace(config.data, eval_batch_size=config.batch_size))
    path, state, model, device = _open(config)
    keep_freed_memory(device)
    if remark := remark_on(path):
        say(console, remark)
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
    preprocessing = predictor.preprocessing_with(config.size)
    counts = [f"{len(rows)} {name}" for rows, name in ((images, "images"), (videos, "videos")) if rows]
    say(console, f"{', '.join(counts)}, {shown_path(path)}. Kept: {thresholds.origin}.")

    settings = asdict(config) | {"checkpoint": str(path), "step": state["step"], "device": None}
    settings["data"] = {"eval_batch_size": config.data.eval_batch_size, "eval_transforms": config.data.eval_transforms}
    folder = PredictionFolder(Path(config.out), files, settings)
    sizes = sizes_of([files[row] for row in images])
    batches = evaluation_batches(sizes, config.data.eval_batch_size, Ranks())
    rows = folder.remaining([[images[index] for index in batch.tolist()] for batch in batches])
    if folder.done:
        console.print(
            f"{len(files) - len(rows) - sum(row not in folder.done for row in videos)} files are done already."
        )
    if folder.interrupted is not None:
        again = files[folder.interrupted]
        say(console, f"{again} was interrupted, and starts again.")
    headers = _read_headers(folder, [row for row in videos if row not in folder.done])
    drawings = None
    if config.draw:
        places = {True: folder.folder / "videos", False: folder.folder / "pictures"}
        drawings = [places[is_video(file)] / name for file, name in zip(files, drawing_names(files), strict=True)]
    columns = TextColumn("predicting"), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, expand=True, disable=not console.is_terminal) as bar:
        total = len(images) + sum(header.num_frames for header in headers.values())
        task = bar.add_task("", total=total, completed=len(images) - len(rows))
        for entry in _predict_images(predictor, files, rows, drawings, selection, preprocessing):
            folder.add([entry])
            bar.advance(task)
        for row, header in headers.items():
            before = bar.tasks[task].completed
            for entry in _predict_video(predictor, files[row], row, header, drawings, selection, preprocessing):
                folder.add([entry])
                bar.advance(task, 0 if entry.ends_file else 1)
            total += int(bar.tasks[task].completed - before) - header.num_frames  # that of the header is an estimate
            bar.update(task, total=total)
    summary = folder.finish(names, ids)
    errors = summary.errors
    if not summary.images:
        raise ValueError(f"source: expected images, got {len(files)} files that cannot be read. The first: {errors[0]}")
    if errors:
        unreadable = shown_path(folder.folder / UNREADABLE)
        say(console, f"{len(errors)} of {len(files)} files could not be read: {unreadable}")
    say(console, f"{summary.detections} detections: {shown_path(folder.folder)}")


def _predict_images(
    predictor: Predictor,
    files: Sequence[Path],
    rows: Sequence[int],
    drawings: Sequence[Path] | None,
    selection: Selection,
    preprocessing: Preprocessing,
) -> Iterator[Entry]:
    """Predict, and draw unless `drawings` is None, the files of these rows."""
    if not rows:
        return
    numbers = {files[row]: row for row in rows}
    bad: list[BadImage] = []
    found = predictor.stream(
        [files[row] for row in rows], selection, preprocessing, [row + 1 for row in rows], bad.append
    )
    if drawings is not None:
        found = draw_pictures(found, lambda one: drawings[one.image_id - 1])
    for one in found:
        while bad:
            yield _as_error(bad.pop(), numbers)
        yield Entry(one.image_id - 1, one.size, one.to_coco())
    while bad:
        yield _as_error(bad.pop(), numbers)


def _predict_video(
    predictor: Predictor,
    file: Path,
    row: int,
    header: VideoHeader,
    drawings: Sequence[Path] | None,
    selection: Selection,
    preprocessing: Preprocessing,
) -> Iterator[Entry]:
    """Predict, and draw unless `drawings` is None, the frames of a video."""
    bad: list[BadImage] = []
    frames = predictor.stream_video(file, selection, preprocessing, bad.append)
    found = (one for _, one in frames) if drawings is None else draw_video(frames, drawings[row], header.rate)
    for one in found:
        yield Entry(row, one.size, one.to_coco(), frame=one.frame)
    yield Entry(row, error=str(bad[0]) if bad else None)


def _as_error(bad: BadImage, numbers: dict[Path, int]) -> Entry:
    return Entry(numbers[bad.path], error=str(bad))


def _read_headers(folder: PredictionFolder, videos: Sequence[int]) -> dict[int, VideoHeader]:
    """Read the headers of videos, and note in the folder those that cannot be opened."""
    headers = {}
    for row in videos:
        try:
            headers[row] = read_header(folder.files[row])
        except BadImage as error:
            folder.add([Entry(row, error=str(error))])
    return headers


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
