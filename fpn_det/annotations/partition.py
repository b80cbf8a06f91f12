"""Divide the images of a data set between splits, by lists of names or at random by shares.

Files of equal bytes are one picture, and a picture is in one split only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from fpn_det.annotations.files import near_matches, non_empty_lines
from fpn_det.annotations.findings import one_line
from fpn_det.annotations.reading import CheckedDataset
from fpn_det.annotations.splits import select_rows


def divide(
    dataset: CheckedDataset, names: Sequence[str], parts: Mapping[str, float | Path], seed: int
) -> dict[str, CheckedDataset]:
    """Return a data set for each of `parts`, and the rest as `train`; each keeps the order of the images.

    Args:
        dataset: the images to divide.
        names: of the images, relative to their folder.
        parts: for each split a share of all images, drawn at random, or a text file that lists names, with or without
            folder and ending.
        seed: of the random choice.

    Raises:
        ValueError: a list has an unknown name or an image of another list, or a split would have no image.
    """
    members = _pictures(dataset)
    picture_of = {row: number for number, rows in enumerate(members) for row in rows}
    split_of: dict[int, str] = {}  # of a picture
    for split, part in parts.items():
        for row in [] if isinstance(part, float) else _listed(part, names):
            owner = split_of.setdefault(picture_of[row], split)
            if owner != split:
                raise ValueError(
                    f"{split}: expected images that no other split has, got {one_line(names[row])}, which is in {owner} "
                    "too, maybe under another name. Remove it from one list."
                )
    free = [number for number in range(len(members)) if number not in split_of]
    order = np.random.default_rng(seed).permutation(free).tolist()
    for split, part in parts.items():
        room = round(part * len(names)) if isinstance(part, float) else 0
        for number in order:
            if number not in split_of and len(members[number]) <= room:
                split_of[number] = split
                room -= len(members[number])
    rows = {
        split: [row for row in picture_of if split_of.get(picture_of[row], "train") == split]
        for split in ("train", *parts)
    }
    for split, found in rows.items():
        if not found:
            raise ValueError(
                f"{split}: expected an image at least, got none of {len(members)} different images. "
                "Choose other shares or lists."
            )
    return {split: select_rows(dataset, sorted(found)) for split, found in rows.items()}


def _pictures(dataset: CheckedDataset) -> list[list[int]]:
    """The rows of each picture: those of equal bytes, or of one path where files were not inspected."""
    rows_of: dict[str, list[int]] = {}
    for row, digest in enumerate(dataset.digests):
        key = digest or os.path.abspath(dataset.annotations.path(row))
        rows_of.setdefault(key, []).append(row)
    return list(rows_of.values())


def _listed(file: Path, names: Sequence[str]) -> list[int]:
    """The rows of the images that a text file lists.

    Raises:
        ValueError: the list is empty, or a name is unknown or means several images.
    """
    rows_of: dict[str, set[int]] = {}
    for row, name in enumerate(names):
        path = PurePosixPath(name)
        for form in (name, path.with_suffix("").as_posix(), path.name, path.stem):
            rows_of.setdefault(form, set()).add(row)
    found: list[int] = []
    for line in non_empty_lines(file):
        path = PurePosixPath(line.replace("\\", "/"))
        rows = rows_of.get(path.as_posix()) or rows_of.get(path.name) or set()
        if len(rows) != 1:
            wrong = "several of that name" if rows else f"none{_near(line, rows_of)}"
            raise ValueError(f"{file}: expected the name of an image, got '{one_line(line[:200])}': there are {wrong}.")
        found += rows
    if not found:
        raise ValueError(f"{file}: expected a name in each line, got an empty list.")
    return found


def _near(name: str, names: Mapping[str, object]) -> str:
    near = near_matches(name, names)
    return f" (near: {', '.join(map(one_line, near))})" if near else ""
