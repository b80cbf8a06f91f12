"""Predictions of many image files in a folder, which an interrupted command continues.

Every finished batch is appended to a journal. The batches follow from the list of files alone, so what remains after an
interruption is predicted in the batches, and with the results, of an uninterrupted command.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fpn_det.image_io import BadImage, image_size
from fpn_det.inference.prediction import Prediction

JOURNAL = ".unfinished.jsonl"
UNREADABLE = "unreadable.txt"
DRAWING_THREADS = 2


@dataclass(frozen=True)
class Entry:
    """One line of the journal: the detections of an image, or the reason why it could not be read."""

    number: int  # of the file, from 0
    size: tuple[int, int] | None = None  # (h, w)
    rows: list[dict[str, Any]] | None = None  # COCO results
    error: str | None = None


class PredictionFolder:
    """Folder of predictions.

    Args:
        folder: created if it does not exist.
        files: images to predict.
        settings: everything else that the predictions depend on; an unfinished folder of other settings is refused.

    Attributes:
        entries: what is done, by number of the file.

    Raises:
        ValueError: the folder holds unfinished predictions of other files or settings.
    """

    def __init__(self, folder: Path, files: Sequence[Path], settings: dict[str, Any]) -> None:
        self.folder, self.files = folder, list(files)
        self.entries: dict[int, Entry] = {}
        self._journal = folder / JOURNAL
        header = json.dumps({"files": [str(file) for file in files], "settings": settings}, sort_keys=True)
        folder.mkdir(parents=True, exist_ok=True)
        if self._journal.is_file():
            first, *lines = self._journal.read_text(encoding="utf-8").split("\n")
            if first != header:
                raise ValueError(
                    f"out: expected a folder of the same files and settings, got unfinished predictions of others in {folder}. "
                    f"Choose another folder, or delete {self._journal}."
                )
            for line in lines[:-1]:  # the last one is empty, or was cut off
                entry = Entry(**json.loads(line))
                self.entries[entry.number] = entry
            self._journal.write_text("\n".join([first, *lines[:-1]]) + "\n", encoding="utf-8")
        else:
            self._journal.write_text(header + "\n", encoding="utf-8")

    def remaining(self, batches: Sequence[torch.Tensor]) -> list[int]:
        """Return the numbers of the files that are left, in their order: whole batches."""
        rows = [
            row for batch in batches if any(row not in self.entries for row in batch.tolist()) for row in batch.tolist()
        ]
        return sorted(rows)

    def add(self, entries: Sequence[Entry]) -> None:
        """Append finished images to the journal, in one write."""
        lines = [json.dumps(entry.__dict__) + "\n" for entry in entries if entry.number not in self.entries]
        with self._journal.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
        self.entries |= {entry.number: entry for entry in entries}

    def finish(self, class_names: Sequence[str], category_ids: Sequence[int]) -> tuple[int, list[str]]:
        """Write the results of all images, and delete the journal. Returns the number of detections, and the unreadable files.

        `predictions.json` is in the COCO results format, and `images.json` holds the images and categories that its ids
        refer to. `predictions.csv` has a row for each detection.
        """
        entries = [self.entries[number] for number in sorted(self.entries)]
        found = [(self.files[entry.number], row) for entry in entries for row in entry.rows or ()]
        images = [
            {
                "id": entry.number + 1,
                "file_name": str(self.files[entry.number]),
                "height": entry.size[0],
                "width": entry.size[1],
            }
            for entry in entries
            if entry.size is not None
        ]
        categories = [{"id": number, "name": name} for number, name in zip(category_ids, class_names, strict=True)]
        dataset = {"images": images, "categories": categories, "annotations": []}
        (self.folder / "predictions.json").write_text(json.dumps([row for _, row in found]), encoding="utf-8")
        (self.folder / "images.json").write_text(json.dumps(dataset), encoding="utf-8")
        name_of = dict(zip(category_ids, class_names, strict=True))
        with (self.folder / "predictions.csv").open(
            "w", encoding="utf-8", errors="surrogateescape", newline=""
        ) as file:
            table = csv.writer(file)
            table.writerow(["file", "class", "score", "x1", "y1", "x2", "y2"])
            for path, row in found:
                x, y, width, height = row["bbox"]
                corners = (f"{value:.2f}" for value in (x, y, x + width, y + height))
                table.writerow([path, name_of[row["category_id"]], f"{row['score']:.4f}", *corners])
        errors = [f"{self.files[entry.number]}\t{entry.error}" for entry in entries if entry.error]
        (self.folder / UNREADABLE).unlink(missing_ok=True)
        if errors:
            (self.folder / UNREADABLE).write_text("".join(f"{line}\n" for line in errors), encoding="utf-8")
        self._journal.unlink()
        return len(found), errors


def picture_names(files: Sequence[Path]) -> list[Path]:
    """Return a distinct relative path for the drawing of each file: that below the common folder of all files."""
    parents = [file.absolute().parent for file in files]
    common = parents[0]
    while not all(parent.is_relative_to(common) for parent in parents):
        common = common.parent
    names: dict[Path, None] = {}
    for file in files:
        name = file.absolute().relative_to(common).with_suffix(".jpg")
        while name in names:  # a.png beside a.jpg
            name = name.with_name(f"{name.stem}_{file.suffix.lstrip('.')}.jpg")
        names[name] = None
    return list(names)


def draw_all(predictions: Iterator[Prediction], place: Callable[[Prediction], Path]) -> Iterator[Prediction]:
    """Pass predictions on, and meanwhile draw each of them to the file that `place` names."""
    with ThreadPoolExecutor(DRAWING_THREADS) as pool:
        pending = []
        for prediction in predictions:
            pending.append(pool.submit(_draw, prediction, place(prediction)))
            while len(pending) > 4 * DRAWING_THREADS:
                pending.pop(0).result()
            yield prediction
        for task in pending:
            task.result()


def _draw(prediction: Prediction, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    prediction.plot().save(file, quality=90)


def sizes_of(files: Sequence[Path]) -> torch.Tensor:
    """Return the (h, w) of the files, i64 [n, 2]; 1 x 1 of those that cannot be read."""
    return torch.tensor([image_size(file) or (1, 1) for file in files]).view(-1, 2)


def as_error(bad: BadImage, numbers: dict[Path, int]) -> Entry:
    """Return the journal's entry of an unreadable image."""
    return Entry(numbers[bad.path], error=str(bad))
