"""Introduction of a run: what is trained, on what, for how long, and where to watch it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fpn_det.annotations.findings import WITHOUT_OBJECTS, Finding, OnError, group_by_kind
from fpn_det.data.tiles import Tiles, Tiling, TrainTiles
from fpn_det.structures import Annotations

ARGUMENTS_OF_SIZE = ("depth", "name", "sides", "side", "size", "max_side")  # shown of a backbone and of a resize


def introduce(rows: Mapping[str, str]) -> str:
    """Lay out `rows`, title and text, in two columns."""
    width = max(map(len, rows))
    return "\n".join(
        f"{title:{width}}  " + text.replace("\n", "\n" + " " * (width + 2)) for title, text in rows.items()
    )


def describe_device(device: torch.device, precision: str, world_size: int) -> str:
    """The device, the precision and, if there are several, the number of ranks: `cpu (2 threads), fp32`."""
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)} ({device})"
    else:
        name = f"{device} ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)
    return ", ".join([name, precision, *([f"{world_size} ranks"] if world_size > 1 else [])])


def describe_split(annotations: Annotations, findings: Sequence[Finding], on_error: OnError) -> str:
    """Images, objects and classes of a split, and below what was found wrong with it, by kind."""
    objects, classes = int((~annotations.iscrowd).sum()), annotations.num_classes
    lines = [f"{len(annotations)} images, {objects} objects, {classes} {'class' if classes == 1 else 'classes'}"]
    faults = [finding for finding in findings if finding.severity != "note"]
    warnings = [finding for finding in faults if finding.severity == "warning"]
    repaired = [finding for finding in faults if finding.severity != "warning"]
    outcome_of_faults = "repaired or left out" if on_error == "fix" else "left out"
    for outcome, members in ((outcome_of_faults, repaired), ("warnings", warnings)):
        if members:
            kinds = ", ".join(f"{kind} ({len(same)})" for kind, same in group_by_kind(members).items())
            lines.append(f"{outcome}: {kinds}")
    lines += [finding.message for finding in findings if finding.kind == WITHOUT_OBJECTS]
    return "\n".join(lines)


def describe_model(model: nn.Module, settings: Mapping[str, Any]) -> str:
    """Classes of the model's parts and the number of its parameters: `ResNet(depth=50), FPN; 41.3 M parameters`."""
    parts = [describe_node(node) for node in map(settings.get, ("backbone", "neck", "rpn", "roi_head")) if node]
    total = sum(weight.numel() for weight in model.parameters())
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return f"{', '.join(parts) or type(model).__name__}\n{_millions(total)} parameters, {_millions(trained)} of them trained"


def describe_input(train: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    """The resize of training, and that of evaluation where it is another."""
    first, second = (describe_node(transforms.get("resize")) for transforms in (train, evaluation))
    return first if first == second else f"{first}\n{second} in evaluations"


def describe_tiles(tiles: Tiles | None, size: int | None, evaluation: Tiling | None) -> dict[str, str]:
    """The tiles that an epoch shows, and those of evaluations; nothing if there are none."""
    lines = []
    if isinstance(tiles, TrainTiles):
        lines.append(f"{size} px: {tiles.describe()}")
    if evaluation is not None or lines:
        lines.append("none" if evaluation is None else f"{evaluation.size} px, overlap {evaluation.overlap:g}")
        lines[-1] += " in evaluations"
    return {"tiles": "\n".join(lines)} if lines else {}


def describe_node(node: Any) -> str:
    """The class of a node, with those of its arguments that say how large it is."""
    if not isinstance(node, Mapping) or "_target_" not in node:
        return "as large as the images"
    shown = [f"{name}={_value(node[name])}" for name in ARGUMENTS_OF_SIZE if node.get(name) is not None]
    name = str(node["_target_"]).rpartition(".")[2]
    return f"{name}({', '.join(shown)})" if shown else name


def _value(value: Any) -> str:
    if isinstance(value, list) and len(value) > 2:
        return f"{min(value)}..{max(value)}"
    return ", ".join(map(str, value)) if isinstance(value, list) and len(value) == 1 else str(value)


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else str(count)
