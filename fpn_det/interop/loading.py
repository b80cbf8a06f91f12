"""Load weights of any supported project into a model, with a report for every tensor.

Classes are matched by name. If they differ, the last layer stays as it was made, and the rows of the classes that both
know are copied into it. Everything else has to fit exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fpn_det.interop.catalog import locate
from fpn_det.interop.coco_classes import assumed_class_names, category_ids
from fpn_det.interop.conversion import EPS, convert, recognize
from fpn_det.interop.naming import COUNTER, DELTAS, LOGITS, STATISTICS, Layout, Project
from fpn_det.interop.reading import read_weights
from fpn_det.models.resnet import OFFSETS
from fpn_det.models.weights import refuse_nonfinite_weights, widen_input

LEAST_SHARE = 0.5  # of a model's parameters that a file must provide
# Files trained without the norms' epsilon, by the first digits of their SHA-256: fasterrcnn_resnet50_fpn_coco-258fb6c6.pth.
WITHOUT_EPS = ("258fb6c6",)
# The experiment with the conventions of each project.
COMPAT: Mapping[Project, str] = {
    "torchvision": "compat/torchvision_r50_fpn",
    "detectron2": "compat/detectron2_r50_fpn",
    "mmdet": "compat/mmdet_r50_fpn",
}


@dataclass(frozen=True)
class Weights:
    """Weights in our names, and the classes of their rows if they are known."""

    state: dict[str, Tensor]
    class_names: tuple[str, ...] | None
    source: str
    project: Project
    dropped: dict[str, str] = field(default_factory=dict)  # key or part of the file -> reason
    config: str | None = None  # YAML text of the settings, if the file is a checkpoint of ours
    category_ids: tuple[int, ...] = ()  # of the classes: those of the file, or COCO's, or 1, 2, 3, ...
    score_thresholds: dict[str, Any] | None = None  # of a checkpoint of ours, as it holds them

    @property
    def num_classes(self) -> int:
        return len(self.state[f"{LOGITS}.bias"]) - 1

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all classes; numbered where they are unknown."""
        return self.class_names or tuple(f"class {label}" for label in range(self.num_classes))

    @property
    def layout(self) -> Layout:
        return Layout.of(self.state)

    @property
    def settings(self) -> tuple[str, ...]:
        """Words of a command line for the structure and conventions of another project's weights; none for ours."""
        if self.project not in COMPAT:
            return ()
        experiment = COMPAT[self.project] + ("_v2" if self.layout.normed_neck else "")
        return f"experiment={experiment}", f"model.backbone.depth={self.layout.depth}"


@dataclass(frozen=True)
class LoadReport:
    """Outcome for every tensor of a model and every key of the file."""

    source: str
    project: Project
    loaded: tuple[str, ...]
    copied: tuple[str, ...]  # classes whose rows of the last layer were copied
    replaced: tuple[str, ...]  # tensors that keep their initial values except for copied rows
    new_classes: tuple[str, ...]  # classes that the file does not have
    dropped: dict[str, str]
    remarks: tuple[str, ...]
    share: float  # share of the model's parameters that came from the file

    def table(self) -> str:
        """The report in lines, for a log."""
        rows = [("loaded", f"{len(self.loaded)} tensors, {self.share:.1%} of the model")]
        if self.replaced:
            rows.append(("replaced", f"{_some(self.replaced)}: other classes"))
            rows.append(("copied", f"{len(self.copied)} classes by name: {_some(self.copied)}"))
            rows.append(
                ("new", f"{len(self.new_classes)} classes that the file does not have: {_some(self.new_classes)}")
            )
        reasons: dict[str, list[str]] = {}
        for key, reason in self.dropped.items():
            reasons.setdefault(reason, []).append(key)
        rows += [("dropped", f"{_some(keys)}: {reason}") for reason, keys in reasons.items()]
        rows += [("note", remark) for remark in self.remarks]
        return "\n".join(
            [f"weights of {self.source} ({self.project})", *(f"  {name:<9} {text}" for name, text in rows)]
        )


def read_as_ours(
    path: str | Path,
    class_names: Sequence[str] | None = None,
    project: Project | None = None,
    norm_eps: float | None = None,
) -> Weights:
    """Read a file of any project and convert its weights to our names.

    Args:
        path: the file, or the name of a published detector (`catalog.PUBLISHED`), which is fetched once.
        class_names: of its rows, if the file does not say and they are not COCO's 80 classes or 90 ids.
        project: who wrote it; None = found out.
        norm_eps: what the norms of its backbone add to the variance; None = known from the file.

    Raises:
        ValueError: it cannot be read, or holds other things than a whole Faster R-CNN with FPN.
    """
    file = read_weights(locate(path, "weights"))
    project = project or ("fpn_det" if file.config else recognize(file.state))
    if norm_eps is None:
        norm_eps = 0.0 if project == "torchvision" and _start_of_hash(file.path) in WITHOUT_EPS else EPS
    conversion = convert(file.state, project, "fpn_det", norm_eps)
    if conversion.missing:
        raise ValueError(
            f"{path}: expected a whole Faster R-CNN with FPN, got one without {_some(conversion.missing)}."
        )
    if f"{LOGITS}.bias" not in conversion.state:
        raise ValueError(
            f"{path}: expected a detector with an ROI head, got an RPN alone. Evaluate it with fpn-det eval."
        )
    num_classes = len(conversion.state[f"{LOGITS}.bias"]) - 1
    names = tuple(class_names or file.class_names or assumed_class_names(num_classes) or ())
    if names and len(names) != num_classes:
        raise ValueError(f"{path}: expected names for its {num_classes} classes, got {len(names)}.")
    dropped = file.dropped | conversion.dropped
    ids = file.category_ids or tuple(category_ids(names) if names else range(1, num_classes + 1))
    return Weights(
        conversion.state, names or None, str(path), project, dropped, file.config, ids, file.score_thresholds
    )


def load_weights(
    model: nn.Module, weights: Weights | str | Path, class_names: Sequence[str] | None = None
) -> LoadReport:
    """Load weights into a detector, in place.

    Args:
        model: the detector.
        weights: where from; a path is read by `read_as_ours`.
        class_names: of the model's rows; None = those of the weights.

    Raises:
        ValueError: the weights are of another model, with what does not fit.
    """
    if not isinstance(weights, Weights):
        weights = read_as_ours(weights)
    refuse_nonfinite_weights(weights.state, str(weights.source))
    own = model.state_dict()
    state, remarks = dict(weights.state), []
    counters = [key for key in {*own, *state} if key.endswith(COUNTER)]
    dropped = weights.dropped | {key: "the model's norms do not count batches" for key in counters if key not in own}
    statistics = [key for key in {*own, *state} if key.startswith(STATISTICS)]
    dropped |= {key: "statistics of another training run" for key in statistics if key in state}
    state = {key: value for key, value in state.items() if key not in dropped}
    offsets = [key for key in own if OFFSETS in key and key not in state]
    if offsets:
        remarks.append(f"{len(offsets)} tensors of deformable convolutions are new: their offsets start at zero")
    state |= {key: own[key] for key in (*statistics, *offsets) if key in own}
    state |= {key: own[key] for key in counters if key in own and key not in state}

    if (
        weights.project in ("detectron2", "mmdet")
        and _is_caffe_style(weights.state)
        and not getattr(model, "flips_channels", True)
    ):
        remarks.append(
            "its norms have no statistics, as in backbones that came from Caffe: those expect BGR pixels of deviation 1 and the stride "
            "on the 1x1, and this model gives RGB. Compare with experiment=compat/detectron2_r50_fpn"
        )

    for key, value in own.items():
        if key.startswith("backbone.") and key in state and _is_first_convolution(state[key], value):
            state[key] = widen_input(state[key], value.shape[1])
            remarks.append(f"{key} is adapted from 3 channels to {value.shape[1]}")

    wanted = tuple(class_names or weights.class_names or ())
    rows: list[tuple[int, int]] = []
    replaced: tuple[str, ...] = ()
    if weights.class_names is None and (not wanted or len(wanted) == weights.num_classes):
        remarks.append("the file does not name its classes: rows are taken in their order")
    elif wanted != weights.class_names:
        there = {name: row for row, name in enumerate(weights.class_names or ())}
        rows = [(row, there[name]) for row, name in enumerate(wanted) if name in there]
        numbers = len(wanted), weights.num_classes
        # of the predictors of all stages
        replaced = tuple(key for key in own if key in state and _is_by_class(key, own[key], state[key], numbers))
        for key in replaced:
            same, per_class = ([*rows, numbers], 1) if _is_of(LOGITS, key) else (rows, 4)  # the last logit: background
            state[key] = _copy_rows(own[key], state[key], same, per_class)

    fitting = [key for key, value in own.items() if key in state and state[key].shape == value.shape]
    loaded = tuple(key for key in fitting if key not in (*replaced, *statistics, *offsets))
    total = sum(value.numel() for value in own.values())
    share = sum(own[key].numel() for key in loaded) / total
    if share < LEAST_SHARE:
        raise ValueError(
            f"{weights.source}: expected weights of this model, got a file that fills {share:.0%} of it. Is it the right file?"
        )
    if wrong := _differences(own, state):
        advice = f" They fit {' '.join(weights.settings)}." if weights.settings else ""
        raise ValueError(f"{weights.source}: expected weights of this model, got others: {wrong}.{advice}")
    model.load_state_dict(state)
    return LoadReport(
        source=weights.source,
        project=weights.project,
        loaded=loaded,
        copied=tuple(wanted[row] for row, _ in rows),
        replaced=replaced,
        new_classes=tuple(name for name in wanted if replaced and name not in (weights.class_names or ())),
        dropped=dropped,
        remarks=tuple(remarks),
        share=share,
    )


def _is_first_convolution(weight: Tensor, own: Tensor) -> bool:
    """True for weights of a convolution of RGB, where the model takes other channels."""
    return (
        weight.dim() == own.dim() == 4
        and weight.shape[1] == 3 != own.shape[1]
        and (weight.shape[0], *weight.shape[2:]) == (own.shape[0], *own.shape[2:])
    )


def _is_of(module: str, key: str) -> bool:
    """True for the parameters of `module`, LOGITS or DELTAS, in a predictor of any stage."""
    return key.rpartition(".")[0].endswith(module.removeprefix("roi_head"))


def _is_by_class(key: str, own: Tensor, other: Tensor, numbers: tuple[int, int]) -> bool:
    """True for parameters with rows for each of the two `numbers` of classes; deltas may be one set for all classes."""
    if not _is_of(DELTAS, key):
        return _is_of(LOGITS, key)
    lengths = len(own), len(other)
    return lengths == tuple(4 * number for number in numbers) and lengths != (4, 4)


def _copy_rows(own: Tensor, other: Tensor, same: Sequence[tuple[int, int]], per_class: int) -> Tensor:
    """Copy the rows of the same classes from `other` into a copy of `own`.

    Args:
        own, other: `per_class` rows for each class.
        same: index of each common class in `own` and in `other`.
        per_class: rows of a class.
    """
    result = own.clone()
    for here, there in same:
        result[here * per_class : (here + 1) * per_class] = other[there * per_class : (there + 1) * per_class]
    return result


def _differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} {list(state[key].shape)} instead of {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    found = (("without", missing), ("with", unexpected), ("of other shape:", shapes))
    return "; ".join(f"{len(keys)} {what} {_some(keys)}" for what, keys in found if keys)


def _is_caffe_style(state: Mapping[str, Tensor]) -> bool:
    """True if the backbone's norms only scale and shift, with mean 0 and variance 1, as in Caffe models."""
    mean, variance = state.get("backbone.bn1.running_mean"), state.get("backbone.bn1.running_var")
    return mean is not None and variance is not None and not mean.any() and bool((variance == variance[0]).all())


def _start_of_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8]


def _some(names: Sequence[str], shown: int = 5) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
