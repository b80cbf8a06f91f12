"""Saved settings of older versions, in the names of this one.

A run folder or checkpoint keeps the settings it was made with. When a setting or class gets another name or form, its
old form is translated here; on a command line the old name is refused with the new one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Tree = dict[str, Any]

# Old dotted name of a setting: its new name, and the conversion of its value.
RENAMED_SETTINGS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "model.neck.extra_level": ("model.neck.extra_levels", int),
    "miniature": ("reduced", str),
}

# Old name of a class that a `_target_` may name: its new name.
MOVED_CLASSES = {
    "fpn_det.models.roi_head.TwoLayerHead": "fpn_det.models.box_heads.TwoLayerHead",
    "fpn_det.models.roi_head.ConvHead": "fpn_det.models.box_heads.ConvHead",
    "fpn_det.models.rpn.ProposalFilter": "fpn_det.models.selection.ProposalFilter",
}

# Old module of a class that a `_target_` may name: its new module.
MOVED_MODULES = {
    "fpn_det.anchors": "fpn_det.models.anchors",
    "fpn_det.matching": "fpn_det.models.matching",
    "fpn_det.pyramid": "fpn_det.models.roi_align",
    "fpn_det.models.backbone": "fpn_det.models.resnet",
    "fpn_det.models.conv5_head": "fpn_det.models.box_heads",
    "fpn_det.models.neck": "fpn_det.models.necks.fpn",
    "fpn_det.models.bifpn": "fpn_det.models.necks.bifpn",
    "fpn_det.models.pafpn": "fpn_det.models.necks.pafpn",
    "fpn_det.models.pyramids": "fpn_det.models.necks.baselines",
    "fpn_det.engine.optimizers": "fpn_det.training.optimizers",
    "fpn_det.engine.schedule": "fpn_det.training.schedule",
}


# Settings that were replaced by something of another form: what to set now.
REPLACED_SETTINGS = {
    "model.pixel_divisor": "model.pixel_mean and model.pixel_std on 0..255",
    "model.image_scales": "model.image_pyramid.test",
    "model.train_image_scales": "model.image_pyramid.train",
    "model.rpn.box_beta": "model.rpn.box_loss.beta",
    "model.rpn.sampled_loss": "model.rpn.head.sampled_loss",
    "model.rpn.matcher.rescue": "model.rpn.matcher.allow_low_quality_matches",
    "model.roi_head.box_beta": "model.roi_head.box_loss.beta",
    "model.roi_head.class_agnostic": "model.roi_head.predictor.class_agnostic",
    "model.roi_head.delta_weights": "model.roi_head.predictor.coder.weights",
    "model.roi_head.add_gt": "model.roi_head.sampler.add_gt",
    "model.roi_head.score_threshold": "model.roi_head.test_filter.score_threshold",
    "model.roi_head.nms_iou": "model.roi_head.test_filter.nms_iou",
    "model.roi_head.max_detections": "model.roi_head.test_filter.max_detections",
    "model.roi_head.min_side": "model.roi_head.test_filter.min_side",
    "model.roi_head.nms_method": "model.roi_head.test_filter.nms_method",
}
CONVENTIONS = "fpn_det.interop.conventions"


def _convert_detector(tree: Tree) -> None:
    """Version 0.1: scales of the image pyramid and the exact order of operations were arguments of the detector."""
    model = tree.get("model")
    if not isinstance(model, dict):
        return
    divisor = model.pop("pixel_divisor", 1.0)
    if divisor != 1.0:
        for name in ("pixel_mean", "pixel_std"):
            model[name] = [value * divisor for value in model[name]]
    if model.pop("fold_norms", True) is False:
        model["_target_"] = f"{CONVENTIONS}.UnfoldedDetector"
    scales = {new: model.pop(old, [1.0]) for new, old in (("test", "image_scales"), ("train", "train_image_scales"))}
    if any(value != [1.0] for value in scales.values()):
        model["image_pyramid"] = {"_target_": "fpn_det.models.detector.ImagePyramid", **scales}


def _convert_rpn(tree: Tree) -> None:
    """Version 0.1: losses and conventions of other projects were arguments of the RPN and its parts."""
    rpn = find(tree, "model.rpn")
    if not isinstance(rpn, dict):
        return
    _convert_box_loss(rpn)
    head = rpn.get("head")
    if isinstance(head, dict):
        if "sampled_loss" in rpn:
            head["sampled_loss"] = rpn["sampled_loss"]
        if head.pop("join_siblings", True) is False:
            head["_target_"] = f"{CONVENTIONS}.SeparateRPNHead"
    rpn.pop("sampled_loss", None)
    rpn.pop("min_log_scale", None)
    normalizer, padding = rpn.pop("normalizer", "constant"), rpn.pop("padding_anchors", "exclude")
    if normalizer == "sampled" or padding == "keep":
        rpn["_target_"] = f"{CONVENTIONS}.SampledRPN"
    elif normalizer == "sampled_both_kinds":
        rpn["_target_"] = f"{CONVENTIONS}.MmdetRPN"
    anchors = rpn.get("anchors")
    if isinstance(anchors, dict):
        if anchors.pop("rounded", False):
            anchors["_target_"] = f"{CONVENTIONS}.RoundedAnchors"
        anchors.pop("stride_source", None)
        if anchors.pop("computed_in", "float32") == "float64":
            anchors["_target_"] = f"{CONVENTIONS}.Float64Anchors"
    _convert_matcher(rpn.get("matcher"))
    for name in ("train_filter", "test_filter"):
        select = rpn.get(name)
        if isinstance(select, dict):
            ranking = select.pop("ranking", "logits")
            batched = select.get("nms_method") in ("shifted", "torchvision_batched")
            if batched:
                select["nms_method"] = "auto"
                classes = {
                    "probabilities": "ProbabilityBeforeTopK",
                    "logits_then_probabilities": "ProbabilityAfterTopK",
                }
                select["_target_"] = f"{CONVENTIONS}.{classes.get(ranking, 'BatchedNmsProposals')}"


def _convert_roi_head(tree: Tree) -> None:
    """Version 0.1: what selects detections, decodes boxes and follows other projects were arguments of the ROI head."""
    head = find(tree, "model.roi_head")
    if not isinstance(head, dict):
        return
    _convert_box_loss(head)
    if head.pop("normalizer", "constant") != "constant":
        head["_target_"] = f"{CONVENTIONS}.SampledROIHead"
    _convert_matcher(head.get("matcher"))
    sampler = head.get("sampler")
    if isinstance(sampler, dict) and sampler.get("_target_") == "fpn_det.models.matching.Sampler":
        sampler["_target_"] = "fpn_det.models.matching.ProposalSampler"
        sampler["add_gt"] = head.pop("add_gt", True)
    selection = {
        name: head.pop(name) for name in ("score_threshold", "nms_iou", "max_detections", "min_side") if name in head
    }
    method, drop_empty = head.pop("nms_method", "auto"), head.pop("drop_empty", False)
    frame, first_label = head.pop("nms_frame", "input"), head.pop("nms_first_label", 0)
    target = "fpn_det.models.selection.DetectionFilter"
    if method in ("shifted", "torchvision_batched"):
        named = {(True, 0): "Detectron2Detections", (False, 1): "TorchvisionDetections"}
        name = (
            "MmdetDetections" if frame == "original" else named.get((drop_empty, first_label), "BatchedNmsDetections")
        )
        target, method = f"{CONVENTIONS}.{name}", "auto"
    if selection:
        head["test_filter"] = {"_target_": target, **selection, "nms_method": method}
    bounded = head.pop("min_log_scale", None) is not None and frame == "original"
    if "delta_weights" in head:
        coder = f"{CONVENTIONS}.BoundedBoxCoder" if bounded else "fpn_det.boxes.BoxCoder"
        head["predictor"] = {
            "_target_": "fpn_det.models.roi_head.BoxPredictor",
            "_partial_": True,
            "class_agnostic": head.pop("class_agnostic", False),
            "coder": {"_target_": coder, "weights": head.pop("delta_weights")},
        }
    pooler = head.get("pooler")
    if isinstance(pooler, dict):
        epsilon, outside = pooler.pop("epsilon", 1e-8), pooler.pop("epsilon_outside", 0.0)
        if outside:
            pooler["_target_"] = f"{CONVENTIONS}.TorchvisionRoIAlign"
        elif epsilon != 1e-8:
            pooler["_target_"] = f"{CONVENTIONS}.MmdetRoIAlign"


def _convert_box_loss(stage: Tree) -> None:
    if "box_beta" in stage:
        stage["box_loss"] = {"_target_": "fpn_det.models.losses.SmoothL1", "beta": stage.pop("box_beta")}


def _convert_matcher(matcher: Any) -> None:
    if isinstance(matcher, dict) and "rescue" in matcher:
        matcher["allow_low_quality_matches"] = matcher.pop("rescue")
        above, reassigns = matcher.pop("rescue_above", 0.0), matcher.pop("rescue_reassigns", False)
        if reassigns:
            matcher["_target_"] = f"{CONVENTIONS}.ReassigningMatcher"
        elif above < 0:
            matcher["_target_"] = f"{CONVENTIONS}.UntouchedMatcher"


def _convert_intervals(tree: Tree) -> None:
    """Version 0.1: intervals were numbers of steps, with 0 for only at the end."""
    trainer = tree.get("trainer")
    for name in ("eval_every", "save_every", "log_every"):
        if isinstance(trainer, dict) and type(steps := trainer.get(name)) is int:
            trainer[name] = f"{steps} steps" if steps else None


def _convert_weights(tree: Tree) -> None:
    """Version 0.1: `imagenet` was the only name of weights."""
    for name in ("model.backbone", "model.roi_head.box_head"):
        part = find(tree, name)
        if isinstance(part, dict) and part.get("weights") == "imagenet":
            part["weights"] = "torchvision/IMAGENET1K_V1"


# Changes that are more than another name; each edits the tree in place and leaves a current tree as it is.
CONVERSIONS: list[Callable[[Tree], None]] = [
    _convert_detector,
    _convert_rpn,
    _convert_roi_head,
    _convert_intervals,
    _convert_weights,
]


def migrate(tree: Tree) -> None:
    """Translate the settings of any older version in place. Current settings stay as they are."""
    for node in _mappings(tree):
        if isinstance(target := node.get("_target_"), str):
            module, _, name = target.rpartition(".")
            node["_target_"] = MOVED_CLASSES.get(target, f"{MOVED_MODULES.get(module, module)}.{name}")
    for old, (new, convert) in RENAMED_SETTINGS.items():
        section, _, name = old.rpartition(".")
        node = find(tree, section)
        if isinstance(node, dict) and name in node:
            value = convert(node.pop(name))
            new_section, _, new_name = new.rpartition(".")
            if isinstance(place := find(tree, new_section), dict):
                place[new_name] = value
    for change in CONVERSIONS:
        change(tree)


def find(tree: Any, name: str) -> Any:
    """The value of a dotted name; None if there is none."""
    for part in name.split(".") if name else ():
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _mappings(value: Any) -> Iterator[Tree]:
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from _mappings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _mappings(item)


def refuse_old_name(name: str) -> None:
    """Refuse a setting that has another name now, with the new one.

    Raises:
        ValueError: the command line names it.
    """
    if name in RENAMED_SETTINGS:
        raise ValueError(f"{name}: is called {RENAMED_SETTINGS[name][0]} now. Use that name.")
    if name in REPLACED_SETTINGS:
        raise ValueError(f"{name}: is no longer a setting. Set {REPLACED_SETTINGS[name]} instead.")
