"""Checks of the splits of a data set against each other: images of training must not be evaluated on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fpn_det.annotations.findings import Finding
from fpn_det.annotations.reading import CheckedDataset
from fpn_det.annotations.subsets import select_images
from fpn_det.structures import Annotations

# Some published sets have a few copies under other names. Up to this share of the images this is only a warning.
TOLERATED_COPIES = 1e-3


@dataclass(frozen=True)
class TrainData:
    """Images to train on and to evaluate on, and what was found wrong with them, by split."""

    train: Annotations
    val: Annotations
    findings: Mapping[str, list[Finding]]


def find_overlap(one: CheckedDataset, other: CheckedDataset, name: str) -> dict[int, Finding]:
    """Find the images of `one` that are also in `other`, as the same file or as a copy of its bytes.

    Args:
        one: a split.
        other: another split.
        name: of the other split as messages call it, such as `data.val`.

    Returns:
        A finding for each row of `one` that is in both.
    """
    paths = _paths(one)
    row_of_path = {path: row for row, path in enumerate(_paths(other))}
    row_of_digest = {digest: row for row, digest in enumerate(other.digests) if digest}
    found: dict[int, Finding] = {}
    for row, (path, digest) in enumerate(zip(paths, one.digests, strict=True)):
        twin = row_of_path.get(path, row_of_digest.get(digest))
        if twin is None:
            continue
        image_id, other_id = int(one.annotations.image_ids[row]), int(other.annotations.image_ids[twin])
        if path in row_of_path:
            kind, message = "image_in_two_splits", f"this image is also in {name}, as image {other_id}"
        else:
            kind = "image_copied_to_two_splits"
            copy = other.annotations.path(twin)
            message = f"{name} has a copy with the same bytes: image {other_id}, {copy}"
        found[row] = Finding(kind, message, "error", image_id, str(one.annotations.path(row)))
    are_copies = all(finding.kind == "image_copied_to_two_splits" for finding in found.values())
    if are_copies and len(found) <= TOLERATED_COPIES * len(paths):
        return {row: replace(finding, severity="warning") for row, finding in found.items()}
    return found


def are_same_images(one: CheckedDataset, other: CheckedDataset) -> bool:
    """True if both splits name the same list of images, so the evaluation on training images is intended."""
    return one.image_lists == other.image_lists and None not in one.image_lists


def select_rows(dataset: CheckedDataset, rows: Sequence[int]) -> CheckedDataset:
    """Return the data set with the images of `rows` only, in that order."""
    annotations = select_images(dataset.annotations, torch.tensor(rows, dtype=torch.int64))
    return replace(dataset, annotations=annotations, digests=[dataset.digests[row] for row in rows])


def drop_images(dataset: CheckedDataset, rows: Iterable[int]) -> CheckedDataset:
    """Return the data set without the images of `rows`."""
    dropped = set(rows)
    return select_rows(dataset, [row for row in range(len(dataset.annotations)) if row not in dropped])


def _paths(dataset: CheckedDataset) -> list[str]:
    annotations = dataset.annotations
    return [os.path.abspath(annotations.path(row)) for row in range(len(annotations))]
