"""Explaining a step that was not finite. Nothing has moved since, so it can be looked at again, with the same weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fpn_det.engine.optimization import Optimization
from fpn_det.runtime import agree_on_max, broadcast_object, gather_objects
from fpn_det.structures import Annotations, Batch

NEVER = 2**62
MAX_NAMES = 8  # of parameters or files in a message


def first_bad_step(optimization: Optimization) -> int:
    """The first step with an alarm on any rank; all ranks ask together."""
    step = int(optimization.alarm)
    return -agree_on_max(-(NEVER if step < 0 else step))


def describe(optimization: Optimization, batches: Sequence[Batch], annotations: Annotations, step: int) -> str:
    """What is not finite in `step`, on all ranks, and in which images. All ranks describe together.

    Args:
        optimization: as the bad step left it; its gradients are overwritten.
        batches: this rank's micro-batches of that step.
        annotations: names the files.
        step: counted from 0.
    """
    found = [f"weight {name}" for name in _not_finite(dict(optimization.model.named_parameters()))]
    files: list[str] = []
    optimization.optimizer.zero_grad()
    for batch in batches:
        with optimization.autocast():
            losses = optimization.model(batch, step)
        terms = {name: float(term) for name, term in losses.terms.items()}
        bad_terms = [f"{name}={term}" for name, term in terms.items() if not math.isfinite(term)]
        found += bad_terms
        if bad_terms:
            files += [str(annotations.path(index)) for index in batch.indices.tolist()]
        (losses.total() * optimization.scale.value).backward()
    if not found:
        gradients = {name: weight.grad for name, weight in optimization.parameters.items() if weight.grad is not None}
        found = [f"gradient of {name}" for name in _not_finite(gradients)]
        files = [str(annotations.path(index)) for batch in batches for index in batch.indices.tolist()]
    gathered = gather_objects((found, files))
    everything = None
    if gathered is not None:
        everything = tuple(list(dict.fromkeys(name for rank in part for name in rank)) for part in zip(*gathered, strict=True))
    found, files = broadcast_object(everything)
    return f"not finite: {_listed(found) or 'the gradient'}. Images of that batch: {_listed(files)}."


def _not_finite(tensors: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more
