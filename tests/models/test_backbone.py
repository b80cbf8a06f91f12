from __future__ import annotations

import urllib.request
from pathlib import Path

import pytest
import torch
import torchvision
from compare import assert_close
from torchvision.models._utils import IntermediateLayerGetter

from fpn_det.models.resnet import ResNet


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_resnet_equals_torchvision(depth: int, norm: str):
    torch.manual_seed(0)
    layer = torchvision.ops.FrozenBatchNorm2d if norm == "frozen" else torch.nn.BatchNorm2d
    theirs = getattr(torchvision.models, f"resnet{depth}")(norm_layer=layer)
    mine = ResNet(depth, norm=norm)
    missing, unexpected = mine.load_state_dict(theirs.state_dict(), strict=False)
    assert not missing and set(unexpected) == {"fc.weight", "fc.bias"}
    oracle = IntermediateLayerGetter(theirs, {f"layer{i}": str(i) for i in (1, 2, 3, 4)})
    images = torch.randn(2, 3, 64, 96)
    for mode in (True, False):
        maps = mine.train(mode)(images)
        for got, expected in zip(maps, oracle.train(mode)(images).values(), strict=True):
            assert_close(got, expected, 1e-5)
        assert tuple(m.shape[1] for m in maps) == mine.channels
        assert tuple(64 // m.shape[2] for m in maps) == mine.strides


def test_resnet_deduces_norm_and_frozen_stages_from_its_weights():
    fresh, pretrained = ResNet(18), ResNet(18, weights="torchvision/IMAGENET1K_V1")
    assert (fresh.norm, fresh.frozen_stages) == ("batch", 0)
    assert (pretrained.norm, pretrained.frozen_stages) == ("frozen", 2)


@pytest.mark.parametrize("frozen", range(6))
def test_frozen_stages_get_no_gradient_and_keep_their_statistics(frozen: int):
    model = ResNet(18, frozen_stages=frozen).train()
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    maps = model(torch.randn(2, 3, 64, 64))
    if frozen < 5:
        sum(m.mean() for m in maps).backward()
    stages = [["conv1", "bn1"], ["layer1"], ["layer2"], ["layer3"], ["layer4"]]
    for number, names in enumerate(stages):
        for name, parameter in model.named_parameters():
            if name.split(".")[0] in names:
                assert (parameter.grad is None) == (number < frozen), name
        for name, value in model.named_buffers():
            if name.split(".")[0] in names:
                assert torch.equal(value, statistics[name]) == (number < frozen), name


def test_stride_can_lie_on_the_first_convolution():
    model = ResNet(50, stride_in_1x1=True)
    assert model.layer2[0].conv1.stride == (2, 2) and model.layer2[0].conv2.stride == (1, 1)
    assert [m.shape[2] for m in model(torch.zeros(1, 3, 64, 64))] == [16, 8, 4, 2]


def test_pretrained_file_is_loaded(tmp_path: Path):
    theirs = torchvision.models.resnet18()
    torch.save(theirs.state_dict(), tmp_path / "r18.pth")
    model = ResNet(18, weights=str(tmp_path / "r18.pth"))
    model.load_pretrained()
    assert torch.equal(model.layer4[1].conv2.weight, theirs.layer4[1].conv2.weight)


def test_pretrained_file_of_other_blocks_is_refused(tmp_path: Path):
    """torch raises an error of its own for tensors of another shape."""
    torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "r50.pth")
    # unexpected: conv3 and the 4 tensors of bn3 in 16 blocks, and a shortcut of as many tensors in C2; of another shape:
    # conv1 of 16 blocks, and 3 shortcuts
    words = (
        r"85 unexpected \(layer1\.0\.conv3\.weight, .*\), 31 of another shape \(layer1\.0\.conv1\.weight, .*\)\. Give"
    )
    with pytest.raises(ValueError, match=rf"^ResNet\(34\): weights .*r50.pth' do not fit: {words}"):
        ResNet(34, weights=str(tmp_path / "r50.pth")).load_pretrained()


def test_pretrained_file_with_fewer_blocks_is_refused(tmp_path: Path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "r18.pth")
    with pytest.raises(ValueError, match=r"do not fit: \d+ missing \(.*\)\. Give"):
        ResNet(34, weights=str(tmp_path / "r18.pth")).load_pretrained()


def test_missing_weights_name_the_expected_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"no file for weights at .*nowhere\.pth.*weights=null"):
        ResNet(18, weights="nowhere.pth").load_pretrained()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    with pytest.raises(ValueError, match=r"no file at .*checkpoints/resnet18-.*\.pth, and https.* put it there"):
        ResNet(18, weights="torchvision/IMAGENET1K_V1").load_pretrained()


@pytest.mark.parametrize(
    ("settings", "words"), [({"depth": 51}, "18, 34, 50, 101, got 51"), ({"frozen_stages": 6}, "0 .none. to 5")]
)
def test_resnet_refuses(settings: dict, words: str):
    with pytest.raises(ValueError, match=words):
        ResNet(**settings)


def test_a_backbone_that_ends_early_takes_the_weights_of_the_whole(tmp_path: Path):
    whole = ResNet(18)
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    model = ResNet(18, weights=str(tmp_path / "weights.pth"), frozen_stages=5)
    model.truncate(3)
    model.load_pretrained()
    assert model.channels == (64, 128, 256) and model.strides == (4, 8, 16)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    expected = whole.eval()(images := torch.randn(1, 3, 64, 64))
    for mine, theirs in zip(model.train()(images), expected[:3], strict=True):
        assert_close(mine, theirs, 1e-5)
    assert "layer4" not in "".join(model.state_dict())


@pytest.mark.parametrize("content", ["torn", "foreign", "a list"])
def test_a_damaged_file_of_weights_is_refused_in_a_sentence(tmp_path: Path, content: str):
    path = tmp_path / "weights.pth"
    if content == "a list":
        torch.save([torch.zeros(1)], path)
    elif content == "torn":
        torch.save(torchvision.models.resnet18().state_dict(), path)
        path.write_bytes(path.read_bytes()[:100_000])
    else:
        path.write_bytes(bytes(range(256)) * 20)
    with pytest.raises(ValueError, match=r"^ResNet\(18\): expected a state dict in .*weights.pth, got") as refusal:
        ResNet(18, str(path)).load_pretrained()
    assert "\n" not in str(refusal.value)
