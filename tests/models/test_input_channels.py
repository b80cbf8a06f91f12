"""Backbones and detectors for images of other channels."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from compare import assert_close
from test_detector import make_batch
from torchvision.models import resnet18

from fpn_det.interop.loading import Weights, load_weights
from fpn_det.models.box_heads import TwoLayerHead
from fpn_det.models.detector import Detector
from fpn_det.models.necks.fpn import FPN
from fpn_det.models.resnet import ResNet
from fpn_det.models.roi_head import ROIHead
from fpn_det.models.timm_backbone import TimmBackbone
from fpn_det.models.weights import widen_input
from fpn_det.structures import Batch


def make_detector(channels: int, **options) -> Detector:
    torch.manual_seed(0)
    return Detector(
        3,
        ResNet(18, in_channels=channels),
        partial(FPN, channels=16),
        roi_head=partial(ROIHead, box_head=partial(TwoLayerHead, width=32)),
        **options,
    )


def with_pixels(pixels: torch.Tensor) -> Batch:
    return Batch(pixels, *(getattr(make_batch(), name) for name in ("sizes", "original_sizes", "targets", "indices")))


def test_the_first_convolution_is_widened_by_hand():
    weight = torch.tensor([1.0, 2, 6]).view(1, 3, 1, 1)
    assert widen_input(weight, 1).flatten().tolist() == [9.0]
    assert widen_input(weight, 2).flatten().tolist() == [1.5, 3.0]
    assert widen_input(weight, 3) is weight
    assert_close(widen_input(weight, 4).flatten(), torch.tensor([0.75, 1.5, 4.5, 0.75]), 1e-6)
    assert_close(widen_input(weight, 6).flatten(), torch.tensor([0.5, 1, 3, 0.5, 1, 3]), 1e-6)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 8])
def test_it_is_widened_as_timm_does(channels):
    timm = pytest.importorskip("timm", reason="needs the extra timm")
    weight = torch.randn(8, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    assert_close(widen_input(weight, channels), timm.models.adapt_input_conv(channels, weight), 1e-6)


@pytest.mark.parametrize("channels", [1, 4, 6, 8])
def test_pretrained_weights_are_widened(tmp_path: Path, channels):
    torch.manual_seed(0)
    state = resnet18().state_dict()
    torch.save(state, tmp_path / "weights.pth")
    model = ResNet(18, str(tmp_path / "weights.pth"), in_channels=channels).eval()
    model.load_pretrained()
    assert model.norm == "frozen" and model.frozen_stages == 0 and model.conv1.weight.requires_grad
    assert_close(model.conv1.weight, widen_input(state["conv1.weight"], channels), 1e-6)
    if channels % 3 == 0 or channels == 1:  # equal channels, as of a grey image
        rgb = ResNet(18, str(tmp_path / "weights.pth")).eval()
        rgb.load_pretrained()
        grey = torch.randn(1, 1, 64, 64)
        for found, expected in zip(
            model(grey.expand(1, channels, 64, 64)), rgb(grey.expand(1, 3, 64, 64)), strict=True
        ):
            assert_close(found, expected, 1e-4)


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "convnext_atto", "resnet18"])
def test_backbones_of_timm_take_other_channels(name, tmp_path: Path):
    timm = pytest.importorskip("timm", reason="needs the extra timm")
    torch.manual_seed(0)
    state = timm.create_model(name).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    model = TimmBackbone(name, str(tmp_path / "weights.pth"), in_channels=5)
    model.load_pretrained()
    assert model.frozen_stages == 0
    first = next(weight for weight in model.parameters() if weight.dim() == 4)
    stem = next(weight for weight in state.values() if weight.dim() == 4)
    assert_close(first, widen_input(stem, 5), 1e-6)
    maps = model(torch.randn(1, 5, 64, 64))
    assert [found.shape[2] for found in maps] == [16, 8, 4, 2]


def test_the_normalization_is_by_channel():
    model = make_detector(4, pixel_mean=(10.0, 20.0, 30.0, 40.0), pixel_std=(1.0, 2.0, 3.0, 4.0))
    pixels = torch.full((2, 4, 96, 128), 50, dtype=torch.uint16)
    found = model.normalize(with_pixels(pixels))
    assert found[0, :, 0, 0].tolist() == pytest.approx([40, 15, 20 / 3, 2.5])
    assert torch.equal(found, model.normalize(with_pixels(pixels.float())))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_losses_and_detections_of_other_channels(dtype):
    model = make_detector(5, pixel_mean=(100.0,) * 5, pixel_std=(50.0,) * 5)
    batch = with_pixels(torch.randint(0, 250, (2, 5, 96, 128)).to(dtype))
    losses = model.train()(batch, 0)
    losses.total().backward()
    assert model.backbone.conv1.weight.grad.abs().sum() > 0
    assert model.eval().detect(batch).boxes.shape[2] == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pixel_mean": (1.0, 2.0, 3.0), "pixel_std": (1.0,) * 3}, "model.pixel_mean: expected 4 values, one for each channel, got 3"),
        ({"pixel_mean": (1.0,) * 4}, "model.pixel_mean: expected with model.pixel_std, got one of them"),
        ({"channel_order": "bgr"}, "model.channel_order: expected rgb for 4 channels, got bgr"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_the_channels_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        make_detector(4, **options)


def test_without_a_mean_and_for_other_images_nothing_is_computed():
    with pytest.raises(ValueError, match="expected mean and deviation of 4 channels, got none"):
        make_detector(4)(with_pixels(torch.zeros(2, 4, 96, 128)), 0)
    model = make_detector(4, pixel_mean=(0.0,) * 4, pixel_std=(1.0,) * 4)
    with pytest.raises(ValueError, match="expected images of 4 channels, got 3"):
        model(make_batch(), 0)


def test_a_detector_of_three_channels_starts_one_of_four():
    rgb, model = make_detector(3), make_detector(4)
    state = {name: value + 1 for name, value in rgb.state_dict().items()}
    report = load_weights(model, Weights(state, ("a", "b", "c"), "file", "fpn_det"), ("a", "b", "c"))
    assert "backbone.conv1.weight is adapted from 3 channels to 4" in report.remarks
    assert_close(model.backbone.conv1.weight, widen_input(state["backbone.conv1.weight"], 4), 1e-6)
    assert torch.equal(model.backbone.layer1[0].conv1.weight, state["backbone.layer1.0.conv1.weight"])
