"""Sampling: the images of each step are a pure function of (seed, step), so that resuming needs no sampler state.

A global batch holds the images of one optimizer step over all ranks and micro-batches. It is drawn first and divided
afterwards, so the images of a step do not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fpn_det.runtime import Ranks
from fpn_det.structures import Annotations

MAX_EPOCHS = 1 << 32
MARGIN = 1e-6  # absorbs rounding errors of a sum of repeats that is an integer


class Key(NamedTuple):
    """Names an example: an image, and what its random transforms are drawn by."""

    row: int  # of the data set
    epoch: int  # repetitions count as epochs, see GlobalBatches.occurrences
    step: int = 0  # draws what all images of a training step have in common


class GlobalBatches:
    """The order of training images: one permutation per (seed, epoch), divided into global batches.

    Landscape and portrait images are batched separately to save padding; only the remainders of both are mixed. The
    last, incomplete batch of an epoch is dropped, so that no image occurs twice in an epoch. The order of the batches
    is random.

    With `repeats`, an image may occur several times in an epoch, each time with other random transforms.

    A data set smaller than one batch makes a smaller batch: the largest multiple of `parts`. No image is repeated to
    fill it, because it would count twice in the gradient. The attribute `batch_size` is the actual one.

    Args:
        sizes: i64 [I, 2], (h, w) in the original frame.
        batch_size: images per optimizer step, over all ranks and micro-batches.
        seed: of the permutations.
        parts: ranks times micro-batches; must divide `batch_size`.
        group_by_aspect: batch landscape and portrait images separately.
        repeats: f64 [I], the mean number of occurrences of each image per epoch, from 0 on; the fractional part is the
            probability of one more. The length of an epoch is their sum.

    Raises:
        ValueError: the batch cannot be divided, or an epoch has fewer images than parts.
    """

    def __init__(
        self,
        sizes: Tensor,
        batch_size: int,
        seed: int,
        parts: int = 1,
        group_by_aspect: bool = True,
        repeats: Tensor | None = None,
    ) -> None:
        check_divides(parts, batch_size)
        self.images_per_epoch = len(sizes) if repeats is None else int(repeats.sum() + MARGIN)
        if self.images_per_epoch < parts:
            raise ValueError(
                f"training set: expected at least one image for each of {parts} ranks x trainer.accumulate, got {self.images_per_epoch}. "
                f"Use fewer ranks, or trainer.accumulate=1."
            )
        self._repeats = None if repeats is None else repeats.numpy()
        self.batch_size = min(batch_size, self.images_per_epoch // parts * parts)
        self.steps_per_epoch = self.images_per_epoch // self.batch_size
        self.seed = seed
        self._portrait = (sizes[:, 0] > sizes[:, 1]).numpy() if group_by_aspect else np.zeros(len(sizes), dtype=bool)
        self._epoch, self._batches = -1, np.empty((0, self.batch_size), dtype=np.int64)

    def slice(self, step: int) -> tuple[int, Tensor]:
        """Return the epoch of step `step` (from 0) and the rows [batch_size] of its images."""
        epoch, batch = self._find(step)
        return epoch, torch.from_numpy(batch % len(self._portrait))

    def occurrences(self, step: int) -> Tensor:
        """Return a number [batch_size] that differs between all occurrences of an image, from its epoch and its repetition."""
        epoch, batch = self._find(step)
        return torch.from_numpy(epoch + batch // len(self._portrait) * MAX_EPOCHS)

    def _find(self, step: int) -> tuple[int, np.ndarray]:
        """Return the epoch of a step, and its images as row + repetition * I."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffle(epoch)
        return epoch, self._batches[position]

    def _shuffle(self, epoch: int) -> np.ndarray:
        """Draw the batches [steps_per_epoch, batch_size] of an epoch."""
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self._portrait))
        if self._repeats is not None:
            order = random.permutation(self._repeated(order, random.random()))
        whole, remainders = [], []
        for is_portrait in (False, True):
            members = order[self._portrait[order % len(self._portrait)] == is_portrait]
            complete = len(members) // self.batch_size * self.batch_size
            whole.append(members[:complete])
            remainders.append(members[complete:])
        rest = random.permutation(np.concatenate(remainders))  # otherwise the dropped images would always be portraits
        used = self.steps_per_epoch * self.batch_size - sum(map(len, whole))
        batches = np.concatenate([*whole, rest[:used]]).reshape(self.steps_per_epoch, self.batch_size)
        return random.permutation(batches)

    def _repeated(self, order: np.ndarray, start: float) -> np.ndarray:
        """Repeat the images of an epoch by systematic sampling, as row + repetition * I: as often as an integer lies in their
        interval of the cumulative sum.
        """
        assert self._repeats is not None
        ends = np.floor(np.cumsum(self._repeats[order]) + MARGIN + start * (1 - 2 * MARGIN)).astype(np.int64)
        counts = np.diff(ends, prepend=0)
        first = np.repeat(ends - counts, counts)
        repetition = np.arange(ends[-1]) - first
        return (np.repeat(order, counts) + repetition * len(order))[: self.images_per_epoch]


def check_divides(parts: int, batch_size: int) -> None:
    """Raise ValueError unless `batch_size` is a multiple of `parts`, ranks times micro-batches."""
    if batch_size < 1 or batch_size % parts:
        raise ValueError(
            f"trainer.batch_size: expected a multiple of ranks x trainer.accumulate = {parts}, got {batch_size}. "
            f"Use {max(batch_size // parts, 1) * parts}."
        )


def repeat_factors(annotations: Annotations, threshold: float) -> tuple[Tensor, Tensor]:
    """Compute repeat factors that show images of rare classes more often (LVIS, appendix; Mahajan et al. 2018).

    The factor of a class that occurs in a fraction f of the images is max(1, sqrt(threshold / f)), the factor of an image
    the largest of its classes. Crowd regions do not count.

    Args:
        annotations: of the training set.
        threshold: fraction of the images below which a class counts as rare.

    Returns:
        Factors of the images f64 [I] and of the classes f64 [K]; 1 for a class without objects.
    """
    objects = ~annotations.iscrowd
    images = annotations.image_of_boxes[objects]
    pairs = torch.stack([images, annotations.labels[objects]]).unique(dim=1)  # count an image once per class
    share = torch.bincount(pairs[1], minlength=annotations.num_classes).double() / max(len(annotations), 1)
    of_classes = torch.where(share > 0, (threshold / share).sqrt().clamp(min=1), 1.0)
    of_images = torch.ones(len(annotations), dtype=torch.float64)
    return of_images.scatter_reduce(0, pairs[0], of_classes[pairs[1]], "amax"), of_classes


def describe_repeats(of_images: Tensor, of_classes: Tensor, class_names: Sequence[str]) -> str:
    """Describe the result of `repeat_factors` in a line for the log."""
    rare = [
        f"{class_names[label]} {of_classes[label]:.2f}"
        for label in of_classes.argsort(descending=True, stable=True)
        if of_classes[label] > 1
    ]
    return (
        f"Images of rare classes are repeated: an epoch has {int(of_images.sum())} instead of {len(of_images)} images. "
        f"Factors above 1: {', '.join(rare) or 'none'}."
    )


def micro_batches(indices: Tensor, ranks: Ranks, accumulate: int) -> Tensor:
    """Select this rank's images of a global batch [P], as [accumulate, P / ranks / accumulate].

    Over all ranks, a micro-batch holds the same images for any number of ranks, so synchronized batch norm computes the
    same statistics.
    """
    return indices.view(accumulate, ranks.world_size, -1)[:, ranks.rank]


def evaluation_batches(sizes: Tensor, batch_size: int, ranks: Ranks) -> list[Tensor]:
    """Divide a data set into this rank's batches. Over all ranks, every image occurs exactly once.

    Images are sorted by aspect ratio, which keeps the padding small, and dealt to the ranks in turn.
    """
    aspects = sizes[:, 0] / sizes[:, 1]
    mine = torch.argsort(aspects, stable=True)[ranks.rank :: ranks.world_size]
    return list(mine.split(batch_size)) if len(mine) else []
