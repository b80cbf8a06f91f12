"""Which images are seen when: a pure function of the step, so that a resumed run needs nothing else.

A global batch is what one optimizer step sees, over all ranks and micro-batches. It is made first and divided later:
how many ranks take part does not change what is learned from.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fpn_det.runtime import Ranks
from fpn_det.structures import Annotations

MOST_EPOCHS = 1 << 32  # nobody trains longer


class GlobalBatches:
    """The order of training: one permutation per (seed, epoch), cut into global batches of images of like shape.

    Landscape and portrait images do not meet in a batch, where they would pad each other; only what is left over of
    both is mixed. The last, incomplete batch is dropped, so that within an epoch no image comes twice. Batches come
    in random order.

    With `repeats`, images come several times in an epoch, each time augmented in another way.

    A data set smaller than one batch makes a smaller batch: the most images that `parts` divides. No image is
    repeated to fill it, for it would count twice in the gradient. `batch_size` is what was really made.

    Args:
        sizes: i64 [I, 2], (h, w) in the original frame.
        batch_size: images of an optimizer step, over all ranks and micro-batches.
        seed: of the permutations.
        parts: ranks times micro-batches; must divide the batch.
        group_by_aspect: keep landscape and portrait apart.
        repeats: f64 [I], how often an epoch shows each image, on average: a fraction is the share of the epochs in which it
            comes once more. An epoch is then their sum long.

    Raises:
        ValueError: the batch cannot be divided, or there are fewer images than parts.
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
        if len(sizes) < parts:
            raise ValueError(
                f"training set: expected at least one image for each of {parts} ranks x trainer.accumulate, got {len(sizes)}. "
                f"Use fewer ranks, or trainer.accumulate=1."
            )
        self._repeats = None if repeats is None else repeats.numpy()
        self._length = len(sizes) if repeats is None else int(repeats.sum())
        self.batch_size = min(batch_size, self._length // parts * parts)
        self.steps_per_epoch = self._length // self.batch_size
        self.seed = seed
        self._portrait = (sizes[:, 0] > sizes[:, 1]).numpy() if group_by_aspect else np.zeros(len(sizes), dtype=bool)
        self._epoch, self._batches = -1, np.empty((0, self.batch_size), dtype=np.int64)

    def slice(self, step: int) -> tuple[int, Tensor]:
        """The epoch that step `step` (from 0) lies in, and the rows [batch_size] of its images."""
        epoch, batch = self._find(step)
        return epoch, torch.from_numpy(batch % len(self._portrait))

    def showings(self, step: int) -> Tensor:
        """What tells the showings [batch_size] of an image apart: the epoch, and within it its repetition."""
        epoch, batch = self._find(step)
        return torch.from_numpy(epoch + batch // len(self._portrait) * MOST_EPOCHS)

    def _find(self, step: int) -> tuple[int, np.ndarray]:
        """The epoch of a step, and its images as row + repetition * I."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffle(epoch)
        return epoch, self._batches[position]

    def _shuffle(self, epoch: int) -> np.ndarray:
        """The batches [steps_per_epoch, batch_size] of an epoch."""
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self._portrait))
        if self._repeats is not None:
            order = random.permutation(self._repeated(order, random.random()))
        whole, left_over = [], []
        for is_portrait in (False, True):
            members = order[self._portrait[order % len(self._portrait)] == is_portrait]
            complete = len(members) // self.batch_size * self.batch_size
            whole.append(members[:complete])
            left_over.append(members[complete:])
        rest = random.permutation(np.concatenate(left_over))  # else the images dropped would always be portraits
        used = self.steps_per_epoch * self.batch_size - sum(map(len, whole))
        batches = np.concatenate([*whole, rest[:used]]).reshape(self.steps_per_epoch, self.batch_size)
        return random.permutation(batches)

    def _repeated(self, order: np.ndarray, start: float) -> np.ndarray:
        """The images of an epoch, as row + repetition * I: as many of each as there are whole numbers in its stretch of the sum."""
        assert self._repeats is not None
        margin = 1e-6  # a sum that is whole but for rounding counts as whole
        ends = np.floor(np.cumsum(self._repeats[order]) + margin + start * (1 - 2 * margin)).astype(np.int64)
        counts = np.diff(ends, prepend=0)
        first = np.repeat(ends - counts, counts)
        repetition = np.arange(ends[-1]) - first
        return (np.repeat(order, counts) + repetition * len(order))[: self._length]


def check_divides(parts: int, batch_size: int) -> None:
    """Refuse a batch that cannot be cut into `parts`: ranks times micro-batches."""
    if batch_size < 1 or batch_size % parts:
        raise ValueError(
            f"trainer.batch_size: expected a multiple of ranks x trainer.accumulate = {parts}, got {batch_size}. "
            f"Use {max(batch_size // parts, 1) * parts}."
        )


def repeat_factors(annotations: Annotations, threshold: float) -> tuple[Tensor, Tensor]:
    """How often an epoch should show each image so that rare classes are seen (LVIS, appendix; Mahajan et al. 2018).

    A class found in a share f of the images asks for max(1, sqrt(threshold / f)); an image takes the most that one of its
    classes asks for. Crowd regions do not count.

    Returns:
        Of the images f64 [I], and of the classes f64 [K]; a class without objects has 1.
    """
    objects = ~annotations.iscrowd
    images = annotations.image_of_boxes[objects]
    pairs = torch.stack([images, annotations.labels[objects]]).unique(dim=1)  # an image counts once for a class
    share = torch.bincount(pairs[1], minlength=annotations.num_classes).double() / max(len(annotations), 1)
    of_classes = torch.where(share > 0, (threshold / share).sqrt().clamp(min=1), 1.0)
    of_images = torch.ones(len(annotations), dtype=torch.float64)
    return of_images.scatter_reduce(0, pairs[0], of_classes[pairs[1]], "amax"), of_classes


def describe_repeats(of_images: Tensor, of_classes: Tensor, class_names: Sequence[str]) -> str:
    """What `repeat_factors` found, for people."""
    rare = [
        f"{class_names[label]} {of_classes[label]:.2f}"
        for label in of_classes.argsort(descending=True, stable=True)
        if of_classes[label] > 1
    ]
    return (
        f"Images of rare classes come again: an epoch shows {int(of_images.sum())} instead of {len(of_images)} images. "
        f"Times of each class: {', '.join(rare) or 'all 1'}."
    )


def micro_batches(indices: Tensor, ranks: Ranks, accumulate: int) -> Tensor:
    """This rank's images of a global batch [P], one row for each micro-batch: [accumulate, P / ranks / accumulate].

    A micro-batch holds the same images, over all ranks, however many ranks there are: a norm synchronized over them sees the same.
    """
    return indices.view(accumulate, ranks.world_size, -1)[:, ranks.rank]


def evaluation_batches(sizes: Tensor, batch_size: int, ranks: Ranks) -> list[Tensor]:
    """This rank's batches of a data set: over all ranks every image comes exactly once.

    Images of like shape share a batch, which keeps the padding small, and the ranks get like shares.
    """
    aspects = sizes[:, 0] / sizes[:, 1]
    mine = torch.argsort(aspects, stable=True)[ranks.rank :: ranks.world_size]
    return list(mine.split(batch_size)) if len(mine) else []
