"""Names of the modules of a Faster R-CNN with FPN in each project: ours, torchvision's, detectron2's, mmdetection's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

Project = Literal["fpn_det", "torchvision", "detectron2", "mmdet"]
PROJECTS: tuple[Project, ...] = ("fpn_det", "torchvision", "detectron2", "mmdet")

CONV = ("weight",)
LAYER = ("weight", "bias")
NORM = ("weight", "bias", "running_mean", "running_var")
COUNTER = "num_batches_tracked"  # optional buffer of a norm

STATISTICS = "roi_head.dynamics."  # of the proposals in training (Dynamic R-CNN), which detection does not read

LOGITS, DELTAS = "roi_head.predictor.class_logits", "roi_head.predictor.box_deltas"

# Names of modules that changed between versions of a project, old -> new.
OLD_NAMES = {
    "torchvision": {"rpn.head.conv": "rpn.head.conv.0.0"}
    | {
        f"backbone.fpn.{kind}_blocks.{i}": f"backbone.fpn.{kind}_blocks.{i}.0"
        for kind in ("inner", "layer")
        for i in range(4)
    }
}


@dataclass(frozen=True)
class Layout:
    """Modules of a detector."""

    blocks: tuple[int, ...]  # of each stage of the backbone
    convs_per_block: int
    normed_neck: bool
    rpn_convs: int
    head_convs: int

    @classmethod
    def of(cls, names: Iterable[str]) -> Layout:
        """Derive the layout from the tensor names of any project."""
        text = "\n".join(names)
        convs = set(re.findall(r"(?:layer|res)(\d)\.(\d+)\.conv(\d)", text))
        stages = sorted({stage for stage, _, _ in convs})
        return cls(
            blocks=tuple(len({block for stage, block, _ in convs if stage == this}) for this in stages),
            convs_per_block=max((int(number) for _, _, number in convs), default=0),
            normed_neck=re.search(r"(?:inner_blocks|neck\.lateral)\.0\.1\.", text) is not None,
            rpn_convs=len(set(re.findall(r"rpn\.head\.convs?\.(\d)\.", text))) or 1,
            head_convs=len(set(re.findall(r"box_head\.(?:convs\.)?(\d)\.0\.weight", text))),
        )

    @property
    def depth(self) -> int:
        """Depth of the ResNet.

        Raises:
            ValueError: there is none with these blocks.
        """
        known = {(2, 2, 2, 2, 2): 18, (3, 4, 6, 3, 2): 34, (3, 4, 6, 3, 3): 50, (3, 4, 23, 3, 3): 101}
        depth = next((depth for blocks, depth in known.items() if blocks == (*self.blocks, self.convs_per_block)), None)
        if depth is None:
            raise ValueError(
                f"weights: expected a ResNet of 18, 34, 50 or 101 layers, got stages of {list(self.blocks)} blocks."
            )
        return depth

    def modules(self) -> dict[str, tuple[str, ...]]:
        """Our name of every module, with the names of its tensors."""
        found = {"backbone.conv1": CONV, "backbone.bn1": NORM}
        for stage, blocks in enumerate(self.blocks, start=1):
            for block in range(blocks):
                place = f"backbone.layer{stage}.{block}"
                for number in range(1, self.convs_per_block + 1):
                    found |= {f"{place}.conv{number}": CONV, f"{place}.bn{number}": NORM}
                if block == 0 and (stage > 1 or self.convs_per_block == 3):
                    found |= {f"{place}.downsample.0": CONV, f"{place}.downsample.1": NORM}
        for kind in ("lateral", "output"):
            for level in range(len(self.blocks)):
                place = f"neck.{kind}.{level}"
                found |= {f"{place}.0": CONV, f"{place}.1": NORM} if self.normed_neck else {place: LAYER}
        found |= {f"rpn.head.convs.{number}": LAYER for number in range(self.rpn_convs)}
        found |= {"rpn.head.objectness": LAYER, "rpn.head.deltas": LAYER}
        for number in range(self.head_convs):
            found |= {f"roi_head.box_head.convs.{number}.0": CONV, f"roi_head.box_head.convs.{number}.1": NORM}
        found |= {f"roi_head.box_head.fc{number}": LAYER for number in ((1,) if self.head_convs else (1, 2))}
        return found | {LOGITS: LAYER, DELTAS: LAYER}

    def names(self, project: Project) -> dict[str, str]:
        """Our name of every module that `project` has, with its name there."""
        return {ours: theirs for ours in self.modules() if (theirs := _rename(ours, _RULES[project](self))) is not None}


Rules = list[tuple[str, str | Callable[[re.Match[str]], str]]]


def _rename(module: str, rules: Rules) -> str | None:
    for pattern, replacement in rules:
        if match := re.fullmatch(pattern, module):
            return match.expand(replacement) if isinstance(replacement, str) else replacement(match)
    return None


def _fpn_det(layout: Layout) -> Rules:
    return [(r"(.+)", r"\1")]


def _torchvision(layout: Layout) -> Rules:
    return [
        (r"backbone\.(.+)", r"backbone.body.\1"),
        (r"neck\.lateral\.(\d)(?:\.0)?", r"backbone.fpn.inner_blocks.\1.0"),
        (r"neck\.lateral\.(\d)\.1", r"backbone.fpn.inner_blocks.\1.1"),
        (r"neck\.output\.(\d)(?:\.0)?", r"backbone.fpn.layer_blocks.\1.0"),
        (r"neck\.output\.(\d)\.1", r"backbone.fpn.layer_blocks.\1.1"),
        (r"rpn\.head\.convs\.(\d)", r"rpn.head.conv.\1.0"),
        (r"rpn\.head\.objectness", "rpn.head.cls_logits"),
        (r"rpn\.head\.deltas", "rpn.head.bbox_pred"),
        (r"roi_head\.box_head\.convs\.(\d)\.(\d)", r"roi_heads.box_head.\1.\2"),
        # a sequence of convolutions, a flattening, the layer
        (r"roi_head\.box_head\.fc1", f"roi_heads.box_head.{layout.head_convs + 1 if layout.head_convs else 'fc6'}"),
        (r"roi_head\.box_head\.fc2", "roi_heads.box_head.fc7"),
        (r"roi_head\.predictor\.class_logits", "roi_heads.box_predictor.cls_score"),
        (r"roi_head\.predictor\.box_deltas", "roi_heads.box_predictor.bbox_pred"),
    ]


def _detectron2(layout: Layout) -> Rules:
    def stage(match: re.Match[str], name: str) -> str:
        return f"backbone.bottom_up.res{int(match[1]) + 1}.{match[2]}.{name}"

    return [
        (r"backbone\.conv1", "backbone.bottom_up.stem.conv1"),
        (r"backbone\.bn1", "backbone.bottom_up.stem.conv1.norm"),
        (r"backbone\.layer(\d)\.(\d+)\.conv(\d)", lambda match: stage(match, f"conv{match[3]}")),
        (r"backbone\.layer(\d)\.(\d+)\.bn(\d)", lambda match: stage(match, f"conv{match[3]}.norm")),
        (r"backbone\.layer(\d)\.(\d+)\.downsample\.0", lambda match: stage(match, "shortcut")),
        (r"backbone\.layer(\d)\.(\d+)\.downsample\.1", lambda match: stage(match, "shortcut.norm")),
        (r"neck\.(lateral|output)\.(\d)", lambda match: f"backbone.fpn_{match[1]}{int(match[2]) + 2}"),
        (r"rpn\.head\.convs\.0", "proposal_generator.rpn_head.conv"),
        (r"rpn\.head\.objectness", "proposal_generator.rpn_head.objectness_logits"),
        (r"rpn\.head\.deltas", "proposal_generator.rpn_head.anchor_deltas"),
        (r"roi_head\.box_head\.(fc\d)", r"roi_heads.box_head.\1"),
        (r"roi_head\.predictor\.class_logits", "roi_heads.box_predictor.cls_score"),
        (r"roi_head\.predictor\.box_deltas", "roi_heads.box_predictor.bbox_pred"),
    ]


def _mmdet(layout: Layout) -> Rules:
    return [
        (r"(backbone\..+)", r"\1"),
        (r"neck\.lateral\.(\d)", r"neck.lateral_convs.\1.conv"),
        (r"neck\.output\.(\d)", r"neck.fpn_convs.\1.conv"),
        (r"rpn\.head\.convs\.0", "rpn_head.rpn_conv"),
        (r"rpn\.head\.objectness", "rpn_head.rpn_cls"),
        (r"rpn\.head\.deltas", "rpn_head.rpn_reg"),
        (r"roi_head\.box_head\.fc1", "roi_head.bbox_head.shared_fcs.0"),
        (r"roi_head\.box_head\.fc2", "roi_head.bbox_head.shared_fcs.1"),
        (r"roi_head\.predictor\.class_logits", "roi_head.bbox_head.fc_cls"),
        (r"roi_head\.predictor\.box_deltas", "roi_head.bbox_head.fc_reg"),
    ]


_RULES: dict[Project, Callable[[Layout], Rules]] = {
    "fpn_det": _fpn_det,
    "torchvision": _torchvision,
    "detectron2": _detectron2,
    "mmdet": _mmdet,
}
