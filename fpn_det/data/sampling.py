"""Which images are seen when: a pure function of the step, so that a resumed run needs nothing else.

A global batch is what one optimizer step sees, over all ranks and micro-batches. It is made first and divided later:
how many ranks take part does not change what is learned from.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fpn_det.runtime import Ranks


class GlobalBatches:
    """The order of training: one permutation per (seed, epoch), cut into global batches of images of like shape.

    Landscape and portrait images do not meet in a batch, where they would pad each other; only what is left over of
    both is mixed. The last, incomplete batch is dropped, so that within an epoch no image comes twice. Batches come
    in random order.

    A data set smaller than one batch makes a smaller batch: the most images that `parts` divides. No image is
    repeated to fill it, for it would count twice in the gradient. `batch_size` is what was really made.

    Args:
        sizes: i64 [I, 2], (h, w) in the original frame.
        batch_size: images of an optimizer step, over all ranks and micro-batches.
        seed: of the permutations.
        parts: ranks times micro-batches; must divide the batch.
        group_by_aspect: keep landscape and portrait apart.

    Raises:
        ValueError: the batch cannot be divided, or there are fewer images than parts.
    """

    def __init__(self, sizes: Tensor, batch_size: int, seed: int, parts: int = 1, group_by_aspect: bool = True) -> None:
        check_divides(parts, batch_size)
        if len(sizes) < parts:
            raise ValueError(
                f"training set: expected at least one image for each of {parts} ranks x trainer.accumulate, got {len(sizes)}. "
                f"Use fewer ranks, or trainer.accumulate=1."
            )
        self.batch_size = min(batch_size, len(sizes) // parts * parts)
        self.steps_per_epoch = len(sizes) // self.batch_size
        self.seed = seed
        self._portrait = (sizes[:, 0] > sizes[:, 1]).numpy() if group_by_aspect else np.zeros(len(sizes), dtype=bool)
        self._epoch, self._batches = -1, np.empty((0, self.batch_size), dtype=np.int64)

    def slice(self, step: int) -> tuple[int, Tensor]:
        """The epoch that step `step` (from 0) lies in, and the rows [batch_size] of its images."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffle(epoch)
        return epoch, torch.from_numpy(self._batches[position])

    def _shuffle(self, epoch: int) -> np.ndarray:
        """The batches [steps_per_epoch, batch_size] of an epoch."""
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self._portrait))
        whole, left_over = [], []
        for is_portrait in (False, True):
            members = order[self._portrait[order] == is_portrait]
            complete = len(members) // self.batch_size * self.batch_size
            whole.append(members[:complete])
            left_over.append(members[complete:])
        rest = random.permutation(np.concatenate(left_over))  # else the images dropped would always be portraits
        used = self.steps_per_epoch * self.batch_size - sum(map(len, whole))
        batches = np.concatenate([*whole, rest[:used]]).reshape(self.steps_per_epoch, self.batch_size)
        return random.permutation(batches)


def check_divides(parts: int, batch_size: int) -> None:
    """Refuse a batch that cannot be cut into `parts`: ranks times micro-batches."""
    if batch_size < 1 or batch_size % parts:
        raise ValueError(
            f"trainer.batch_size: expected a multiple of ranks x trainer.accumulate = {parts}, got {batch_size}. "
            f"Use {max(batch_size // parts, 1) * parts}."
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
