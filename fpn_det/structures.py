"""Data structures that are passed between the modules of the package.

Letters of shapes, in all modules: B images, L levels, N cells, A anchors per cell, M = N * A anchors, G objects per image
(padded), R proposals, S samples, D detections, K foreground classes, C channels, (H, W) size of a tensor, (h, w) size of an
image before padding.

Boxes are in one of two frames: the original frame is in pixels of the image file, the input frame in pixels of the resized
image that the model receives. `boxes.py` states the convention of coordinates. Tensors of fixed shape have a `valid` mask; rows
where it is False hold defined values (zeros, or the unit box) that must be ignored.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def offsets_of(counts: Any) -> Tensor:
    """Return the start of each row of a ragged array, and the end of the last, i64 [len(counts) + 1]."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), torch.as_tensor(counts, dtype=torch.int64).cumsum(0)])


def pack_paths(paths: Iterable[str]) -> dict[str, Tensor]:
    """Return `path_bytes` and `path_offsets` of `Annotations`."""
    encoded = [path.encode(errors="surrogateescape") for path in paths]
    joined = (
        torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8) if any(encoded) else torch.empty(0).byte()
    )
    return {"path_bytes": joined, "path_offsets": offsets_of([len(path) for path in encoded])}


def _map_tensors(record: T, function) -> T:
    """Return a copy of a dataclass with `function` applied to its tensors, including those of nested Targets and Proposals."""
    changed = {}
    for item in fields(record):  # type: ignore[arg-type]
        value = getattr(record, item.name)
        if isinstance(value, Tensor):
            changed[item.name] = function(value)
        elif isinstance(value, Targets | Proposals):
            changed[item.name] = _map_tensors(value, function)
    return replace(record, **changed)  # type: ignore[type-var]


def tensors_of(record: Any) -> Iterator[Tensor]:
    """Yield the tensors of a dataclass and of those nested in it."""
    for item in fields(record):
        value = getattr(record, item.name)
        if isinstance(value, Tensor):
            yield value
        elif is_dataclass(value):
            yield from tensors_of(value)


@dataclass(frozen=True)
class Annotations:
    """Annotations of one split as flat arrays, shared by all data loader workers.

    Boxes `offsets[i]:offsets[i + 1]` belong to image row i. Boxes are xyxy in the original frame; labels are contiguous in
    [0, K). Crowd regions are included: training excludes them, evaluation ignores detections on them.
    Paths are concatenated as UTF-8 bytes, because a Python list of strings is copied by every worker that reads it.
    """

    image_ids: Tensor  # i64 [I], image ids of the annotation file
    path_bytes: Tensor  # u8, concatenated paths
    path_offsets: Tensor  # i64 [I + 1]
    sizes: Tensor  # i64 [I, 2], (h, w) in the original frame
    offsets: Tensor  # i64 [I + 1]
    boxes: Tensor  # f64 [T, 4]
    labels: Tensor  # i64 [T]
    iscrowd: Tensor  # bool [T]
    area: Tensor  # f64 [T], area of the mask if the file has one, else of the box, px^2
    annotation_ids: Tensor  # i64 [T]
    class_names: tuple[str, ...]  # [K], ordered by category id
    category_ids: tuple[int, ...]  # [K]

    @classmethod
    def without_objects(
        cls,
        paths: Sequence[str],
        sizes: Sequence[tuple[int, int]],
        class_names: Sequence[str],
        category_ids: Sequence[int],
        image_ids: Sequence[int] | None = None,
    ) -> Annotations:
        """Return images of these (h, w) without any object; their ids are numbers from 1 on by default."""
        none = torch.zeros(0, dtype=torch.int64)
        return cls(
            image_ids=torch.tensor(image_ids or range(1, len(paths) + 1), dtype=torch.int64),
            **pack_paths(paths),
            sizes=torch.tensor(list(sizes), dtype=torch.int64).view(-1, 2),
            offsets=torch.zeros(len(paths) + 1, dtype=torch.int64),
            boxes=torch.zeros(0, 4, dtype=torch.float64),
            labels=none,
            iscrowd=none.bool(),
            area=none.double(),
            annotation_ids=none,
            class_names=tuple(class_names),
            category_ids=tuple(category_ids),
        )

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def path(self, index: int) -> Path:
        """Return the image file of row `index`."""
        start, stop = self.path_offsets[index : index + 2].tolist()
        return Path(self.path_bytes[start:stop].numpy().tobytes().decode(errors="surrogateescape"))

    def rows(self, index: int) -> slice:
        """Return the slice of `boxes`, `labels`, ... that belongs to image row `index`."""
        start, stop = self.offsets[index : index + 2].tolist()
        return slice(start, stop)

    @property
    def boxes_per_image(self) -> Tensor:
        """Number of boxes of each image, crowd regions included, i64 [I]."""
        return self.offsets.diff()

    @property
    def image_of_boxes(self) -> Tensor:
        """Image row of each box, i64 [T]."""
        return torch.repeat_interleave(torch.arange(len(self)), self.boxes_per_image)

    @property
    def objects_per_image(self) -> Tensor:
        """Number of boxes of each image without crowd regions, i64 [I]."""
        return torch.bincount(self.image_of_boxes[~self.iscrowd], minlength=len(self))

    @property
    def boxes_per_class(self) -> Tensor:
        """Number of boxes of each class, crowd regions included, i64 [K]."""
        return torch.bincount(self.labels, minlength=self.num_classes)

    def digest(self) -> str:
        """Return a short hash of everything that training uses except the pixels and the folders of the images."""
        result = hashlib.blake2b(digest_size=8)
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in ("path_bytes", "path_offsets"):
                continue
            content = value.numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode(errors="replace")
            result.update(len(content).to_bytes(8, "little") + content)
        paths, stops = self.path_bytes.numpy().tobytes(), self.path_offsets.tolist()
        for start, stop in itertools.pairwise(stops):
            result.update(paths[start:stop].rpartition(b"/")[2] + b"/")
        return result.hexdigest()

    def share_memory(self) -> Annotations:
        """Move all tensors to shared memory, in place, so that forked and spawned workers share them."""
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                value.share_memory_()
        return self


@dataclass(frozen=True)
class Targets:
    """Padded ground-truth boxes and labels of a batch, in the input frame.

    G is equal for all images: a power of two, at least 8. Padding rows have the box (0, 0, 1, 1), label 0 and valid False.
    """

    boxes: Tensor  # f32 [B, G, 4], xyxy
    labels: Tensor  # i64 [B, G]
    valid: Tensor  # bool [B, G]

    @classmethod
    def pad(cls, boxes: list[Tensor], labels: list[Tensor]) -> Targets:
        """Stack boxes [G_i, 4] and labels [G_i] of single images, padded to a power of two.

        Raises:
            ValueError: an image has different numbers of boxes and labels.
        """
        most = max((len(image) for image in boxes), default=0)
        width = max(8, 1 << max(most - 1, 0).bit_length())
        padded = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(len(boxes), width, 1)
        ids = torch.zeros(len(boxes), width, dtype=torch.int64)
        valid = torch.zeros(len(boxes), width, dtype=torch.bool)
        for row, (image_boxes, image_labels) in enumerate(zip(boxes, labels, strict=True)):
            count = len(image_boxes)
            if count != len(image_labels):
                raise ValueError(
                    f"Targets: expected one label per box, got {len(image_labels)} labels for {count} boxes in image {row}."
                )
            padded[row, :count] = image_boxes
            ids[row, :count] = image_labels
            valid[row, :count] = True
        return cls(padded, ids, valid)


@dataclass(frozen=True)
class Batch:
    """Images in the input frame with their targets.

    Images are padded at the right and bottom to a common size that is divisible by the model's largest stride. The values of
    the padding are irrelevant: the model sets it to zero after normalization.
    """

    pixels: Tensor  # u8 [B, 3, H, W] RGB, or of other channels and u16; or f32 in the range of the model's mean and deviation
    sizes: Tensor  # i64 [B, 2], (h, w) in the input frame, before padding
    original_sizes: Tensor  # i64 [B, 2], (h, w) in the original frame
    targets: Targets
    indices: Tensor  # i64 [B], rows of Annotations
    proposals: Proposals | None = None  # precomputed, for a model without RPN
    windows: Tensor | None = (
        None  # i64 [B, 4], xyxy, original frame, if these are tiles; their sizes are `original_sizes`
    )

    def __len__(self) -> int:
        return len(self.pixels)

    def to(self, device: torch.device | str) -> Batch:
        """Copy to a device.

        Copies from pinned memory to CUDA are asynchronous. Copies to the CPU wait for the data: the host could otherwise read
        pinned memory before it is written.
        """
        non_blocking = torch.device(device).type == "cuda"
        return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Apply a function to every tensor."""
        return _map_tensors(self, function)

    def select(self, rows: slice) -> Batch:
        """Select some of the images; the padding stays."""
        return _map_tensors(self, lambda tensor: tensor[rows])

    def pin_memory(self) -> Batch:
        """Copy to pinned memory. Tensors that are in pinned memory are not copied."""
        return _map_tensors(self, lambda tensor: tensor.pin_memory())


@dataclass(frozen=True)
class Pyramid:
    """Feature maps of a batch, fine to coarse, all with C channels.

    Strides are declared by the neck, not inferred from sizes. `sizes` tells where the padding of each image starts.
    """

    levels: list[Tensor]  # [B, C, H_l, W_l] each
    strides: tuple[int, ...]  # input px per cell
    sizes: Tensor  # i64 [B, 2]
    canvas_stride: int = 32  # what the sides of the batch divide by
    _cells: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return [(level.shape[2], level.shape[3]) for level in self.levels]

    @property
    def starts(self) -> list[int]:
        """Return the index of the first cell of each level in `cells`."""
        starts = [0]
        for height, width in self.shapes[:-1]:
            starts.append(starts[-1] + height * width)
        return starts

    @property
    def cells(self) -> Tensor:
        """Concatenate all levels to one table of cells [B, N, C], by level, then row-major.

        Always float32: the gradient of a cell is a sum of many small terms that bfloat16 would round away.
        """
        if not self._cells:  # no `cached_property`, whose lock a compiled graph cannot contain
            # [B, C, H, W] -> [B, H*W, C], cast in the same copy
            self._cells.append(torch.cat([level.flatten(2).transpose(1, 2).float() for level in self.levels], dim=1))
        return self._cells[0]


@dataclass(frozen=True)
class Match:
    """Assignment of candidates (anchors or proposals) to objects. A candidate that is neither positive nor negative is ignored."""

    positive: Tensor  # bool [B, M]
    negative: Tensor  # bool [B, M]
    matched_idxs: Tensor  # i64 [B, M] in [0, G), the object of highest IoU; meaningful where positive


@dataclass(frozen=True)
class Sample:
    """Candidates sampled for a loss: positives first, then negatives, then unused slots."""

    idxs: Tensor  # i64 [B, S] in [0, M)
    positive: Tensor  # bool [B, S]
    valid: Tensor  # bool [B, S]


@dataclass(frozen=True)
class Proposals:
    """Boxes of the RPN after suppression: clipped to the image, by descending objectness, without gradient."""

    boxes: Tensor  # f32 [B, R, 4], input frame
    logits: Tensor  # f32 [B, R]; 0 for precomputed proposals
    valid: Tensor  # bool [B, R]
    anchor_idxs: Tensor | None = None  # i64 [B, R] in [0, M), meaningful where valid; None for precomputed proposals

    @classmethod
    def stack(cls, boxes: list[Tensor]) -> Proposals:
        """Stack the boxes [R, 4] of single images; a row of zeros is an empty slot."""
        stacked = torch.stack(boxes)
        return cls(stacked, torch.zeros(stacked.shape[:2]), stacked.any(dim=2))

    def as_candidates(self) -> Candidates:
        """Convert to candidates of one class (K = 1)."""
        return Candidates(self.boxes[:, :, None], self.logits.sigmoid()[..., None], self.valid)


@dataclass(frozen=True)
class Candidates:
    """Boxes and scores of the ROI head for every proposal and class, before suppression."""

    boxes: Tensor  # f32 [B, R, K, 4], clipped, input frame; [B, R, 1, 4] if regression is class-agnostic
    scores: Tensor  # f32 [B, R, K] in [0, 1], without the background
    valid: Tensor  # bool [B, R]
    anchor_levels: Tensor | None = None  # i64 [B, R] in [0, L), of the anchors that proposed them; None if none did

    @classmethod
    def join(cls, parts: Sequence[Candidates]) -> Candidates:
        """Concatenate candidates of the same images."""
        return cls(*(torch.cat(column, dim=1) for column in zip(*map(tensors_of, parts), strict=True)))


@dataclass(frozen=True)
class Detections:
    """Detections of a batch, by descending score."""

    boxes: Tensor  # f32 [B, D, 4]
    scores: Tensor  # f32 [B, D] in [0, 1]
    labels: Tensor  # i64 [B, D] in [0, K)
    valid: Tensor  # bool [B, D]
    anchor_levels: Tensor | None = None  # i64 [B, D], see `Candidates`; None if they are unknown

    def to_original(self, batch: Batch) -> Detections:
        """Convert the boxes from the input frame to the original frame, by the ratio of the sides, and clip them to the image."""
        ratio = batch.original_sizes.float() / batch.sizes.float()  # [B, 2] (h, w)
        limit = batch.original_sizes.float().flip(1).repeat(1, 2)  # [B, 4] (w, h, w, h)
        boxes = self.boxes * ratio.flip(1).repeat(1, 2)[:, None]
        return replace(self, boxes=torch.minimum(boxes.clamp(min=0), limit[:, None]))

    def cpu(self) -> Detections:
        return _map_tensors(self, lambda tensor: tensor.cpu())

    def images(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (boxes [D, 4], scores [D], labels [D]) of each image, without empty slots."""
        for boxes, scores, labels, valid in zip(self.boxes, self.scores, self.labels, self.valid, strict=True):
            yield boxes[valid], scores[valid], labels[valid]


@dataclass(frozen=True)
class ScoreThresholds:
    """Scores in [0, 1] from which detections are shown and counted: those of the best F1 of an evaluation.

    Attributes:
        overall: one score for all classes.
        classes: score by class name. A class without hits has none; `overall` applies to it.
    """

    overall: float
    classes: dict[str, float]

    def of(self, class_names: Sequence[str]) -> list[float]:
        """Return the score of each class."""
        return [self.classes.get(name, self.overall) for name in class_names]

    @classmethod
    def read(cls, plain: Any, where: str) -> ScoreThresholds | None:
        """Return the thresholds that a file holds as plain values: a dict with `overall` and `classes`, or None.

        Raises:
            ValueError: something else.
        """
        if plain is None:
            return None
        overall: Any = plain.get("overall") if isinstance(plain, dict) else None
        classes: Any = plain.get("classes") if isinstance(plain, dict) else None
        scores: list[Any] = [overall, *classes.values()] if isinstance(classes, dict) else [None]
        if not all(type(score) in (int, float) and 0 <= score <= 1 for score in scores):
            raise ValueError(
                f"{where}: expected score_thresholds with overall and classes in [0, 1], got {plain!r:.80}. "
                "Set score=<number>."
            )
        return cls(float(overall), {str(name): float(score) for name, score in classes.items()})


@dataclass(frozen=True)
class Losses:
    """Scalar terms by name, whose sum is minimized, and statistics by name, which are logged only."""

    terms: dict[str, Tensor] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)

    def __or__(self, other: Losses) -> Losses:
        return Losses(self.terms | other.terms, self.statistics | other.statistics)

    @classmethod
    def mean(cls, losses: Sequence[Losses]) -> Losses:
        """Average several losses with equal names, term by term and statistic by statistic."""
        if len(losses) == 1:
            return losses[0]
        first = losses[0]
        return cls(
            {name: torch.stack([one.terms[name] for one in losses]).mean() for name in first.terms},
            {name: torch.stack([one.statistics[name].float() for one in losses]).mean() for name in first.statistics},
        )

    def detach(self) -> Losses:
        return Losses(
            *({name: value.detach() for name, value in each.items()} for each in (self.terms, self.statistics))
        )

    def total(self) -> Tensor:
        return torch.stack(list(self.terms.values())).sum()
