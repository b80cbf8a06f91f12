"""The other pyramids, and what follows them in a detector."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from test_detector import gradients, make_batch, spread_out
from tiny import TINY
from torch import Tensor, nn

from fpn_det.api import build_model
from fpn_det.composition import compose
from fpn_det.models.necks.base import ExtraLevels, Neck, TopDown
from fpn_det.models.necks.baselines import BottomUp, FeatureHierarchy, FinestLevel, SingleMap, TopDownOnly
from fpn_det.models.necks.bifpn import BiFPN
from fpn_det.models.necks.fpn import FPN
from fpn_det.models.necks.pafpn import PAFPN

WORDS = {  # on the command line -> strides
    "fpn": (4, 8, 16, 32, 64),
    "bottom_up": (4, 8, 16, 32, 64),
    "top_down_only": (4, 8, 16, 32, 64),
    "finest_level": (4,),
    "single_map": (32,),
    "single_map model.neck.level=C4": (16,),
    "single_map model.neck.level=C4 model.neck.channels=null": (16,),
    "feature_hierarchy": (8, 16, 32, 64, 128),
    "pafpn": (4, 8, 16, 32, 64),
    "bifpn": (4, 8, 16, 32, 64),
    "fpn model.neck.extra_method=conv model.neck.extra_levels=2 model.rpn.anchors.sizes=[8,16,32,64,128,256]": (
        4,
        8,
        16,
        32,
        64,
        128,
    ),
}


def transparent(neck: Neck) -> Neck:
    """Every convolution gives the mean of its input channels at its center: a constant passes unchanged."""
    for conv in (module for module in neck.modules() if isinstance(module, nn.Conv2d)):
        conv.weight.data.zero_()
        middle = conv.kernel_size[0] // 2
        conv.weight.data[:, :, middle, middle] = 1 / conv.weight.shape[1]
        if conv.bias is not None:
            conv.bias.data.zero_()
    return neck


def constant_maps(*values: float) -> list[Tensor]:
    """Of 4 channels, 16x16, 8x8, ..."""
    return [torch.full((1, 4, 16 >> level, 16 >> level), float(value)) for level, value in enumerate(values)]


ALL = ([4, 4, 4, 4], [4, 8, 16, 32])


@pytest.mark.parametrize(
    ("neck", "expected"),
    [
        (FPN(*ALL, 4), [15, 14, 12, 8, 8]),  # 8, 4 + 8, 2 + 12, 1 + 14
        (FPN(*ALL, 4, merge="average"), [2.5, 4, 6, 8, 8]),  # (4 + 8) / 2 = 6, (2 + 6) / 2 = 4
        (BottomUp(*ALL, 4), [1, 2, 4, 8, 8]),
        (TopDownOnly(*ALL, 4), [8, 8, 8, 8, 8]),
        (FinestLevel(*ALL, 4), [15]),
        (SingleMap(*ALL, "C4", 4), [4]),
        (SingleMap(*ALL, "C5", None), [8]),
        (FeatureHierarchy(*ALL, "C3", 5, 4), [2, 4, 8, 8, 8]),
        (PAFPN(*ALL, 4), [15, 29, 41, 49, 49]),  # 15, 14 + 15, 12 + 29, 8 + 41
    ],
)
def test_pyramids_of_constant_maps_by_hand(neck: Neck, expected: list[float]):
    levels = transparent(neck)(constant_maps(1, 2, 4, 8))
    for level, value in zip(levels, expected, strict=True):
        assert torch.equal(level, torch.full_like(level, value))


def test_bifpn_of_three_constant_levels_by_hand():
    neck = transparent(BiFPN([4] * 3, [4, 8, 16], 4, norm=None, repeats=1, extra_levels=0))
    neck.layers[0].up[0].weights.data = torch.tensor([2.0, 1.0, -5.0])  # a negative weight counts as 0
    silu = F.silu
    x, y, z = torch.tensor(1.0), torch.tensor(2.0), torch.tensor(4.0)
    half = 1 / (2 + 1e-4)
    middle = silu((y + z) * half)
    fine = silu((x + middle) * half)
    middle = silu((2 * y + middle) / (3 + 1e-4))
    coarse = silu((z + middle) * half)
    for level, value in zip(neck(constant_maps(1, 2, 4)), (fine, middle, coarse), strict=True):
        assert_close(level, value.expand_as(level), 1e-5)


def test_bifpn_takes_the_finer_level_by_its_largest_of_nine():
    neck = transparent(BiFPN([1] * 2, [4, 8], 1, norm=None, repeats=1, extra_levels=0))
    fine = torch.zeros(1, 1, 4, 4)
    fine[0, 0, 1, 1] = 6.0  # lies in the windows around (0, 0), (0, 2), (2, 0) and (2, 2)
    low, high = neck([fine, torch.zeros(1, 1, 2, 2)])
    peak = F.silu(torch.tensor(6 / (2 + 1e-4)))
    assert_close(low[0, 0, 1, 1], peak, 1e-5)
    assert low.sum() == low[0, 0, 1, 1]
    assert_close(high, F.silu(peak / (2 + 1e-4)).expand_as(high), 1e-5)


@pytest.mark.parametrize(("upsampling", "expected"), [("nearest", [0.0, 0, 4, 4]), ("bilinear", [0.0, 1, 3, 4])])
def test_top_down_upsamples_by_hand(upsampling: str, expected: list[float]):
    coarse, fine = torch.tensor([0.0, 4.0]).view(1, 1, 1, 2), torch.zeros(1, 1, 1, 4)
    merged = TopDown(upsampling=upsampling)([fine, coarse])
    assert merged[0].flatten().tolist() == expected and torch.equal(merged[1], coarse)


@pytest.mark.parametrize(
    ("method", "sixth", "seventh"),
    [
        ("subsample", [[0, -2], [-8, -10]], [[0]]),
        ("max_pool", [[0, -1], [-4, -5]], [[0]]),
        ("conv", [[0, -2], [-8, -10]], [[0]]),
    ],
)
def test_extra_levels_by_hand(method: str, sixth: list, seventh: list):
    fifth = -torch.arange(16.0).view(1, 1, 4, 4)
    levels = transparent(ExtraLevels(1, 2, method))([fifth])
    assert torch.equal(levels[0], fifth)
    assert levels[1][0, 0].tolist() == sixth and levels[2][0, 0].tolist() == seventh
    assert ExtraLevels(1, 2, method).strides((4, 8)) == (4, 8, 16, 32)


def test_a_convolution_for_the_second_extra_level_sees_the_first_through_relu():
    levels = transparent(ExtraLevels(1, 2, "conv"))([torch.full((1, 1, 4, 4), -3.0)])
    assert (levels[1] == -3).all() and (levels[2] == 0).all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TopDown(merge="max"), "neck.merge: expected sum or average, got 'max'"),
        (lambda: TopDown(upsampling="cubic"), "neck.upsampling: expected nearest or bilinear"),
        (lambda: ExtraLevels(4, -1), "neck.extra_levels: expected 0 to 16, got -1"),
        (lambda: ExtraLevels(4, 1, "pool"), "neck.extra_method: expected subsample, max_pool, conv, got 'pool'"),
        (lambda: SingleMap(*ALL, "C6"), "neck.level: expected one of C2, C3, C4, C5, got 'C6'"),
        (lambda: FeatureHierarchy(*ALL, "P3"), "neck.first: expected one of C2"),
        (
            lambda: FeatureHierarchy(*ALL, "C2", 3),
            "neck.num_levels: expected at least 4, the number of maps from C2 on, got 3",
        ),
        (lambda: BiFPN(*ALL, repeats=0), "neck.repeats: expected at least 1"),
    ],
)
def test_a_neck_refuses_what_it_cannot_be(make, words: str):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    """A detector for every word, with the same RPN and ROI head."""
    made = {}
    for word in WORDS:
        torch.manual_seed(0)
        made[word] = build_model(compose([*TINY, f"neck={word.split()[0]}", *word.split()[1:]]), 3)
    return made


@pytest.mark.parametrize("word", WORDS)
def test_one_word_changes_the_pyramid_and_all_that_follows(models, word: str):
    model, batch = models[word], make_batch(canvas=(96, 160), sizes=[(90, 160), (96, 100)])
    pyramid = model.pyramid(batch)
    assert model.neck.strides == WORDS[word]
    assert model.neck.roi_strides == WORDS[word][: len(model.neck.roi_strides)]
    for level, stride in zip(pyramid.levels, WORDS[word], strict=True):
        assert level.shape == (2, model.neck.channels, -(-96 // stride), -(-160 // stride))
    assert model.rpn.anchors.num_per_cell == (15 if len(WORDS[word]) == 1 else 3)
    assert model.rpn.head.objectness.out_channels == model.rpn.anchors.num_per_cell
    assert model.roi_head.pooler.strides == model.neck.roi_strides
    assert model.propose(batch).valid.any(dim=1).all()


@pytest.mark.parametrize("word", WORDS)
def test_every_parameter_gets_a_gradient_whatever_the_neck(models, word: str):
    for objects in ((3, 1), (0, 0)):
        for name, gradient in gradients(models[word], make_batch(objects)).items():
            assert gradient is not None and gradient.isfinite().all(), name


@pytest.mark.parametrize("word", ["finest_level", "single_map", "feature_hierarchy"])
def test_sampled_rpn_loss_equals_the_dense_one_whatever_the_neck(models, word: str):
    model, batch = models[word], make_batch(canvas=(96, 160), sizes=[(90, 160), (96, 100)])
    assert model.rpn.head.samples_loss
    results = []
    for samples_loss in (True, False):
        model.rpn.head.samples_loss = samples_loss
        results.append((model(batch, 3).terms, gradients(model, batch, 3)))
    model.rpn.head.samples_loss = True
    for mine, theirs in zip(results[0][0].values(), results[1][0].values(), strict=True):
        assert mine.item() == pytest.approx(theirs.item(), rel=1e-4)
    for name, mine in results[0][1].items():
        assert (mine - results[1][1][name]).norm() <= 1e-3 * results[1][1][name].norm() + 1e-6, name


def test_the_backbone_ends_where_nobody_reads_on(models):
    model = models["single_map model.neck.level=C4"]
    assert model.stride == 16 and model.backbone.channels == (64, 128, 256)
    assert not any(name.startswith("backbone.layer4") for name in model.state_dict())
    assert spread_out(model).detect(make_batch(canvas=(80, 112))).valid.any()  # sides that only 16 divides
