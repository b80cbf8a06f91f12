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
    culprits = [f"weight {name}" for name in _not_finite(dict(optimization.model.named_parameters()))]
    images: list[str] = []
    suspects: list[str] = []
    optimization.optimizer.zero_grad()
    for batch in batches:
        with optimization.autocast():
            losses = optimization.model(batch, step)
        terms = {name: term.item() for name, term in losses.terms.items()}
        bad_terms = [f"{name}={term}" for name, term in terms.items() if not math.isfinite(term)]
        files = [str(annotations.path(index)) for index in batch.indices.tolist()]
        culprits += bad_terms
        images += files if bad_terms else []
        suspects += files
        (losses.total() * optimization.scale.value).backward()
    gradients = {name: weight.grad for name, weight in optimization.parameters.items() if weight.grad is not None}
    steep = [f"gradient of {name}" for name in _not_finite(gradients)]

    gathered = gather_objects((culprits, steep, images, suspects))
    merged = gathered and [list(dict.fromkeys(name for part in parts for name in part)) for parts in zip(*gathered, strict=True)]
    culprits, steep, images, suspects = broadcast_object(merged)
    return f"not finite: {_listed(culprits or steep)}. Images of that batch: {_listed(images or suspects)}."


def _not_finite(tensors: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more
