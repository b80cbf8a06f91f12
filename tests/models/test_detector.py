from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from compare import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from fpn_det.models.anchors import AnchorGenerator
from fpn_det.models.box_heads import TwoLayerHead
from fpn_det.models.detector import Detector
from fpn_det.models.matching import ProposalSampler
from fpn_det.models.necks.fpn import FPN
from fpn_det.models.resnet import ResNet
from fpn_det.models.roi_head import BoxPredictor, ROIHead
from fpn_det.models.rpn import RPN, RPNHead
from fpn_det.models.selection import DetectionFilter, ProposalFilter
from fpn_det.structures import Batch, Pyramid, Targets


def make_model(
    num_classes: int = 3,
    norm: str = "frozen",
    frozen_stages: int = 0,
    rpn: dict | None = None,
    roi_head: dict | None = None,
):
    torch.manual_seed(0)
    filters = {"train_filter": ProposalFilter(200, 100), "test_filter": ProposalFilter(100, 50)}
    return Detector(
        num_classes,
        ResNet(18, norm=norm, frozen_stages=frozen_stages),
        partial(FPN, channels=32),
        partial(RPN, anchors=partial(AnchorGenerator, sizes=[16, 32, 64, 128, 256]), **{**filters, **(rpn or {})}),
        partial(ROIHead, box_head=partial(TwoLayerHead, width=64), **(roi_head or {})),
    )


def make_batch(
    objects: tuple[int, ...] = (3, 1), canvas: tuple[int, int] = (96, 128), sizes: list | None = None
) -> Batch:
    generator = torch.Generator().manual_seed(1)
    boxes, labels = [], []
    for number in objects:
        corner = torch.rand(number, 2, generator=generator) * 40
        boxes.append(torch.cat([corner, corner + 10 + torch.rand(number, 2, generator=generator) * 40], dim=1))
        labels.append(torch.randint(0, 3, (number,), generator=generator))
    size = torch.tensor(sizes or [canvas] * len(objects))
    pixels = torch.randint(0, 256, (len(objects), 3, *canvas), dtype=torch.uint8, generator=generator)
    return Batch(pixels, size, size, Targets.pad(boxes, labels), torch.arange(len(objects)) + 10)


def gradients(model: Detector, batch: Batch, step: int = 0, autocast: bool = False) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = model(batch, step)
    losses.total().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("objects", [(3, 1), (2, 0), (0, 0)])
def test_every_trainable_parameter_gets_a_gradient_and_no_frozen_one(objects: tuple[int, ...], autocast: bool):
    model = make_model(norm="batch", frozen_stages=2)
    for name, gradient in gradients(model, make_batch(objects), autocast=autocast).items():
        frozen = name.startswith(("backbone.conv1", "backbone.bn1", "backbone.layer1"))
        assert (gradient is None) == frozen, name
        assert gradient is None or gradient.isfinite().all(), name


@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 1e-5), (True, 1e-2)])
def test_sampled_rpn_loss_has_the_gradients_of_the_dense_one(autocast: bool, tolerance: float):
    sampled = make_model()
    dense = make_model(rpn={"head": partial(RPNHead, sampled_loss=False)})
    dense.load_state_dict(sampled.state_dict())
    assert sampled.rpn.head.samples_loss and not dense.rpn.head.samples_loss
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 32, 96 // s, 128 // s, generator=generator).relu() for s in (4, 8, 16, 32)]
    maps.append(torch.randn(2, 32, 2, 2, generator=generator).relu())
    batch, results = make_batch(), []
    for model in (sampled, dense):
        leaves = [level.clone().requires_grad_() for level in maps]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            pyramid = Pyramid(leaves, (4, 8, 16, 32, 64), batch.sizes)
            losses = model.rpn.losses(model.rpn(pyramid), pyramid, batch, step=3)
        grads = torch.autograd.grad(losses.total(), [*leaves, *model.rpn.parameters()])
        results.append((losses, grads))
    for name, value in results[0][0].terms.items():
        assert value.item() == pytest.approx(results[1][0].terms[name].item(), rel=max(tolerance, 1e-5))
    for mine, theirs in zip(results[0][1], results[1][1], strict=True):
        assert (mine - theirs).norm() <= tolerance * theirs.norm()


def test_rpn_with_two_convolutions_takes_the_dense_path():
    model = make_model(rpn={"head": partial(RPNHead, num_convs=2)})
    assert not model.rpn.head.samples_loss
    assert all(gradient is not None for gradient in gradients(model, make_batch()).values())


@pytest.mark.parametrize("mode", [True, False])
def test_forward_gives_losses_and_detect_gives_detections_in_any_mode(mode: bool):
    model, batch = make_model(norm="batch").train(mode), make_batch()
    assert set(model(batch, 0).terms) == {"rpn_objectness", "rpn_box", "roi_class", "roi_box"}
    detections = model.detect(batch)
    assert detections.boxes.shape == (2, 100, 4) and detections.scores.shape == (2, 100)
    assert (detections.scores.diff(dim=1) <= 0).all()


def test_losses_depend_on_the_step_only_through_the_samples():
    model, batch = make_model(), make_batch()
    first, again, other = (model(batch, step).total() for step in (5, 5, 6))
    assert first == again and first != other


def spread_out(model: Detector) -> Detector:
    """Scores and boxes that differ, as after training."""
    with torch.no_grad():
        for layer, factor in (
            (model.rpn.head.objectness, 30),
            (model.rpn.head.deltas, 5),
            (model.roi_head.predictor.class_logits, 60),
        ):
            layer.weight.mul_(factor)
    return model.eval()


def test_bytes_in_the_padding_change_nothing():
    model = spread_out(make_model())
    batch = make_batch(sizes=[(90, 100), (64, 128)])
    noisy = batch.pixels.clone()
    noisy[0, :, 90:], noisy[0, :, :, 100:], noisy[1, :, 64:] = 255, 7, 99
    noisy = replace(batch, pixels=noisy)
    for name, value in model(batch, 0).terms.items():
        assert value == model(noisy, 0).terms[name]
    mine, theirs = model.detect(batch), model.detect(noisy)
    assert mine.valid.any() and torch.equal(mine.boxes, theirs.boxes) and torch.equal(mine.scores, theirs.scores)


def image_of(batch: Batch, row: int) -> Batch:
    one = slice(row, row + 1)
    targets = Targets(batch.targets.boxes[one], batch.targets.labels[one], batch.targets.valid[one])
    return Batch(batch.pixels[one], batch.sizes[one], batch.original_sizes[one], targets, batch.indices[one])


def test_an_image_on_an_equal_canvas_is_the_same_alone_and_in_a_batch():
    model = spread_out(make_model())
    batch = make_batch(sizes=[(90, 100), (64, 128)])
    for row, together in enumerate(model.detect(batch).images()):
        alone = next(iter(model.detect(image_of(batch, row)).images()))
        assert len(alone[0]) == len(together[0]) > 5
        # scores that differ by rounding may change places, so compare each detection with its like
        rows = [
            torch.cat([boxes, scores[:, None], 1e3 * labels[:, None]], dim=1)
            for boxes, scores, labels in (alone, together)
        ]
        assert torch.cdist(*rows, compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1).max() < 1e-3
    together = torch.stack(list(model(batch, 2).terms.values()))
    separate = torch.stack([torch.stack(list(model(image_of(batch, row), 2).terms.values())) for row in range(2)])
    assert_close(together, separate.mean(0), 1e-4)


def test_anchors_in_the_padding_are_neither_sampled_nor_proposed():
    model = spread_out(make_model())
    batch = make_batch(sizes=[(96, 128), (33, 32)])
    output = model.rpn(model.pyramid(batch))
    centers = (output.anchors[:, :2] + output.anchors[:, 2:]) / 2
    # (33, 32) rounds up to (64, 32)
    assert torch.equal(output.inside[1], (centers[:, 0] < 32) & (centers[:, 1] < 64))
    assert output.inside[0].all()
    match = model.rpn.matcher(batch.targets, output.anchors, output.inside)
    sample = model.rpn.sampler(match, batch.indices, 0)
    assert output.inside.gather(1, sample.idxs)[sample.valid].all()


def test_detections_lie_in_the_image_and_follow_the_settings():
    model, batch = (
        spread_out(make_model(roi_head={"test_filter": DetectionFilter(max_detections=7)})),
        make_batch(sizes=[(90, 100), (64, 128)]),
    )
    detections = model.detect(batch)
    assert detections.boxes.shape[1] == 7
    for (boxes, scores, _), (height, width) in zip(detections.images(), batch.sizes.tolist(), strict=True):
        assert (boxes >= 0).all() and (boxes[:, [0, 2]] <= width).all() and (boxes[:, [1, 3]] <= height).all()
        assert (scores > 0.05).all()


def test_batched_suppression_gives_the_same_losses_and_detections():
    plain = spread_out(make_model())
    batched = copy.deepcopy(plain)
    for stage, name in ((batched.rpn, "train_filter"), (batched.rpn, "test_filter"), (batched.roi_head, "test_filter")):
        setattr(stage, name, replace(getattr(stage, name), nms_method="batched"))
    batch = make_batch()
    assert plain(batch, 0).total() == batched(batch, 0).total()
    assert torch.equal(plain.detect(batch).boxes, batched.detect(batch).boxes)


def test_class_agnostic_boxes_have_four_deltas():
    model = make_model(roi_head={"predictor": partial(BoxPredictor, class_agnostic=True)})
    assert model.roi_head.predictor.box_deltas.weight.shape[0] == 4
    assert all(gradient is not None for gradient in gradients(model, make_batch()).values())
    assert spread_out(model).detect(make_batch()).valid.any()


def test_losses_of_two_classes_by_hand():
    # uniform logits over K + 1 = 4 classes cost log 4 per RoI, however many are positive
    model = make_model()
    model.roi_head.predictor.class_logits.weight.data.zero_()
    model.roi_head.sampler = ProposalSampler(20)  # fewer than there are, so that all slots are used
    assert model(make_batch(), 0).terms["roi_class"].item() == pytest.approx(torch.tensor(4.0).log().item(), rel=1e-5)


class HostReads(TorchDispatchMode):
    """Count the operators whose result the host has to wait for."""

    NAMES = ("nonzero", "_local_scalar_dense", "masked_select", "unique", "nms", "equal", "item")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        bool_index = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self.count += bool_index or any(name.startswith(word) for word in self.NAMES)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("images", [1, 2, 4])
def test_training_step_reads_five_results_per_image_on_cpu(images: int):
    model, batch = make_model(), make_batch((2,) * images)
    with HostReads() as reads:
        model(batch, 0).total().backward()
    assert reads.count == 5 * images  # one suppression per level


def test_training_step_reads_a_handful_of_results_with_batched_suppression():
    model, batch = (
        make_model(rpn={"train_filter": ProposalFilter(200, 100, nms_method="batched")}),
        make_batch((2,) * 16),
    )
    with HostReads() as reads:
        model(batch, 0).total().backward()
    assert 1 <= reads.count <= 9
