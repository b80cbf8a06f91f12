from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from compare import assert_close

from fpn_det.benchmark.config import BenchmarkConfig
from fpn_det.benchmark.contestants import Ours, Torchvision, make_contestants
from fpn_det.benchmark.loader_memory import loader_growth_mib
from fpn_det.benchmark.measures import Counter, alternate, count, peak_memory_mib
from fpn_det.cli.arguments import fit_words

CPU = torch.device("cpu")
FEW = [
    "model.backbone.depth=18",
    "model.rpn.train_filter.post_nms=50",
    "model.rpn.test_filter.post_nms=50",
    "model.roi_head.sampler.num_samples=16",
]
SMALL = BenchmarkConfig(size=(64, 96), repeats=1, overrides=tuple(FEW))


@pytest.fixture(scope="module")
def contestants() -> tuple[Ours, Torchvision]:
    return make_contestants(SMALL, CPU)


def test_setting_reads_the_command_line():
    setting = fit_words(
        ["only=train,inference", "size=[64,96]", "repeats=2", "nms=batched", "compile=true"], BenchmarkConfig
    )
    assert setting.only == ("train", "inference") and setting.size == (64, 96) and setting.repeats == 2
    assert setting.nms == "batched" and setting.compile and setting.batch_size == 2


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("repeat=3", "Did you mean repeats?"),
        ("repeats=many", "repeats: expected a whole number, got 'many'"),
        ("repeats=0", "repeats: expected a whole number at least 1, got 0"),
        ("only=training", "Did you mean train?"),
        ("nms=fast", "nms: expected one of auto, torchvision or batched"),
        ("train", "expected name=value, got 'train'"),
        ("model.rpn.head.sample_loss=false", "Did you mean model.rpn.head.sampled_loss?"),
    ],
)
def test_setting_refuses(word, words):
    with pytest.raises(ValueError) as refusal:
        fit_words([word], BenchmarkConfig).compose()
    assert words in str(refusal.value)


def test_images_that_torchvision_does_not_take_are_refused():
    with pytest.raises(ValueError, match="data.channels: expected RGB pictures, .* got 8 channels of 16 bits"):
        BenchmarkConfig(overrides=("data.channels=8", "data.dtype=uint16")).compose()


def test_contestants_compute_the_same_maps_and_scores(contestants):
    ours, peer = (contestant.model.eval() for contestant in contestants)
    with torch.no_grad():
        levels = ours.pyramid(contestants[0].batch).levels
        images, _ = peer.transform(contestants[1].images)
        features = list(peer.backbone(images.tensors).values())
        for level, feature in zip(levels, features, strict=True):
            assert_close(level, feature, 1e-4)
        logits, deltas = ours.rpn.head(levels)
        peer_logits, peer_deltas = peer.rpn.head(features)
        # [B, A, H, W] -> [B, H*W*A]
        assert_close(logits, torch.cat([x.permute(0, 2, 3, 1).flatten(1) for x in peer_logits], 1), 1e-4)
        assert_close(deltas.flatten(1), torch.cat([x.permute(0, 2, 3, 1).flatten(1) for x in peer_deltas], 1), 1e-4)
        pooled = torch.rand(4, 256, 7, 7)
        logits, deltas = ours.roi_head.predictor(ours.roi_head.box_head(pooled))
        peer_logits, peer_deltas = peer.roi_heads.box_predictor(peer.roi_heads.box_head(pooled))
        assert_close(logits.roll(1, dims=1), peer_logits, 1e-4)  # background is theirs first
        assert_close(deltas.flatten(1), peer_deltas[:, 4:], 1e-4)


def test_contestants_have_as_much_to_do(contestants):
    losses, detections = [], []
    for contestant in contestants:
        contestant.model.train()
        losses.append(contestant.loss().item())
        contestant.model.eval()
        with torch.no_grad():
            detections.append(sum(contestant.detect()))
    # anchors differ by rounding and samples by chance
    assert losses[0] == pytest.approx(losses[1], rel=0.25)
    assert detections[0] > 10 and detections[0] == pytest.approx(detections[1], rel=0.25)


def test_contestants_train_the_same_parameters(contestants):
    for contestant in contestants:
        contestant.train()()
    numbers = [
        sum(p.grad.numel() for p in contestant.model.parameters() if p.grad is not None) for contestant in contestants
    ]
    background = 4 * 1024 + 4  # torchvision keeps box deltas of the background
    assert numbers[0] == numbers[1] - background


@pytest.mark.parametrize("part", ["train", "inference", "roi_align", "rpn_loss", "nms"])
def test_contestants_run_every_part(contestants, part):
    runs = [getattr(contestant, part)() for contestant in contestants]
    assert all(seconds > 0 for seconds in alternate(runs, 1, CPU))


def test_contestants_suppress_the_same_boxes(contestants):
    keep, kept = (contestant.nms()() for contestant in contestants)
    # [B * LEVELS, PROPOSALS] -> [B, LEVELS * PROPOSALS]
    for mask, idxs in zip(keep.view(len(kept), -1), kept, strict=True):
        assert mask.nonzero().flatten().tolist() == sorted(idxs.tolist()) and not mask.all()


def test_a_captured_step_is_an_ordinary_one_without_a_gpu(capsys):
    ours, _ = make_contestants(replace(SMALL, capture=True), CPU)
    before = ours.model.roi_head.box_head.fc2.weight.clone()
    ours.train()()
    assert "CUDA graphs need a GPU" in capsys.readouterr().out
    change = (ours.model.roi_head.box_head.fc2.weight - before).abs().max()
    assert 0 < change < 1e-3  # the weights stay calibrated


@pytest.mark.parametrize(("precision", "allowed"), [("tf32", True), ("fp32", False)])
def test_precision_holds_for_both_contestants(precision, allowed):
    make_contestants(replace(SMALL, precision=precision), CPU)
    assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == allowed


def test_counter_counts_what_the_host_waits_for():
    values, mask = torch.arange(6.0), torch.arange(6) % 2 == 0
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]])

    def reads(run) -> int:
        with Counter() as counter:
            run()
        return counter.host_reads

    assert reads(lambda: values.sum().item()) == 1
    assert reads(lambda: bool(mask.any())) == 1
    assert reads(lambda: mask.nonzero()) == 1
    assert reads(lambda: torch.where(mask)) == 1
    assert reads(lambda: values[mask]) == 1
    assert reads(lambda: values.masked_select(mask)) == 1
    assert reads(lambda: values.unique()) == 1
    assert reads(lambda: torch.equal(values, values)) == 1
    assert reads(lambda: values.repeat_interleave(mask.long())) == 1
    assert reads(lambda: torchvision.ops.nms(boxes, values[:1], 0.5)) == 1
    assert reads(lambda: values[mask.long()]) == 0
    assert reads(lambda: values.repeat_interleave(2)) == 0
    assert reads(lambda: torch.where(mask, values, 0.0)) == 0
    assert reads(lambda: values.clone().__setitem__(mask, 0.0)) == 0  # a fill
    assert reads(lambda: values.clone().__setitem__(mask, values[:3])) == 1


def test_counter_sees_the_backward_pass():
    weight = torch.ones(2, requires_grad=True)
    loss = weight.exp().sum()
    with Counter() as counter:
        loss.backward()
    assert counter.operators >= 2


@pytest.mark.parametrize(("nms", "limit"), [("auto", 2 * 5), ("batched", 9)])
def test_training_step_reads_little(contestants, nms, limit):
    torchvision_reads = count(contestants[1].train()).host_reads
    ours = contestants[0] if nms == "auto" else make_contestants(replace(SMALL, nms=nms), CPU)[0]
    assert count(ours.train()).host_reads <= limit < torchvision_reads


def test_benchmark_writes_what_it_shows(tmp_path, run_tool):
    output = tmp_path / "benchmark.json"
    quick = ["size=[64,96]", "repeats=1", "num_workers=0", "data.train_transforms.resize.sides=[64]"]
    words = ["only=inference,loader", *quick, *FEW, f"output={output}"]
    shown, written = run_tool("benchmark.py", *words).stdout, json.loads(output.read_text())
    loaders = {"loader_images_per_s", "loader_resize_on_device_images_per_s", "loader_decoded_images_per_s"}
    assert written.keys() == {"inference_s", *loaders, "setting"}
    for measure in ("inference_s", *loaders):
        row = written[measure]
        assert row["ratio"] == pytest.approx(row["ours"] / row["torchvision"]) and measure in shown
    assert written["setting"]["size"] == [64, 96] and written["setting"]["torch"] == torch.__version__


@pytest.mark.slow
def test_peak_memory_is_more_than_the_weights():
    weights = 4 * 12544 * 1024 / 2**20
    assert all(peak > weights for peak in peak_memory_mib(SMALL))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="no PSS")
def test_workers_share_the_annotations():
    growth = loader_growth_mib()
    # 100,000 images with 7 objects of 57 bytes each, and their paths
    assert growth["none"] > 99_900 * 7 * 57 / 2**20
    assert growth["fork"] < 1.2 * growth["none"] and growth["spawn"] < 1.2 * growth["none"]
