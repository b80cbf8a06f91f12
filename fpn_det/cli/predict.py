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

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fpn_det.cli.eval import saved_settings
from fpn_det.cli.launch import launch
from fpn_det.config import EvalConfig, is_exported
from fpn_det.data.flip_resize import Size
from fpn_det.data.sampling import evaluation_batches
from fpn_det.data.transforms import input_sizes
from fpn_det.export.export import open_exported
from fpn_det.export.exported import ExportedDetector
from fpn_det.image_io import BadImage
from fpn_det.inference.folder import (
    PICTURES,
    UNREADABLE,
    VIDEOS,
    Entry,
    PredictionFolder,
    draw_pictures,
    draw_video,
    drawing_names,
    without_drawings,
)
from fpn_det.inference.images import find_files, is_video
from fpn_det.inference.predictor import Predictor, Preprocessing, build_predictor, size_of
from fpn_det.inference.selection import Selection
from fpn_det.inference.video import VideoHeader, check_support, read_header
from fpn_det.models.detector import Detector
from fpn_det.models.weights import refuse_nonfinite_weights
from fpn_det.runs.checkpoint import fill_model, find_checkpoint, remark_on
from fpn_det.runtime import Ranks, keep_freed_memory, pick_device
from fpn_det.schema import Count, Fraction
from fpn_det.structures import ScoreThresholds
from fpn_det.terminal import say, shown_path, standard_console

MORE = "Set {}={}; an exported file keeps its own."


@dataclass(frozen=True, kw_only=True)
class PredictConfig(EvalConfig):
    """Settings of the run or checkpoint, what to predict, and which detections to keep."""

    source: str  # image or video file, folder, pattern such as 'photos/*.jpg', or text file with one path per line
    out: str = "predictions"  # folder of the results
    draw: bool = True  # also write annotated pictures and videos
    score: Fraction | None = None  # least score; null = that of the best F1 in the evaluation of the checkpoint
    classes: list[str] | None = None  # names of the classes to keep; null = all
    max_detections: Count | None = None  # per image or frame, at most; null = as many as the model gives
    size: Count | None = None  # shorter side of the model's input, px; null = as in the evaluation
    batch_size: Count | None = None  # images or frames at a time; null = data.eval_batch_size


def main() -> None:
    """Predict with the detector that the command line names."""
    launch(predict, PredictConfig, "predict", saved_settings)


def predict(config: PredictConfig, words: Sequence[str]) -> None:
    """Predict, and write the results.

    Raises:
        ValueError: nothing can be read, or an option is impossible.
    """
    console = standard_console()
    found = list(dict.fromkeys(find_files(config.source)))
    files = without_drawings(found, Path(config.out))
    videos = [row for row, file in enumerate(files) if is_video(file)]
    if videos:
        check_support(files[videos[0]])
    if config.batch_size is not None:
        config = replace(config, data=replace(config.data, eval_batch_size=config.batch_size))
    path, state, model, device = _open(config)
    keep_freed_memory(device)
    is_rpn_alone = config.model.get("roi_head", "") is None
    limit = f"model.{'rpn.test_filter.post_nms' if is_rpn_alone else 'roi_head.test_filter.max_detections'}"
    if config.max_detections is not None and config.max_detections > model.max_detections:
        raise ValueError(
            f"max_detections: expected at most {model.max_detections}, which is all that the model gives, got "
            f"{config.max_detections}. {MORE.format(limit, config.max_detections)}"
        )
    if remark := remark_on(path):
        say(console, remark)
    names = state["class_names"]
    ids = state.get("category_ids") or list(range(1, len(names) + 1))
    thresholds = ScoreThresholds.read(state.get("score_thresholds"), str(path))
    predictor = build_predictor(config, model, names, device, config.tta, ids, thresholds, config.data.num_workers)
    counts = {"images": len(files) - len(videos), "videos": len(videos)}
    shown = ", ".join(f"{number} {kind}" for kind, number in counts.items() if number)
    say(console, f"{shown}, {shown_path(path)}. Kept: {predictor.thresholds(config.score).origin}.")
    if len(files) < len(found):
        say(console, f"{len(found) - len(files)} drawings of earlier predictions in {config.out} are left out.")

    selection = predictor.selection(config.score, config.classes, config.max_detections)
    preprocessing = predictor.preprocessing_with(config.size)
    settings = asdict(config) | {"checkpoint": str(path), "step": state["step"], "device": None}
    settings["data"] = {"eval_batch_size": config.data.eval_batch_size, "eval_transforms": config.data.eval_transforms}
    folder = PredictionFolder(Path(config.out), files, settings)
    job = _Job(predictor, selection, preprocessing, folder, config.draw)
    _predict_rest(job, videos, console)

    summary = folder.finish(predictor.class_names, predictor.category_ids)
    errors = summary.errors
    if not summary.images:
        raise ValueError(f"source: expected images, got {len(files)} files that cannot be read. The first: {errors[0]}")
    if errors:
        unreadable = shown_path(folder.folder / UNREADABLE)
        say(console, f"{len(errors)} of {len(files)} files could not be read: {unreadable}")
    say(console, f"{summary.detections} detections: {shown_path(folder.folder)}")
    if summary.most == model.max_detections:
        say(
            console,
            f"An image has {summary.most} detections, which is all that the model gives. {MORE.format(limit, '<number>')}",
        )


class _Job:
    """Predicts, and draws, the files of a folder of predictions."""

    def __init__(
        self,
        predictor: Predictor,
        selection: Selection,
        preprocessing: Preprocessing,
        folder: PredictionFolder,
        draw: bool,
    ) -> None:
        self.predictor = predictor
        self.selection = selection
        self.preprocessing = preprocessing
        self.folder = folder
        self.drawings: list[Path] | None = None  # of the files
        if draw:
            subfolders = [folder.folder / (VIDEOS if is_video(file) else PICTURES) for file in folder.files]
            names = drawing_names(folder.files)
            self.drawings = [subfolder / name for subfolder, name in zip(subfolders, names, strict=True)]

    def remaining_images(self) -> dict[int, Size]:
        """The rows of the images that are not done, in whole batches, and their (h, w)."""
        rows = [row for row, file in enumerate(self.folder.files) if not is_video(file)]
        sizes = [size_of(self.folder.files[row]) for row in rows]
        batches = evaluation_batches(torch.tensor(sizes).view(-1, 2), self.preprocessing.batch_size, Ranks())
        size_of_row = dict(zip(rows, sizes, strict=True))
        remaining = self.folder.remaining([[rows[index] for index in batch.tolist()] for batch in batches])
        return {row: size_of_row[row] for row in remaining}

    def predict_images(self, sizes: dict[int, Size]) -> Iterator[Entry]:
        """Predict the images of these rows and (h, w)."""
        if not sizes:
            return
        files = [self.folder.files[row] for row in sizes]
        row_of = dict(zip(files, sizes, strict=True))
        ids = [row + 1 for row in sizes]
        bad: list[BadImage] = []
        found = self.predictor.stream(files, self.selection, self.preprocessing, ids, bad.append, list(sizes.values()))
        if (drawings := self.drawings) is not None:
            found = draw_pictures(found, lambda one: drawings[one.image_id - 1])
        for one in found:
            while bad:
                yield _as_error(bad.pop(), row_of)
            yield Entry(one.image_id - 1, one.size, one.to_coco())
        while bad:
            yield _as_error(bad.pop(), row_of)

    def predict_video(self, row: int, header: VideoHeader) -> Iterator[Entry]:
        """Predict the frames of the video of a row."""
        bad: list[BadImage] = []
        frames = self.predictor.stream_video(self.folder.files[row], self.selection, self.preprocessing, bad.append)
        drawn = None if self.drawings is None else draw_video(frames, self.drawings[row], header.rate)
        for one in drawn or (prediction for _, prediction in frames):
            yield Entry(row, one.size, one.to_coco(), frame=one.frame)
        yield Entry(row, error=str(bad[0]) if bad else None)


def _predict_rest(job: _Job, videos: Sequence[int], console: Console) -> None:
    """Predict what is left of a job, and note it in the folder, under a bar that shows the progress."""
    folder = job.folder
    sizes = job.remaining_images()
    _refuse_larger_than_canvas(job, sizes)
    left = [row for row in videos if row not in folder.done]
    if folder.done:
        console.print(f"{len(folder.files) - len(sizes) - len(left)} files are done already.")
    if folder.interrupted is not None:
        say(console, f"{folder.files[folder.interrupted]} was interrupted, and starts again.")
    headers = _read_headers(folder, left)
    num_images = len(folder.files) - len(videos)
    columns = TextColumn("predicting"), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, expand=True, disable=not console.is_terminal) as bar:
        total = num_images + sum(header.num_frames for header in headers.values())
        task = bar.add_task("", total=total, completed=num_images - len(sizes))
        for entry in job.predict_images(sizes):
            folder.add([entry])
            bar.advance(task)
        for row, header in headers.items():
            before = bar.tasks[task].completed
            for entry in job.predict_video(row, header):
                folder.add([entry])
                bar.advance(task, 0 if entry.ends_file else 1)
            total += int(bar.tasks[task].completed - before) - header.num_frames  # that of the header is an estimate
            bar.update(task, total=total)


def _refuse_larger_than_canvas(job: _Job, sizes: dict[int, Size]) -> None:
    """Refuse images that an exported file of one size does not take, before others are predicted in vain.

    Args:
        job: what is to be done.
        sizes: (h, w) of its images by row.

    Raises:
        ValueError: there are such images.
    """
    model = job.predictor.model
    canvas = model.file.size if isinstance(model, ExportedDetector) else None
    read = {row: size for row, size in sizes.items() if size[0] * size[1] <= job.preprocessing.max_pixels}
    if canvas is None or not read:
        return
    found = input_sizes(np.array(list(read.values())), job.preprocessing.transform)
    large = [(row, size) for row, size in zip(read, found.tolist(), strict=True) if (np.array(size) > canvas).any()]
    if large:
        row, (height, width) = large[0]
        raise ValueError(
            f"source: expected images of at most {canvas[0]} x {canvas[1]} px (h x w) in the input of the exported file, got "
            f"{len(large)} of {len(sizes)} that are larger. The first: {job.folder.files[row]}, {height} x {width}. "
            "Leave them out, set size, or export with a larger size or with size=batch."
        )


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
        exported, _ = open_exported(config.checkpoint, config.allow_targets)
        return exported.file.path, asdict(exported.file.metadata), exported, pick_device("cpu")
    path, state = find_checkpoint(config.run, config.checkpoint)
    model = config.build_model(len(state["class_names"]))
    fill_model(model, state, str(path), config.weights)
    refuse_nonfinite_weights(model.state_dict(), str(path))
    return path, state | {"step": state["progress"]["step"]}, model, pick_device(config.device)
