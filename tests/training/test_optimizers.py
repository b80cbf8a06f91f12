from __future__ import annotations

from functools import partial

import pytest
import torch
from compare import assert_close
from parts import TinyDetector
from torch import nn

from fpn_det.models.backbone import Backbone
from fpn_det.models.detector import Detector
from fpn_det.models.resnet import ResNet
from fpn_det.training.optimizers import SGD, AdamW


@pytest.mark.parametrize(
    "world_size, accumulate, batch_size, line",
    [
        (1, 1, 2, "0.0025 for 2 images a step (0.02 for 16)"),
        (8, 1, 16, "0.02 for 16 images a step, 8 ranks x 2 images"),
        (1, 8, 16, "0.02 for 16 images a step, 2 images x 8 accumulated"),
    ],
)
def test_lr_scales_with_the_batch(world_size, accumulate, batch_size, line):
    recipe = SGD(lr=0.02, base_batch_size=16)
    assert recipe.describe_lr(batch_size, world_size, accumulate) == line
    assert recipe.build(TinyDetector(), batch_size).param_groups[0]["peak_lr"] == pytest.approx(0.02 * batch_size / 16)


def test_lr_stands_without_a_base():
    recipe = SGD(lr=0.02, base_batch_size=None)
    assert recipe.scaled_lr(4) == 0.02
    assert recipe.describe_lr(4, 1, 2) == "0.02 for 4 images a step, 2 images x 2 accumulated"


def test_groups_follow_the_kind_of_parameter():
    model = TinyDetector()
    model.head.weight.requires_grad_(False)
    recipe = SGD(
        lr=1.0, base_batch_size=None, weight_decay=0.1, norm_weight_decay=0.0, bias_weight_decay=0.2, bias_lr_factor=2.0
    )
    found = {}
    for group in recipe.build(model, 4).param_groups:
        for parameter in group["params"]:
            (name,) = [name for name, other in model.named_parameters() if other is parameter]
            found[name] = (group["weight_decay"], group["peak_lr"])
    assert found == {
        "conv.weight": (0.1, 1.0),
        "conv.bias": (0.2, 2.0),
        "norm.weight": (0.0, 1.0),
        "norm.bias": (0.0, 1.0),
        "head.bias": (0.2, 2.0),
    }


def test_vectors_that_are_no_biases_and_position_tables_decay_as_norms():
    model = nn.ParameterDict(
        {
            "gamma": torch.ones(4),  # LayerScale of ConvNeXt
            "weights": torch.ones(2),  # of a BiFPN's fusion
            "relative_position_bias_table": torch.ones(9, 2),  # Swin
            "bias": torch.ones(4),
            "weight": torch.ones(4, 4),
        }
    )
    recipe = SGD(lr=1.0, weight_decay=0.1, norm_weight_decay=0.3, bias_weight_decay=0.2)
    decays = {
        id(parameter): group["weight_decay"] for group in recipe.groups(model, 4) for parameter in group["params"]
    }
    assert {name: decays[id(parameter)] for name, parameter in model.named_parameters()} == {
        "gamma": 0.3,
        "weights": 0.3,
        "relative_position_bias_table": 0.3,
        "bias": 0.2,
        "weight": 0.1,
    }


def test_offsets_of_deformable_convolutions_have_a_tenth_of_the_rate():
    model = Detector(2, ResNet(18, frozen_stages=0, deformable=(4, 5)))
    groups = SGD(lr=0.5, base_batch_size=None, bias_lr_factor=2.0, layer_decay=0.5).groups(model, 4)
    rates = {id(parameter): group["peak_lr"] for group in groups for parameter in group["params"]}
    found = {name: rates[id(parameter)] for name, parameter in model.named_parameters() if ".offset." in name}
    expected = {"backbone.layer3": 0.5 / 4 / 10, "backbone.layer4": 0.5 / 2 / 10}
    assert len(found) == 2 * 2 * 2  # weight and bias, in two blocks of two stages
    assert found == {name: pytest.approx(expected[name[:15]]) for name in found}


@pytest.mark.parametrize(
    "recipe, reference",
    [
        (
            SGD(lr=0.1, base_batch_size=None, nesterov=True),
            partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
        ),
        (AdamW(lr=0.01, base_batch_size=None), partial(torch.optim.AdamW, lr=0.01)),
    ],
)
def test_fused_step_equals_the_plain_one(recipe, reference):
    torch.manual_seed(0)
    ours, theirs = (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    optimizers = recipe.build(ours, 4), reference(theirs.parameters(), weight_decay=recipe.weight_decay)
    for _ in range(5):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            model(images).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(one, other, 1e-5)


def test_layer_decay_lowers_the_rates_of_early_stages_and_keeps_all_parameters():
    model = Detector(2, ResNet(18, frozen_stages=1))
    groups = SGD(lr=0.1, base_batch_size=None, layer_decay=0.5).groups(model, 4)
    rates = {id(parameter): group["peak_lr"] for group in groups for parameter in group["params"]}
    assert len(rates) == sum(parameter.requires_grad for parameter in model.parameters())
    expected = {
        "backbone.layer1": 0.1 / 16,
        "backbone.layer2": 0.1 / 8,
        "backbone.layer3": 0.1 / 4,
        "backbone.layer4": 0.1 / 2,
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == pytest.approx(expected.get(name[:15], 0.1)), name
    assert groups[-1]["peak_lr"] == 0.1  # the one that is logged


def test_layer_decay_is_refused_for_a_backbone_without_stages():
    model = Detector(2, ResNet(18))
    model.backbone.parameters_by_stage = lambda: Backbone.parameters_by_stage(model.backbone)
    with pytest.raises(ValueError, match="optimizer.layer_decay: expected 1 with ResNet"):
        SGD(lr=0.1, layer_decay=0.9).groups(model, 4)
