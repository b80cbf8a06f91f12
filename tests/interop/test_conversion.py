from __future__ import annotations

import re

import pytest
import torch
import torchvision
from compare import assert_close
from torch import Tensor

from fpn_det.interop.conversion import convert, recognize
from fpn_det.interop.naming import PROJECTS, Layout, Project

R50 = Layout(blocks=(3, 4, 6, 3), convs_per_block=3, normed_neck=False, rpn_convs=1, head_convs=0)
OTHERS = [project for project in PROJECTS if project != "fpn_det"]


def keys(layout: Layout, project: Project) -> list[str]:
    names = layout.names(project)
    return [f"{names[module]}.{leaf}" for module, leaves in layout.modules().items() for leaf in leaves]


@pytest.mark.parametrize("project", OTHERS)
def test_weights_come_back_from_every_project_to_the_bit(ours: dict[str, Tensor], project: Project):
    there = convert(ours, "fpn_det", project)
    assert recognize(there.state) == project
    assert not there.missing and not there.dropped and set(there.mapped) == set(ours)
    back = convert(there.state, project, "fpn_det")
    assert not back.missing and set(back.mapped) == set(there.state)
    for name, value in ours.items():
        assert torch.equal(back.state[name], value), name


@pytest.mark.parametrize("source", OTHERS)
@pytest.mark.parametrize("target", OTHERS)
def test_every_project_converts_to_every_other(ours: dict[str, Tensor], source: Project, target: Project):
    there = convert(ours, "fpn_det", source).state
    conversion = convert(there, source, target)
    assert set(conversion.mapped) | set(conversion.dropped) == set(there)
    expected = convert(ours, "fpn_det", target).state
    counters = conversion.state.keys() - expected.keys()  # torchvision's frozen norms leave them out when they load
    assert not counters or (source, target) == ("mmdet", "torchvision")
    assert all(name.endswith("num_batches_tracked") for name in counters)
    assert all(torch.equal(conversion.state[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("project", "names"),
    [
        (
            "torchvision",
            "backbone.body.layer3.5.bn2.running_var backbone.body.layer1.0.downsample.1.bias backbone.fpn.inner_blocks.3.0.bias "
            "backbone.fpn.layer_blocks.0.0.weight rpn.head.conv.0.0.weight rpn.head.cls_logits.bias rpn.head.bbox_pred.weight "
            "roi_heads.box_head.fc6.weight roi_heads.box_predictor.cls_score.weight roi_heads.box_predictor.bbox_pred.bias",
        ),
        (
            "detectron2",
            "backbone.bottom_up.stem.conv1.norm.running_mean backbone.bottom_up.res4.5.conv2.norm.running_var "
            "backbone.bottom_up.res2.0.shortcut.weight backbone.bottom_up.res2.0.shortcut.norm.bias backbone.fpn_lateral5.bias "
            "backbone.fpn_output2.weight proposal_generator.rpn_head.conv.weight proposal_generator.rpn_head.anchor_deltas.bias "
            "roi_heads.box_head.fc2.bias roi_heads.box_predictor.cls_score.weight roi_heads.box_predictor.bbox_pred.bias",
        ),
        (
            "mmdet",
            "backbone.layer3.5.bn2.running_var backbone.layer1.0.downsample.0.weight neck.lateral_convs.3.conv.bias "
            "neck.fpn_convs.0.conv.weight rpn_head.rpn_conv.weight rpn_head.rpn_cls.bias rpn_head.rpn_reg.weight "
            "roi_head.bbox_head.shared_fcs.1.weight roi_head.bbox_head.fc_cls.weight roi_head.bbox_head.fc_reg.bias",
        ),
    ],
)
def test_names_are_those_of_the_project(project: Project, names: str):
    found = keys(R50, project)
    assert len(set(found)) == 295  # 53 convolutions with norms of 4 tensors, and 15 layers of 2
    assert set(names.split()) <= set(found)


@pytest.mark.parametrize("version", ["", "_v2"])
def test_names_are_those_of_torchvision_itself(version: str):
    with torch.device("meta"):
        model = getattr(torchvision.models.detection, f"fasterrcnn_resnet50_fpn{version}")(
            weights=None, weights_backbone=None
        )
    state = model.state_dict()
    expected = {name for name in state if not name.endswith("num_batches_tracked")}
    assert set(keys(Layout.of(state), "torchvision")) == expected
    conversion = convert(state, "torchvision", "fpn_det")
    assert len(conversion.mapped) == len(state) and not conversion.missing
    assert convert(conversion.state, "fpn_det", "torchvision").state.keys() == state.keys()


def test_background_moves_from_first_to_last():
    """Two classes, one feature: rows of torchvision are background, a, b; its deltas have four rows for each."""
    state = {
        "roi_heads.box_predictor.cls_score.weight": torch.tensor([[0.0], [1.0], [2.0]]),
        "roi_heads.box_predictor.bbox_pred.bias": torch.arange(12.0),
    }
    ours = convert(state, "torchvision", "fpn_det").state
    assert ours["roi_head.predictor.class_logits.weight"].flatten().tolist() == [1, 2, 0]
    assert ours["roi_head.predictor.box_deltas.bias"].tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    theirs = convert(ours, "fpn_det", "torchvision")
    assert theirs.state["roi_heads.box_predictor.bbox_pred.bias"].tolist() == [0, 0, 0, 0, 4, 5, 6, 7, 8, 9, 10, 11]
    assert list(theirs.added) == ["roi_heads.box_predictor.bbox_pred.bias[0:4]"]


def test_every_key_is_accounted_for(ours: dict[str, Tensor]):
    state = convert(ours, "fpn_det", "detectron2").state
    constant = "proposal_generator.anchor_generator.cell_anchors.0"
    state |= {"pixel_mean": torch.zeros(3, 1, 1), constant: torch.zeros(3, 4)}
    lost = state.pop("backbone.fpn_lateral3.bias")
    conversion = convert(state, "detectron2", "fpn_det")
    assert set(conversion.dropped) == {"pixel_mean", constant}
    assert conversion.missing == ("neck.lateral.1.bias",)
    assert (
        f"dropped {constant}: a constant" in conversion.report()
        and "missing neck.lateral.1.bias" in conversion.report()
    )
    state |= {"backbone.fpn_lateral3.bias": lost, "roi_heads.mask_head.deconv.weight": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match=r"has, got roi_heads.mask_head.deconv.weight \[2, 2\]."):
        convert(state, "detectron2", "fpn_det")


def test_counters_of_norms_are_dropped_or_made_where_a_project_has_none_or_some(ours: dict[str, Tensor]):
    theirs = convert(ours, "fpn_det", "mmdet")
    norms = sum(name.endswith("running_var") for name in ours)
    assert len(theirs.added) == norms and theirs.state["backbone.bn1.num_batches_tracked"] == 0
    there = convert(theirs.state, "mmdet", "detectron2")
    assert len(there.dropped) == norms and not any(name.endswith("num_batches_tracked") for name in there.state)


def test_names_of_old_torchvision_files_are_understood(ours: dict[str, Tensor]):
    new = convert(ours, "fpn_det", "torchvision").state
    old = {
        re.sub(r"(_blocks\.\d)\.0\.|(rpn\.head\.conv)\.0\.0\.", r"\1\2.", name): value for name, value in new.items()
    }
    assert "backbone.fpn.inner_blocks.0.weight" in old and "rpn.head.conv.bias" in old
    back = convert(old, "torchvision", "fpn_det").state
    assert all(torch.equal(back[name], value) for name, value in ours.items())


def test_variances_without_epsilon_are_shifted(ours: dict[str, Tensor]):
    """rsqrt(v + 0) = rsqrt((v - 1e-5) + 1e-5)."""
    state = convert(ours, "fpn_det", "torchvision").state
    shifted = convert(state, "torchvision", "fpn_det", norm_eps=0.0).state
    variance = ours["backbone.layer2.0.bn1.running_var"]
    assert_close(shifted["backbone.layer2.0.bn1.running_var"] + 1e-5, variance, 1e-7)
    assert torch.equal(shifted["backbone.bn1.bias"], ours["backbone.bn1.bias"])


def test_a_stranger_is_not_recognized():
    with pytest.raises(
        ValueError,
        match=r"got 1 tensors \(conv1.weight, ...\). Weights of a backbone alone go to model.backbone.weights",
    ):
        recognize({"conv1.weight": torch.zeros(1)})


def test_what_a_project_does_not_have_is_refused():
    layout = Layout(blocks=(2, 2, 2, 2), convs_per_block=2, normed_neck=True, rpn_convs=2, head_convs=4)
    state = {name: torch.zeros(8, 1) for name in keys(layout, "fpn_det")}
    assert len(convert(state, "fpn_det", "torchvision").mapped) == len(state)
    with pytest.raises(
        ValueError,
        match=re.escape("detectron2: expected tensors that its Faster R-CNN with FPN has, got neck.lateral.0.0"),
    ):
        convert(state, "fpn_det", "detectron2")
