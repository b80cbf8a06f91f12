"""Repeat a training step that was not finite, from the dump that the run left.

Needs neither the data set nor a GPU. Prints the losses and gradients of the run beside those of now, the first module
whose output is not finite, and the images. Norms that are synchronized over ranks get the images of this rank only.

Examples:
  fpn-det replay dump=runs/demo/nan_dump
  fpn-det replay runs/demo/nan_dump rank=1
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.markup import escape
from rich.table import Table

from fpn_det.cli.arguments import run_command
from fpn_det.composition import from_saved
from fpn_det.config import PRECISIONS
from fpn_det.runs.checkpoint import check_fields, fill_model
from fpn_det.runtime import seed_step
from fpn_det.schema import CountOrZero
from fpn_det.terminal import standard_console
from fpn_det.training.nonfinite import examine, load_dump

DEPTH = 3  # leading parts of a parameter's name by which gradient norms are grouped


@dataclass(frozen=True)
class ReplayConfig:
    """Options of `fpn-det replay`."""

    dump: str  # folder nan_dump of a run
    rank: CountOrZero = 0  # whose share of the step to repeat
    allow_targets: tuple[str, ...] = ()  # more packages whose classes the settings of the run may name


def main() -> None:
    """Replay the dump that the command line names."""
    run_command(replay, ReplayConfig, positional="dump")


def replay(config: ReplayConfig) -> None:
    """Load the dump, compute the step, print the comparison."""
    folder, rank = Path(config.dump), config.rank
    state, share, batches = load_dump(folder, rank)
    check_fields(folder / "checkpoint.pt", state)
    settings = from_saved(state["config"], str(folder), config.allow_targets)
    model = settings.build_model(len(state["class_names"]))
    fill_model(model, state, str(folder), "raw")
    dtype = PRECISIONS[share["precision"]]
    seed_step(state["rng"]["seed"], share["step"], rank)
    examinations, gradient_norms = examine(
        model,
        batches,
        share["step"],
        share["loss_scale"],
        lambda: torch.autocast("cpu", dtype, enabled=dtype is not None),
    )

    screen = standard_console()
    screen.print(
        f"step {share['step'] + 1}, rank {rank} of {share['world_size']}, {share['precision']}, "
        f"lr {share['lr']:g}, loss scale {share['loss_scale']:g}"
    )
    for examination, before, images in zip(examinations, share["examinations"], share["images"], strict=True):
        losses = Table("loss", "then", "now")
        for name, value in examination.terms.items():
            losses.add_row(name, f"{before['terms'][name]:.6g}", f"{value:.6g}")
        screen.print(losses)
        screen.print(f"first module whose output is not finite: {examination.module or 'none'}")
        pictures = Table("image", "id", "annotation ids", "not finite")
        for number, image in enumerate(images):
            faults = [name for name, index in examination.inputs if index == number]
            if number in examination.images:
                faults.append("loss")
            pictures.add_row(
                escape(image["path"]), str(image["image_id"]), str(image["annotation_ids"]), ", ".join(faults)
            )
        screen.print(pictures)
    gradients = Table("gradient of", "norm then", "norm now")
    then, now = group_norms(share["gradient_norms"]), group_norms(gradient_norms)
    for name, norm in now.items():
        gradients.add_row(name, f"{then[name]:.4g}", f"{norm:.4g}")
    screen.print(gradients)


def group_norms(norms: dict[str, float]) -> dict[str, float]:
    """Gradient norms of modules from those of their parameters."""
    groups: dict[str, list[float]] = {}
    for name, norm in norms.items():
        groups.setdefault(".".join(name.split(".")[:DEPTH]), []).append(norm)
    return {name: math.sqrt(sum(norm * norm for norm in members)) for name, members in groups.items()}
