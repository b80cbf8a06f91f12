"""Do the step again that was not finite: python tools/replay.py <run>/nan_dump [rank=<number>].

Needs neither the data set nor a GPU. Shows the losses and gradients beside those that the run had, the first module whose
output is not finite, and the images. A norm that is synchronized over ranks sees this rank's images only.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fpn_det.composition import from_saved
from fpn_det.config import PRECISIONS
from fpn_det.errors import is_for_people
from fpn_det.runs.checkpoint import fill_model
from fpn_det.runtime import seed_step
from fpn_det.training.nonfinite import examine, load_dump

DEPTH = 3  # parts of a module's name by which gradients are put together


def parse(words: Sequence[str]) -> tuple[Path, int]:
    """The folder and the rank that the command line names.

    Raises:
        ValueError: it names no folder, or something else.
    """
    folders = [word for word in words if "=" not in word]
    ranks = [word.removeprefix("rank=") for word in words if "=" in word]
    if len(folders) != 1 or len(ranks) > 1 or not all(rank.isdigit() for rank in ranks):
        raise ValueError(f"tools/replay.py: expected <run>/nan_dump [rank=<number>], got '{' '.join(words)}'.")
    return Path(folders[0]), int(ranks[0]) if ranks else 0


def main(words: Sequence[str]) -> None:
    """Load, compute, compare."""
    folder, rank = parse(words)
    state, share, batches = load_dump(folder, rank)
    settings = from_saved(state["config"])
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

    screen = Console(width=None if sys.stdout.isatty() else 140)
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
            found = [what for what, index in examination.inputs if index == number] + ["loss"] * (
                number in examination.images
            )
            pictures.add_row(image["path"], str(image["image_id"]), str(image["annotation_ids"]), ", ".join(found))
        screen.print(pictures)
    gradients = Table("gradient of", "norm then", "norm now")
    then, now = merged(share["gradient_norms"]), merged(gradient_norms)
    for name, norm in now.items():
        gradients.add_row(name, f"{then[name]:.4g}", f"{norm:.4g}")
    screen.print(gradients)


def merged(norms: dict[str, float]) -> dict[str, float]:
    """The norms of larger modules from those of their parts."""
    groups: dict[str, list[float]] = {}
    for name, norm in norms.items():
        groups.setdefault(".".join(name.split(".")[:DEPTH]), []).append(norm)
    return {name: math.sqrt(sum(norm * norm for norm in members)) for name, members in groups.items()}


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        if not is_for_people(error):
            raise
        print(error, file=sys.stderr)
        sys.exit(2)
