"""Conversion of state dicts between projects. Nothing is guessed, and every tensor is accounted for.

Beyond names only the last layer differs: torchvision has the background first, and box deltas for it that nobody reads.
What the weights alone do not show (pixel order, stride on the 1x1 or the 3x3, anchors, ...) is in the settings:
`configs/experiment/compat/`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fpn_det.interop.naming import COUNTER, DELTAS, LOGITS, OLD_NAMES, PROJECTS, STATISTICS, Layout, Project

EPS = (
    1e-5  # added to the variance by norms of ours, detectron2, mmdetection, and torchvision except for its COCO weights
)

# A tensor that each project names differently, by which a state dict is recognized.
SIGNATURES: dict[Project, str] = {
    "fpn_det": "rpn.head.objectness.weight",
    "torchvision": "rpn.head.cls_logits.weight",
    "detectron2": "proposal_generator.rpn_head.objectness_logits.weight",
    "mmdet": "rpn_head.rpn_cls.weight",
}
CONSTANTS = re.compile(r"pixel_mean|pixel_std|proposal_generator\.anchor_generator\.cell_anchors\.\d+")


@dataclass(frozen=True)
class Conversion:
    """Converted tensors, and the outcome for every key."""

    state: dict[str, Tensor]
    mapped: dict[str, str] = field(default_factory=dict)  # key of the source -> key of the target
    dropped: dict[str, str] = field(default_factory=dict)  # key of the source -> reason
    added: dict[str, str] = field(default_factory=dict)  # key of the target -> reason
    missing: tuple[str, ...] = ()  # keys of the target that the source lacks

    def report(self) -> str:
        """Counts, and every key that was not simply renamed."""
        lines = [
            f"{len(self.mapped)} tensors mapped, {len(self.dropped)} dropped, {len(self.added)} added, {len(self.missing)} missing"
        ]
        lines += [f"  dropped {key}: {reason}" for key, reason in self.dropped.items()]
        lines += [f"  added {key}: {reason}" for key, reason in self.added.items()]
        lines += [f"  missing {key}" for key in self.missing]
        return "\n".join(lines)


def recognize(state: Mapping[str, Tensor]) -> Project:
    """Recognize the project by its tensor names.

    Raises:
        ValueError: nobody's that we know.
    """
    for project, signature in SIGNATURES.items():
        if signature in state:
            return project
    raise ValueError(
        f"weights: expected a Faster R-CNN with FPN of {', '.join(PROJECTS)}, got {len(state)} tensors "
        f"({', '.join(list(state)[:3])}, ...). Weights of a backbone alone go to model.backbone.weights."
    )


def convert(state: Mapping[str, Tensor], source: Project, target: Project, norm_eps: float = EPS) -> Conversion:
    """Convert a state dict from one project to another, through our names.

    Args:
        state: the tensors; they are not written on, and may be shared with the result.
        source: whose names they have.
        target: whose names they get.
        norm_eps: what the source adds to the variances of its backbone; they are shifted to mean the same with EPS.

    Raises:
        ValueError: a tensor has a name that the source does not give, or a place that the target does not have.
    """
    if source == target:
        return Conversion(dict(state), {key: key for key in state})
    ours = _to_fpn_det(state, source, norm_eps)
    if target == "fpn_det":
        return ours
    theirs = _from_fpn_det(ours.state, target)
    mapped = {key: theirs.mapped[name] for key, name in ours.mapped.items() if name in theirs.mapped}
    dropped = {key: theirs.dropped[name] for key, name in ours.mapped.items() if name in theirs.dropped}
    return replace(theirs, mapped=mapped, dropped=ours.dropped | dropped)


def _to_fpn_det(state: Mapping[str, Tensor], source: Project, norm_eps: float) -> Conversion:
    layout = Layout.of(state)
    ours_of = {theirs: ours for ours, theirs in layout.names(source).items()}
    modules, old_names = layout.modules(), OLD_NAMES.get(source, {})
    result = Conversion({})
    for key, value in state.items():
        module, _, leaf = key.rpartition(".")
        name = ours_of.get(old_names.get(module, module))
        if CONSTANTS.fullmatch(key):
            result.dropped[key] = "a constant, which the settings give"
            continue
        if key.startswith(STATISTICS):
            result.dropped[key] = "statistics of training, which detection does not read"
            continue
        if name is None or leaf not in (*modules[name], COUNTER):
            raise ValueError(
                f"{source}: expected tensors that its Faster R-CNN with FPN has, got {key} {list(value.shape)}."
            )
        if source == "torchvision" and name == LOGITS:
            value = torch.cat([value[1:], value[:1]])
        elif source == "torchvision" and name == DELTAS:
            value = value[4:]
        elif leaf == "running_var" and name.startswith("backbone.") and norm_eps != EPS:
            value = (value.double() + (norm_eps - EPS)).to(value.dtype)
        result.mapped[key] = f"{name}.{leaf}"
        result.state[f"{name}.{leaf}"] = value
    return replace(result, missing=_missing(result.state, layout, "fpn_det"))


def _from_fpn_det(state: Mapping[str, Tensor], target: Project) -> Conversion:
    layout = Layout.of(state)
    theirs_of = layout.names(target)
    result = Conversion({})
    for key, value in state.items():
        module, _, leaf = key.rpartition(".")
        if module not in theirs_of:
            raise ValueError(
                f"{target}: expected tensors that its Faster R-CNN with FPN has, got {key} {list(value.shape)}."
            )
        if target == "detectron2" and leaf == COUNTER:
            result.dropped[key] = "detectron2's norms do not count their batches"
            continue
        name = f"{theirs_of[module]}.{leaf}"
        if target == "torchvision" and module == LOGITS:
            value = torch.cat([value[-1:], value[:-1]])
        elif target == "torchvision" and module == DELTAS:
            value = torch.cat([torch.zeros_like(value[:4]), value])
            result.added[f"{name}[0:4]"] = "deltas of the background, zeros, which are not used"
        result.mapped[key] = name
        result.state[name] = value
        counter = f"{theirs_of[module]}.{COUNTER}"
        if target == "mmdet" and leaf == "running_var" and f"{module}.{COUNTER}" not in state:
            result.state[counter] = torch.zeros((), dtype=torch.int64)
            result.added[counter] = "mmdetection's norms count their batches; 0"
    return replace(result, missing=_missing(result.state, layout, target))


def _missing(state: Mapping[str, Tensor], layout: Layout, project: Project) -> tuple[str, ...]:
    modules = layout.modules()
    wanted = (f"{theirs}.{leaf}" for ours, theirs in layout.names(project).items() for leaf in modules[ours])
    return tuple(key for key in wanted if key not in state)
