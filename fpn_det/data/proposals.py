"""Proposals that an RPN has left in a file of COCO results, for a second stage that is trained without it."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fpn_det.structures import Annotations

PROPOSAL = -1  # in place of a label, between `join` and `part`


@dataclass(frozen=True)
class SavedProposals:
    """The best boxes of every image, as flat arrays that workers share: row i of the images owns `offsets[i]:offsets[i + 1]`."""

    boxes: Tensor  # f32 [P, 4], xyxy, original frame; of each image best first
    offsets: Tensor  # i64 [I + 1]
    limit: int  # at most so many per image

    def join(self, index: int, boxes: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The boxes and labels of image row `index`, and after them its proposals: through the transforms they go together."""
        start, stop = self.offsets[index : index + 2].tolist()
        proposals = self.boxes[start:stop].numpy()
        return np.concatenate([boxes, proposals]), np.concatenate([labels, np.full(len(proposals), PROPOSAL)])

    def part(self, boxes: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The boxes and labels of the objects alone, and the proposals [limit, 4], with rows of zeros at the end."""
        drawn = labels != PROPOSAL
        proposals = np.zeros((self.limit, 4), np.float32)
        kept = boxes[~drawn][: self.limit]  # there are more where images were put together
        proposals[: len(kept)] = kept
        return boxes[drawn], labels[drawn], proposals


def read_proposals(file: Path, annotations: Annotations, limit: int) -> SavedProposals:
    """The best `limit` boxes of the images of `annotations`; those of other images are passed over, categories are not read.

    Raises:
        ValueError: the file is not one of COCO results, or has no box for these images.
    """
    row_of = {image_id: row for row, image_id in enumerate(annotations.image_ids.tolist())}
    images, scores, boxes = array("q"), array("f"), array("f")
    try:
        for result in _results(file):
            if (row := row_of.get(result["image_id"])) is not None:
                images.append(row)
                scores.append(result["score"])
                boxes.extend(result["bbox"])
        xywh = np.array(boxes, np.float32).reshape(len(images), 4)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: expected COCO results, a list of image_id, bbox and score, got something else ({error!r})."
        ) from None
    if not images:
        raise ValueError(
            f"{file}: expected proposals for these {len(annotations)} images, got none for any. Name the file of their split."
        )
    owners = np.array(images)
    order = np.lexsort((-np.array(scores), owners))  # by image, best first
    owners, xywh = owners[order], xywh[order]
    best = np.arange(len(owners)) - np.searchsorted(owners, owners) < limit
    owners, xywh = owners[best], xywh[best]
    corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    offsets = np.concatenate([[0], np.bincount(owners, minlength=len(annotations)).cumsum()])
    return SavedProposals(torch.from_numpy(corners).share_memory_(), torch.from_numpy(offsets).share_memory_(), limit)


def _results(file: Path) -> Iterator[dict[str, Any]]:
    """One by one: ours stand on a line each, so that millions need not be in memory as objects."""
    with file.open() as lines:
        stand_on_lines = lines.readline().strip() == "[" and lines.readline().rstrip().endswith(("}", "},"))
        lines.seek(0)
        if not stand_on_lines:
            yield from json.load(lines)
            return
        for line in lines:
            if text := line.strip(" ,\n[]"):
                yield json.loads(text)
