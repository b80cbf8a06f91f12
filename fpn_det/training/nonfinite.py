"""Diagnosis of a step that was not finite. The weights have not changed since, so the step can be repeated.

A dump folder keeps what is needed to repeat it without the data set (`replay`): `checkpoint.pt` is the state before the
step, settings included, and `rank{k}/step.pt` holds the data of one rank:

    step, rank, world_size, precision, lr, loss_scale     the step counted from 0
    batches                                               of each micro-batch: its tensors by name, with pixels and boxes
    images                                                of each micro-batch and image: path, image_id, annotation_ids
    examinations                                          of each micro-batch: what `examine` found
    gradient_norms                                        by module, of this rank alone, before clipping
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fpn_det.models.detector import Detector
from fpn_det.runs.checkpoint import load_checkpoint, save_checkpoint
from fpn_det.runtime import Ranks, broadcast_object, gather_objects, host_all_reduce_min, run_on_main, seed_step
from fpn_det.structures import Annotations, Batch, Proposals, Targets
from fpn_det.training.optimization import Optimization

NEVER = 2**62
# What a rank writes of its share of a step.
SHARE_FIELDS = {
    "step", "rank", "world_size", "precision", "lr", "loss_scale", "batches", "images", "examinations", "gradient_norms",
}  # fmt: skip
MAX_NAMES = 8  # of parameters or files in a message


@dataclass(frozen=True)
class Examination:
    """Results of one micro-batch.

    Attributes:
        terms: its losses.
        inputs: inputs that are not finite, as `pixels` or `boxes` and the number of the image.
        module: the first one with an output that is not finite; empty if there is none.
        images: numbers of the images whose losses are not finite in a batch of their own.
    """

    terms: dict[str, float]
    inputs: list[tuple[str, int]]
    module: str
    images: list[int]


def first_bad_step(optimization: Optimization) -> int:
    """The first step with an alarm on any rank. Collective."""
    step = int(optimization.alarm)
    return host_all_reduce_min(NEVER if step < 0 else step)


def examine(
    model: Detector, batches: Sequence[Batch], step: int, scale: float, autocast: Callable[[], AbstractContextManager]
) -> tuple[list[Examination], dict[str, float]]:
    """Repeat the forward and backward passes of a step. Returns the results of its micro-batches and gradient norms.

    Random draws are those of the step if the generators are seeded for it. Gradients and norm statistics are overwritten.

    Args:
        batches: micro-batches of the step, on the model's device.
        step: counted from 0.
        scale: of the losses, in the backward pass.
        autocast: makes the autocast context.
    """
    model.zero_grad()
    terms, modules = [], []
    for batch in batches:
        with autocast(), _watched(model) as bad_modules:
            losses = model(batch, step)
        (losses.total() * (scale / len(batches))).backward()
        terms.append({name: term.item() for name, term in losses.terms.items()})
        modules.append(next(iter(bad_modules), ""))
    gradient_norms = _gradient_norms(model, scale)
    model.zero_grad()
    examinations = []
    for batch, found, module in zip(batches, terms, modules, strict=True):
        images = []
        for number in range(len(batch)):
            with torch.no_grad(), autocast():
                if not torch.isfinite(model(batch.select(slice(number, number + 1)), step).total()):
                    images.append(number)
        examinations.append(Examination(found, _bad_inputs(batch), module, images))
    return examinations, gradient_norms


def explain(
    optimization: Optimization, batches: Sequence[Batch], annotations: Annotations, step: int, seed: int, ranks: Ranks,
    folder: Path, state: Callable[[], dict[str, Any]],
) -> str:  # fmt: skip
    """Describe what is not finite in `step` on any rank, in which images, and where the dump is. Collective.

    Args:
        optimization: state after the bad step; its gradients are overwritten.
        batches: this rank's micro-batches of that step.
        annotations: of the batches, for file names.
        step: counted from 0.
        seed: of the run.
        folder: of the dump; an earlier dump is replaced.
        state: makes the checkpoint.
    """
    weights = dict(optimization.model.named_parameters())
    bad_weights = [f"weight {name}" for name, weight in weights.items() if not torch.isfinite(weight).all()]
    unsaved = _try_to_save(lambda: run_on_main(lambda: _start(folder, ranks.world_size, state())))

    scale = float(optimization.scale.value)
    seed_step(seed, step, ranks.rank)
    examinations, gradient_norms = examine(optimization.model, batches, step, scale, optimization.autocast)
    images = [[_describe_image(annotations, row) for row in batch.indices.tolist()] for batch in batches]
    share = {
        "step": step,
        "rank": ranks.rank,
        "world_size": ranks.world_size,
        "precision": optimization.precision,
        "lr": optimization.lr_of(step),
        "loss_scale": scale,
        "batches": [asdict(batch.to("cpu")) for batch in batches],
        "images": images,
        "examinations": [asdict(examination) for examination in examinations],
        "gradient_norms": gradient_norms,
    }
    unsaved = unsaved or _try_to_save(lambda: save_checkpoint(_share_of(folder, ranks.rank), share))

    causes, suspects = list(bad_weights), []
    for examination, described in zip(examinations, images, strict=True):
        paths = [image["path"] for image in described]
        causes += [f"{what} of {paths[number]}" for what, number in examination.inputs]
        causes += [f"{name}={term}" for name, term in examination.terms.items() if not math.isfinite(term)]
        suspects += [paths[number] for number in examination.images]
    steep = [f"gradient of {name}" for name, norm in gradient_norms.items() if not math.isfinite(norm)]
    modules = [examination.module for examination in examinations if examination.module]
    all_paths = [image["path"] for described in images for image in described]

    parts = gather_objects((causes, steep, modules, suspects, all_paths, [unsaved] if unsaved else []))
    merged = parts and [
        list(dict.fromkeys(name for part in column for name in part)) for column in zip(*parts, strict=True)
    ]
    causes, steep, modules, suspects, all_paths, troubles = broadcast_object(merged)
    where = f" First bad output: {modules[0]}." if modules else ""
    kept = (
        f"The dump could not be written ({troubles[0]})."
        if troubles
        else f"Repeat it with 'fpn-det replay dump={folder}'."
    )
    return (
        f"not finite: {_listed(causes or steep)}.{where} Images of that batch: {_listed(suspects or all_paths)}. {kept}"
    )


def load_dump(folder: Path, rank: int) -> tuple[dict[str, Any], dict[str, Any], list[Batch]]:
    """Load the dump of a bad step: the state, the data of one rank, and its micro-batches.

    Raises:
        ValueError: the dump is absent or damaged.
    """
    share = load_checkpoint(_share_of(folder, rank))
    state = load_checkpoint(folder / "checkpoint.pt")
    if missing := sorted(SHARE_FIELDS - set(share)):
        raise ValueError(f"{_share_of(folder, rank)}: expected the data of a rank, got none of {', '.join(missing)}.")
    return state, share, list(map(_as_batch, share["batches"]))


def _as_batch(record: dict[str, Any]) -> Batch:
    proposals = record.get("proposals")
    return Batch(
        **{**record, "targets": Targets(**record["targets"]), "proposals": proposals and Proposals(**proposals)}
    )


def _share_of(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}" / "step.pt"


def _start(folder: Path, world_size: int, state: dict[str, Any]) -> None:
    for path in folder.glob("rank*/step.pt"):
        path.unlink()
    for rank in range(world_size):
        _share_of(folder, rank).parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder / "checkpoint.pt", state)


def _try_to_save(save: Callable[[], None]) -> str:
    """Save; on failure return the reason. A full disk must not hide the diagnosis."""
    try:
        save()
    except OSError as error:
        return str(error)
    return ""


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """Collect the names of modules whose output is not finite within this context, in order of execution."""
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if not all(bool(torch.isfinite(tensor).all()) for tensor in _floats(output)):
                found.append(name)

        return look

    hooks = [
        module.register_forward_hook(watch(name or type(model).__name__)) for name, module in model.named_modules()
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _floats(value: Any) -> Iterator[Tensor]:
    """Floating-point tensors in the output of a module."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        yield from _floats(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _floats(item)
    elif is_dataclass(value):
        yield from _floats([getattr(value, field.name) for field in fields(value)])


def _gradient_norms(model: nn.Module, scale: float) -> dict[str, float]:
    """Gradient norms by the module that owns the parameters."""
    norms = {}
    for name, module in model.named_modules():
        gradients = [weight.grad for weight in module.parameters(recurse=False) if weight.grad is not None]
        if gradients:
            norms[name] = torch.stack(torch._foreach_norm(gradients)).norm().item() / scale
    return norms


def _bad_inputs(batch: Batch) -> list[tuple[str, int]]:
    found = []
    for what, tensor in (("pixels", batch.pixels), ("boxes", batch.targets.boxes)):
        finite = torch.isfinite(tensor).flatten(1).all(dim=1)
        found += [(what, number) for number, is_finite in enumerate(finite.tolist()) if not is_finite]
    return found


def _describe_image(annotations: Annotations, row: int) -> dict[str, Any]:
    return {
        "path": str(annotations.path(row)),
        "image_id": int(annotations.image_ids[row]),
        "annotation_ids": annotations.annotation_ids[annotations.rows(row)].tolist(),
    }


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more
