"""ImageTable that are in two parts of a data set: what was trained on scores too well."""

from __future__ import annotations

import logging
import os
from dataclasses import replace

import torch

from fpn_det.annotations.check_images import OnError
from fpn_det.annotations.findings import Finding, describe_findings
from fpn_det.annotations.reading import CheckedDataset
from fpn_det.annotations.subsets import select_images

# Some sets have a few copies under other names, and nobody takes them out: up to this share they are only a warning.
TOLERATED_COPIES = 1e-3

logger = logging.getLogger(__name__)


def find_overlap(one: CheckedDataset, other: CheckedDataset, name: str) -> dict[int, Finding]:
    """Rows of `one` whose file, or a copy of it to the byte, is also in `other`, the part called `name`."""
    paths, digests = _keys(one), one.digests
    files = dict(zip(_keys(other), range(len(other.annotations)), strict=True))
    copies = {digest: row for row, digest in enumerate(other.digests) if digest}
    found: dict[int, Finding] = {}
    for row, (path, digest) in enumerate(zip(paths, digests, strict=True)):
        twin = files.get(path, copies.get(digest))
        if twin is None:
            continue
        image_id, other_id = int(one.annotations.image_ids[row]), int(other.annotations.image_ids[twin])
        if path in files:
            kind, text = "image_in_two_splits", f"the picture is also in data.{name}, as image {other_id}"
        else:
            kind, text = (
                "image_copied_to_two_splits",
                f"a copy, to the byte, is in data.{name}: image {other_id}, {other.annotations.path(twin)}",
            )
        found[row] = Finding(kind, text, "error", image_id, str(one.annotations.path(row)))
    if all(finding.kind == "image_copied_to_two_splits" for finding in found.values()) and len(
        found
    ) <= TOLERATED_COPIES * len(paths):
        return {row: replace(finding, severity="warning") for row, finding in found.items()}
    return found


def drop_overlap(train: CheckedDataset, val: CheckedDataset, on_error: OnError) -> CheckedDataset:
    """The training set without pictures that it will be evaluated on.

    Raises:
        ValueError: there are such pictures, under `fail`.
    """
    shared = find_overlap(train, val, "val")
    if not shared:
        return train
    described = describe_findings(list(shared.values()))
    if on_error == "fail" and any(finding.severity == "error" for finding in shared.values()):
        raise ValueError(
            f"data.train: expected pictures of its own, got {len(shared)} that are in data.val too. Correct the files, or set "
            f"data.on_error=fix to leave these out of training.\n{described}"
        )
    logger.warning("data.train: %s:\n%s", "worth a look" if on_error == "fail" else "left out of training", described)
    if on_error == "fail":
        return train
    rows = [row for row in range(len(train.annotations)) if row not in shared]
    return CheckedDataset(
        select_images(train.annotations, torch.tensor(rows, dtype=torch.int64)),
        train.findings,
        [train.digests[row] for row in rows],
    )


def _keys(part: CheckedDataset) -> list[str]:
    return [os.path.normpath(part.annotations.path(row).absolute()) for row in range(len(part.annotations))]
