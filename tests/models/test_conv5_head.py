from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from compare import assert_close
from test_detector import gradients, make_batch, spread_out

from fpn_det.composition import compose
from fpn_det.models.box_heads import Conv5Head
from fpn_det.models.detector import Detector
from fpn_det.models.layers import DeformableConv2d
from fpn_det.models.matching import ProposalSampler
from fpn_det.models.necks.baselines import SingleMap
from fpn_det.models.resnet import ResNet
from fpn_det.models.roi_align import RoIAlign
from fpn_det.models.roi_head import ROIHead
from fpn_det.models.rpn import RPN
from fpn_det.models.selection import ProposalFilter


def make_model(weights: str | None = None) -> Detector:
    torch.manual_seed(0)
    filters = {"train_filter": ProposalFilter(50, 20), "test_filter": ProposalFilter(50, 20)}
    box_head = partial(Conv5Head, depth=18, weights=weights)
    head = partial(
        ROIHead, pooler=partial(RoIAlign, output_size=14), box_head=box_head, sampler=ProposalSampler(8, 0.25)
    )
    neck = partial(SingleMap, level="C4", channels=None)
    return Detector(3, ResNet(18, weights), neck, partial(RPN, **filters), head)


@pytest.mark.parametrize("depth", [18, 50])
def test_conv5_head_is_the_mean_of_torchvisions_last_stage(depth: int):
    theirs = getattr(torchvision.models, f"resnet{depth}")().eval()
    channels = 256 if depth == 18 else 1024
    head = Conv5Head(channels, 14, depth).eval()
    head.layer4.load_state_dict(theirs.layer4.state_dict())
    pooled = torch.randn(3, channels, 14, 14)
    expected = theirs.avgpool(theirs.layer4(pooled)).flatten(1)
    assert_close(head(pooled), expected, 1e-5)
    assert head.width == expected.shape[1]


def test_backbone_and_head_share_one_file_of_weights(tmp_path: Path):
    whole = torchvision.models.resnet18()
    torch.save(whole.state_dict(), tmp_path / "resnet18.pth")
    model = make_model(str(tmp_path / "resnet18.pth"))
    model.load_pretrained()
    parts = {**model.backbone.state_dict(), **model.roi_head.box_head.state_dict()}
    for name, value in whole.state_dict().items():
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked"):
            assert torch.equal(parts.pop(name), value), name
    assert not parts


@pytest.mark.parametrize("objects", [(3, 1), (0, 0)])
def test_every_parameter_under_a_conv5_head_gets_a_gradient(objects: tuple[int, ...]):
    for name, gradient in gradients(make_model(), make_batch(objects)).items():
        assert gradient is not None and gradient.isfinite().all(), name


def test_conv5_head_detects():
    assert spread_out(make_model()).detect(make_batch()).valid.any()


def test_conv5_head_refuses_another_map_than_c4():
    with pytest.raises(
        ValueError, match=r"expected C4 unchanged, 256 channels, got 64. Set neck=single_map model.neck.level=C4"
    ):
        Conv5Head(64, 14, 18)


def test_conv5_head_skips_its_blocks_at_the_rates_of_the_whole_backbone():
    c4 = ["neck=single_map", "model.neck.level=C4", "model.neck.channels=null", "model.backbone.depth=18"]
    model = compose([*c4, "roi_head=conv5", "model.backbone.stochastic_depth=0.4"]).build_model(2)
    stages = [*(getattr(model.backbone, f"layer{number}") for number in (1, 2, 3)), model.roi_head.box_head.layer4]
    rates = [block.drop.p for stage in stages for block in stage]
    assert rates == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4])


@pytest.mark.parametrize("head", [[], ["roi_head=conv5", "model.neck.channels=null"]])
def test_deformable_stages_that_are_cut_off_are_refused(head: list[str]):
    c4 = ["neck=single_map", "model.neck.level=C4", "model.backbone.depth=18", *head]
    with pytest.raises(ValueError, match=r"^model.backbone.deformable: expected stages up to 4, .* got 5\. Leave out"):
        compose([*c4, "model.backbone.deformable=[4,5]"]).build_model(2)
    model = compose([*c4, "model.backbone.deformable=[4]"]).build_model(2)
    assert sum(isinstance(module, DeformableConv2d) for module in model.modules()) == 2
