"""Predictions of many files in a folder, which an interrupted command continues.

Every finished image or frame is appended to a journal, which `finish` turns into the results line by line, so memory does not grow
with their number. The batches of images follow from the list of files alone, so what remains after an interruption is predicted in
the batches, and with the results, of an uninterrupted command. Videos follow the images, one after the other; one that was
interrupted is predicted from its beginning, as its drawn copy is incomplete.
"""

from __future__ import annotations

import csv
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fpn_det.inference.images import is_video
from fpn_det.inference.prediction import Prediction
from fpn_det.inference.video import VideoWriter
from fpn_det.locations import below_common_folder

T = TypeVar("T")
R = TypeVar("R")

JOURNAL = ".unfinished.jsonl"
UNREADABLE = "unreadable.txt"
PICTURES, VIDEOS = "pictures", "videos"  # subfolders of drawings
DRAWING_THREADS = 2


@dataclass(frozen=True)
class Entry:
    """One line of the journal: the detections of an image or frame, or the end of a file.

    A video has an entry for each frame and then one without a size, which ends it. An image that cannot be read has only that.
    """

    number: int  # of the file, from 0
    size: tuple[int, int] | None = None  # (h, w)
    rows: list[dict[str, Any]] | None = None  # COCO results
    error: str | None = None  # the reason why the file could not be read, or not to its end
    frame: int | None = None  # of a video, from 0

    @property
    def ends_file(self) -> bool:
        return self.frame is None


@dataclass(frozen=True)
class Summary:
    """Counts of what a folder of predictions holds."""

    images: int  # and frames, that were predicted
    detections: int
    most: int  # detections of an image or frame
    errors: list[str]  # a line for each file that could not be read, or not to its end


class PredictionFolder:
    """Folder of predictions.

    Args:
        folder: created if it does not exist.
        files: images and videos to predict.
        settings: everything else that the predictions depend on; an unfinished folder of other settings is refused.

    Attributes:
        done: finished files: where in the journal their lines begin, by the number of the file.
        interrupted: number of the video that was begun before an interruption, and is to be predicted again.

    Raises:
        ValueError: the folder holds unfinished predictions of other files or settings.
    """

    def __init__(self, folder: Path, files: Sequence[Path], settings: dict[str, Any]) -> None:
        self.folder, self.files = folder, list(files)
        self.done: dict[int, int] = {}
        self.interrupted: int | None = None
        self._begun: dict[int, int] = {}  # where the lines of unfinished videos begin
        self._journal = folder / JOURNAL
        header = json.dumps({"files": [str(file) for file in files], "settings": settings}, sort_keys=True) + "\n"
        folder.mkdir(parents=True, exist_ok=True)
        if not self._journal.is_file() or not self._continue(header):
            self._journal.write_text(header, encoding="utf-8")

    def _continue(self, header: str) -> bool:
        """Read what is done from the journal, and cut off what is incomplete. False where nothing was done with other settings."""
        with self._journal.open("r+b") as journal:
            if journal.readline() != header.encode():
                if not journal.read(1):  # such as after a refusal
                    return False
                raise ValueError(
                    f"out: expected a folder of the same files and settings, got unfinished predictions of others in {self.folder}. "
                    f"Choose another folder, or delete {self._journal}."
                )
            place = journal.tell()
            for line in journal:
                if not line.endswith(b"\n"):  # cut off by the interruption
                    break
                self._note(_entry(line), place)
                place += len(line)
            if self._begun:  # one video at most, and nothing follows it
                self.interrupted, place = self._begun.popitem()
            journal.truncate(place)
        return True

    def _note(self, entry: Entry, place: int) -> None:
        begin = self._begun.setdefault(entry.number, place)
        if entry.ends_file:
            self.done[entry.number] = begin
            del self._begun[entry.number]

    def remaining(self, batches: Iterable[Sequence[int]]) -> list[int]:
        """Return the numbers of the images that are left, in their order: whole batches."""
        return sorted(row for batch in batches if any(row not in self.done for row in batch) for row in batch)

    def add(self, entries: Sequence[Entry]) -> None:
        """Append finished images, or frames of a video, to the journal."""
        with self._journal.open("ab") as journal:
            for entry in entries:
                if entry.number not in self.done:
                    place = journal.tell()
                    journal.write(json.dumps(entry.__dict__).encode() + b"\n")
                    self._note(entry, place)

    def finish(self, class_names: Sequence[str], category_ids: Sequence[int]) -> Summary:
        """Write the results of all files, and delete the journal.

        `predictions.json` is in the COCO results format, and `images.json` holds the images and categories that its ids
        refer to; frames of videos are images with a `frame_id`, from 0 on. `predictions.csv` has a row for each detection.
        """
        name_of = dict(zip(category_ids, class_names, strict=True))
        categories = [{"id": number, "name": name} for number, name in name_of.items()]
        with_videos = any(is_video(file) for file in self.files)
        images, detections, most, errors = 0, 0, 0, []
        with (
            (self.folder / "predictions.json").open("w", encoding="utf-8") as results,
            (self.folder / "images.json").open("w", encoding="utf-8") as described,
            (self.folder / "predictions.csv").open(
                "w", encoding="utf-8", errors="surrogateescape", newline=""
            ) as spreadsheet,
        ):
            table = csv.writer(spreadsheet)
            table.writerow(["file", *(["frame"] if with_videos else []), "class", "score", "x1", "y1", "x2", "y2"])
            results.write("[")
            described.write('{"images": [')
            next_id = len(self.files) + 1  # of frames; that of an image is the number of its file
            for entry in self._entries():
                file = str(self.files[entry.number])
                if entry.error:
                    errors.append(f"{file}\t{entry.error}")
                if entry.size is None or entry.rows is None:
                    continue
                image = {"id": entry.number + 1, "file_name": file, "height": entry.size[0], "width": entry.size[1]}
                if entry.frame is not None:
                    image |= {"id": next_id, "frame_id": entry.frame}
                    next_id += 1
                described.write((", " if images else "") + json.dumps(image))
                images += 1
                most = max(most, len(entry.rows))
                for row in entry.rows:
                    results.write((", " if detections else "") + json.dumps(row | {"image_id": image["id"]}))
                    detections += 1
                    x, y, width, height = row["bbox"]
                    corners = (f"{value:.2f}" for value in (x, y, x + width, y + height))
                    frame = [entry.frame] if with_videos else []
                    table.writerow([file, *frame, name_of[row["category_id"]], f"{row['score']:.4f}", *corners])
            results.write("]")
            described.write(f'], "categories": {json.dumps(categories)}, "annotations": []}}')
        (self.folder / UNREADABLE).unlink(missing_ok=True)
        if errors:
            lines = "".join(f"{line}\n" for line in errors)
            (self.folder / UNREADABLE).write_text(lines, encoding="utf-8", errors="surrogateescape")
        self._journal.unlink()
        return Summary(images, detections, most, errors)

    def _entries(self) -> Iterator[Entry]:
        """Read the journal in the order of the files."""
        with self._journal.open("rb") as journal:
            for number in sorted(self.done):
                journal.seek(self.done[number])
                entry = _entry(journal.readline())
                yield entry
                while not entry.ends_file:
                    entry = _entry(journal.readline())
                    yield entry


def _entry(line: bytes) -> Entry:
    return Entry(**json.loads(line))


def without_drawings(files: Sequence[Path], folder: Path) -> list[Path]:
    """Leave out the drawings in a folder of predictions: they would be predicted again, and replaced while they are read.

    Raises:
        ValueError: nothing is left.
    """
    drawn = [(folder / name).resolve() for name in (PICTURES, VIDEOS)]
    kept = [file for file in files if not any(file.resolve().is_relative_to(place) for place in drawn)]
    if not kept:
        raise ValueError(f"source: expected images, got the drawings of predictions in {folder} only. Set another out.")
    return kept


def drawing_names(files: Sequence[Path]) -> list[Path]:
    """Return a distinct relative path for the drawing of each file: that below the common folder of all files."""
    names: dict[Path, None] = {}
    for place in below_common_folder(files):
        suffix = ".mp4" if is_video(place) else ".jpg"
        name = place.with_suffix(suffix)
        while name in names:  # a.png beside a.jpg
            name = name.with_name(f"{name.stem}_{place.suffix.lstrip('.')}{suffix}")
        names[name] = None
    return list(names)


def draw_pictures(predictions: Iterable[Prediction], place: Callable[[Prediction], Path]) -> Iterator[Prediction]:
    """Draw each prediction to the file that `place` names, and pass it on when that is written."""

    def draw(prediction: Prediction) -> None:
        file = place(prediction)
        file.parent.mkdir(parents=True, exist_ok=True)
        prediction.plot().save(file, quality=90)

    for prediction, _ in _in_threads(draw, predictions):
        yield prediction


def draw_video(found: Iterable[tuple[np.ndarray, Prediction]], file: Path, rate: Fraction) -> Iterator[Prediction]:
    """Draw the predictions of a video's frames to a video file of that many frames per second, and pass them on."""

    def draw(pair: tuple[np.ndarray, Prediction]) -> np.ndarray:
        pixels, prediction = pair
        return np.asarray(prediction.draw(pixels))

    file.parent.mkdir(parents=True, exist_ok=True)
    writer = VideoWriter(file, rate)
    for (_, prediction), drawn in _in_threads(draw, found):
        writer.add(drawn)
        yield prediction
    writer.close()


def _in_threads(work: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
    """Yield the items with the results of `work`, which is done in threads, in their order."""
    with ThreadPoolExecutor(DRAWING_THREADS) as pool:
        pending: deque[tuple[T, Future[R]]] = deque()
        for item in items:
            pending.append((item, pool.submit(work, item)))
            if len(pending) > 2 * DRAWING_THREADS:
                first, task = pending.popleft()
                yield first, task.result()
        for first, task in pending:
            yield first, task.result()
