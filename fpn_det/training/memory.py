"""Memory of a step: measured in advance, and out-of-memory errors in one sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from fpn_det.errors import SystemFault
from fpn_det.runs.meters import memory_mib
from fpn_det.structures import Batch
from fpn_det.training.optimization import Optimization

USABLE = 0.9  # of a GPU's memory: fragments and other programs need some
KNOBS = (
    "Lower trainer.batch_size or raise trainer.accumulate, make images smaller (data.train_transforms.resize.sides and max_side), "
    "set precision=bf16, or use more ranks."
)


def is_out_of_memory(error: BaseException) -> bool:
    """True for an out-of-memory error of a GPU or of the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


@contextmanager
def explained(batch: Batch) -> Iterator[None]:
    """Within this context, too little memory for a step with `batch` ends in one sentence."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or ["MemoryError"])[0]
        raise SystemFault(f"memory: expected room for {describe(batch)}, got: {reason} {KNOBS}") from None


@contextmanager
def explained_evaluation(batch_size: int) -> Iterator[None]:
    """Within this context, too little memory for an evaluation ends in one sentence.

    Args:
        batch_size: images per rank.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or ["MemoryError"])[0]
        raise SystemFault(
            f"memory: expected room to evaluate {batch_size} image(s) at a time, got: {reason} "
            "Lower data.eval_batch_size, or make images smaller (data.eval_transforms.resize.sides and max_side)."
        ) from None


def fits(optimization: Optimization, batch: Batch) -> bool:
    """Check if a step with `batch` as its micro-batch fits into USABLE of the GPU's memory. Changes nothing."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(optimization.device)
    try:
        optimization.rehearse([batch])
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    peak = torch.cuda.max_memory_reserved(optimization.device)
    return peak <= USABLE * torch.cuda.get_device_properties(optimization.device).total_memory


def largest_that_fits(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number from 1 to `limit` that fits, 0 if none does, by bisection."""
    tried, fitting = 1, 0
    while tried <= limit and fits(tried):
        fitting, tried = tried, 2 * tried
    failing = min(tried, limit + 1)
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        fitting, failing = (middle, failing) if fits(middle) else (fitting, middle)
    return fitting


def describe(batch: Batch) -> str:
    """The size of a batch in words."""
    num_images, _, height, width = batch.pixels.shape
    objects = int(batch.targets.valid.sum(dim=1).max())
    return f"{num_images} images of {height} x {width} px (h x w) with up to {objects} objects"


def probe(optimization: Optimization, batch: Batch, accumulate: int) -> str:
    """Run a step with `batch` as each of its micro-batches, which changes nothing, and describe its peak of memory.

    Raises:
        SystemFault: there is not enough memory.
    """
    with explained(batch):
        optimization.rehearse([batch] * accumulate)
    device = optimization.device
    total = f" of {torch.cuda.get_device_properties(device).total_memory / 2**20:.0f}" if device.type == "cuda" else ""
    return f"probe: a step with {describe(batch)} takes {memory_mib(device):.0f}{total} MiB at most."
