"""Precomputed proposals in the COCO results format, for Fast R-CNN training without an RPN."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor

from fpn_det.structures import Annotations

PROPOSAL_LABEL = -1  # of proposals among the objects, between `append` and `split`


class _Result(msgspec.Struct, gc=False):
    image_id: int
    score: float
    bbox: tuple[float, float, float, float]  # xywh


@dataclass(frozen=True)
class SavedProposals:
    """The best proposals of every image, in shared memory. Image row i owns the boxes `offsets[i]:offsets[i + 1]`."""

    boxes: Tensor  # f32 [P, 4], xyxy, original frame; sorted by score within an image
    offsets: Tensor  # i64 [I + 1]
    limit: int  # maximum per image

    def append(self, index: int, boxes: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Append the proposals of image row `index` to its objects, so that they are transformed together."""
        start, stop = self.offsets[index : index + 2].tolist()
        proposals = self.boxes[start:stop].numpy()
        return np.concatenate([boxes, proposals]), np.concatenate([labels, np.full(len(proposals), PROPOSAL_LABEL)])

    def split(self, boxes: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Separate transformed boxes into those of objects, their labels, and proposals [limit, 4], padded with zeros."""
        is_object = labels != PROPOSAL_LABEL
        proposals = np.zeros((self.limit, 4), np.float32)
        kept = boxes[~is_object][: self.limit]  # a mosaic has those of several images
        proposals[: len(kept)] = kept
        return boxes[is_object], labels[is_object], proposals


def read_proposals(file: Path, annotations: Annotations, limit: int) -> SavedProposals:
    """Read the `limit` best-scored boxes of each image of `annotations`. Other images and the categories are ignored.

    Raises:
        ValueError: the file is not in the COCO results format, or has no box for these images.
    """
    row_of = {image_id: row for row, image_id in enumerate(annotations.image_ids.tolist())}
    images, scores, boxes = array("q"), array("f"), array("f")
    try:
        for result in _results(file):
            if (row := row_of.get(result.image_id)) is not None:
                images.append(row)
                scores.append(result.score)
                boxes.extend(result.bbox)
        xywh = np.array(boxes, np.float32).reshape(len(images), 4)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file}: expected COCO results, a list of image_id, bbox and score, got something else ({error}). Write one with evaluation=proposals."
        ) from None
    if not images:
        raise ValueError(
            f"{file}: expected proposals for these {len(annotations)} images, got none for any. Give the file of their split."
        )
    owners = np.array(images)
    order = np.lexsort((-np.array(scores), owners))  # by image, best first
    owners, xywh = owners[order], xywh[order]
    best = np.arange(len(owners)) - np.searchsorted(owners, owners) < limit
    owners, xywh = owners[best], xywh[best]
    corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    offsets = np.concatenate([[0], np.bincount(owners, minlength=len(annotations)).cumsum()])
    return SavedProposals(torch.from_numpy(corners).share_memory_(), torch.from_numpy(offsets).share_memory_(), limit)


def _results(file: Path) -> Iterator[_Result]:
    """Yield the results. A file with one result per line, as evaluation writes it, is read without loading all of them."""
    with file.open("rb") as lines:
        one_per_line = lines.readline().strip() == b"[" and lines.readline().rstrip().endswith((b"}", b"},"))
        lines.seek(0)
        if not one_per_line:
            yield from msgspec.json.decode(lines.read(), type=list[_Result])
            return
        decode = msgspec.json.Decoder(_Result).decode
        for line in lines:
            if text := line.strip(b" ,\r\n[]"):
                yield decode(text)
