"""Subsets and concatenations of data sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fpn_det.structures import Annotations, offsets_of


def select_images(annotations: Annotations, rows: Tensor) -> Annotations:
    """Return the images of `rows` (i64 [N]) with their objects, in that order."""
    objects, offsets = _select_ragged(annotations.offsets, rows)
    characters, path_offsets = _select_ragged(annotations.path_offsets, rows)
    return replace(
        annotations,
        image_ids=annotations.image_ids[rows],
        path_bytes=annotations.path_bytes[characters],
        path_offsets=path_offsets,
        sizes=annotations.sizes[rows],
        offsets=offsets,
        boxes=annotations.boxes[objects],
        labels=annotations.labels[objects],
        iscrowd=annotations.iscrowd[objects],
        area=annotations.area[objects],
        annotation_ids=annotations.annotation_ids[objects],
    )


def drop_empty(annotations: Annotations) -> Annotations:
    """Return the images with at least one object that is not a crowd region."""
    return select_images(annotations, annotations.objects_per_image.nonzero().flatten())


def split_images(
    annotations: Annotations, val_fraction: float, seed: int, digests: Sequence[str] = ()
) -> tuple[Annotations, Annotations]:
    """Split the images at random into training and validation, each in the order of the file.

    Args:
        annotations: the images.
        val_fraction: share of the validation.
        seed: of the random choice.
        digests: of each image's bytes, as far as they are known. Copies of an image stay together.

    Raises:
        ValueError: one of the two would be empty.
    """
    keys = digests[: len(annotations)] or [""] * len(annotations)
    number_of: dict[str | int, int] = {}  # of distinct images
    numbers = np.array([number_of.setdefault(digest or row, len(number_of)) for row, digest in enumerate(keys)], int)
    counts = np.bincount(numbers)
    room = round(len(annotations) * val_fraction)
    is_held_out = np.zeros(len(counts), dtype=bool)
    for number in np.random.default_rng(seed).permutation(len(counts)).tolist():
        if counts[number] <= room:
            is_held_out[number] = True
            room -= counts[number]
    is_val = is_held_out[numbers]
    if not 0 < is_val.sum() < len(annotations):
        raise ValueError(
            f"data.val_fraction: expected a share that leaves images on both sides, got {val_fraction} of {len(annotations)} image(s)."
        )
    train, val = (select_images(annotations, torch.from_numpy(np.flatnonzero(side))) for side in (~is_val, is_val))
    return train, val


def concatenate(parts: Sequence[Annotations]) -> Annotations:
    """Concatenate data sets of the same classes.

    Image and annotation ids stay unless they clash; then those of each further part are raised above the ones before.
    """
    if len(parts) == 1:
        return parts[0]

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    def joined_offsets(name: str) -> Tensor:
        counts = torch.cat([getattr(part, name).diff() for part in parts])
        return offsets_of(counts)

    return replace(
        parts[0],
        image_ids=_distinct([part.image_ids for part in parts]),
        path_bytes=joined("path_bytes"),
        path_offsets=joined_offsets("path_offsets"),
        sizes=joined("sizes"),
        offsets=joined_offsets("offsets"),
        boxes=joined("boxes"),
        labels=joined("labels"),
        iscrowd=joined("iscrowd"),
        area=joined("area"),
        annotation_ids=_distinct([part.annotation_ids for part in parts]),
    )


def _select_ragged(offsets: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions of the elements of `rows` in a ragged array, and the offsets of the selected array."""
    counts = offsets.diff()[rows]
    selected = offsets_of(counts)
    shift = torch.repeat_interleave(offsets[:-1][rows] - selected[:-1], counts)
    return torch.arange(len(shift)) + shift, selected


def _distinct(parts: Sequence[Tensor]) -> Tensor:
    joined = torch.cat(list(parts))
    if len(joined.unique()) == len(joined):
        return joined
    raised: list[Tensor] = []
    for ids in parts:
        highest = max([int(part.max()) for part in raised if len(part)], default=0)
        raised.append(ids + (highest + 1 - int(ids.min()) if raised and len(ids) else 0))
    return torch.cat(raised)
