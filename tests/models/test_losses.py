"""Losses against torchvision's, and against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from compare import assert_close
from tiny import SCRATCH
from torch import Tensor
from torchvision.ops import (
    box_iou,
    complete_box_iou_loss,
    distance_box_iou_loss,
    generalized_box_iou_loss,
    sigmoid_focal_loss,
)

from fpn_det.boxes import BoxCoder
from fpn_det.composition import compose
from fpn_det.models.losses import (
    BinaryCrossEntropy,
    CIoU,
    CrossEntropy,
    DIoU,
    Focal,
    GIoU,
    IoU,
    SmoothL1,
    WeightedCrossEntropy,
)

CODER = BoxCoder((10.0, 10.0, 5.0, 5.0))


def log_iou_loss(boxes: Tensor, gt_boxes: Tensor) -> Tensor:
    return -box_iou(boxes, gt_boxes).diagonal().clamp(min=1e-6).log()


ORACLES = {
    IoU: log_iou_loss,
    GIoU: generalized_box_iou_loss,
    DIoU: distance_box_iou_loss,
    CIoU: complete_box_iou_loss,
}


def random_boxes(number: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(number, 2, generator=generator) * 50
    return torch.cat([corner, corner + 5 + torch.rand(number, 2, generator=generator) * 60], dim=1)


@pytest.mark.parametrize("loss", ORACLES)
def test_overlap_losses_and_their_gradients_equal_torchvision(loss):
    references, gt_boxes = random_boxes(500, 0), random_boxes(500, 1)
    results = []
    for function in (loss(weight=1.0), lambda *them: ORACLES[loss](CODER.decode(them[0], them[2]), them[1])):
        deltas = torch.randn(500, 4, generator=torch.Generator().manual_seed(2)).requires_grad_()
        values = function(deltas, gt_boxes, references, CODER)
        (gradient,) = torch.autograd.grad(values.sum(), deltas)
        results.append((values, gradient))
    for own, other in zip(*results, strict=True):
        assert_close(own, other, 1e-5)
    assert (box_iou(references, gt_boxes).diagonal() == 0).any()  # among the boxes are some apart


@pytest.mark.parametrize("loss", ORACLES)
def test_overlap_losses_are_zero_at_the_ground_truth_and_scale_with_their_weight(loss):
    references, gt_boxes = random_boxes(50, 0), random_boxes(50, 1)
    perfect = CODER.encode(gt_boxes, references)
    assert loss()(perfect, gt_boxes, references, CODER).abs().max() < 1e-4
    deltas = torch.zeros(50, 4)
    assert_close(
        loss(7.0)(deltas, gt_boxes, references, CODER), 7 * loss(1.0)(deltas, gt_boxes, references, CODER), 1e-6
    )


def test_overlap_losses_by_hand():
    # a box of 10 x 10 and its copy shifted right by 5: intersection 50, union 150, enclosing box 15 x 10
    box, shifted = torch.tensor([0.0, 0, 10, 10]), torch.tensor([5.0, 0, 15, 10])
    assert IoU(1.0).of_boxes(box, shifted).item() == pytest.approx(math.log(3), rel=1e-5)
    assert GIoU(1.0).of_boxes(box, shifted).item() == pytest.approx(2 / 3, rel=1e-5)  # nothing is left uncovered
    assert DIoU(1.0).of_boxes(box, shifted).item() == pytest.approx(2 / 3 + 25 / (15**2 + 10**2), rel=1e-5)
    # a box of 10 x 10 within one of 20 x 10 with the same center: IoU 1/2
    narrow, wide = torch.tensor([5.0, 0, 15, 10]), torch.tensor([0.0, 0, 20, 10])
    difference = 4 / math.pi**2 * (math.atan(2) - math.pi / 4) ** 2
    expected = 0.5 + difference**2 / (0.5 + difference)
    assert CIoU(1.0).of_boxes(narrow, wide).item() == pytest.approx(expected, rel=1e-5)
    # apart by 10: the enclosing box has 30 x 10, of which 100 are not covered
    apart = torch.tensor([20.0, 0, 30, 10])
    assert GIoU(1.0).of_boxes(box, apart).item() == pytest.approx(1 + 1 / 3, rel=1e-5)


@pytest.mark.parametrize("loss", [*ORACLES, SmoothL1])
def test_gradients_are_finite_at_extreme_boxes(loss):
    references = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1e-3, 1e3], [100, 100, 101, 101], [0, 0, 1, 1]])
    gt_boxes = torch.tensor([[0.0, 0, 1, 1], [0, 0, 800, 800], [0, 0, 1, 1], [0, 0, 1, 1]])
    deltas = torch.tensor([[0.0] * 4, [100.0] * 4, [-300.0] * 4, [0, 0, -700, -700]]).requires_grad_()
    values = loss()(deltas, gt_boxes, references, CODER)
    values.sum().backward()
    assert values.isfinite().all() and deltas.grad.isfinite().all()


def test_smooth_l1_by_hand():
    reference, gt_box = torch.tensor([0.0, 0, 10, 10]), torch.tensor([1.0, 0, 11, 10])  # shifted by a tenth
    deltas = torch.zeros(4)
    assert SmoothL1(0.0)(deltas, gt_box, reference, CODER).item() == pytest.approx(1.0)
    assert SmoothL1(2.0)(deltas, gt_box, reference, CODER).item() == pytest.approx(0.5 * 1.0 / 2.0)


def test_focal_loss_equals_torchvision_and_cross_entropy_at_gamma_0():
    logits = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 4
    positive = torch.arange(40) % 3 == 0
    expected = sigmoid_focal_loss(logits, positive.float(), 0.3, 1.5)
    assert_close(Focal(0.3, 1.5, 2.0)(logits, positive), 2 * expected, 1e-6)
    assert_close(2 * Focal(0.5, 0.0)(logits, positive), BinaryCrossEntropy()(logits, positive), 1e-6)
    # probability 0.8 of being an object: a positive costs 0.25 * 0.2^2 * -log 0.8
    logit = torch.tensor([math.log(4.0)])
    assert Focal()(logit, torch.tensor([True])).item() == pytest.approx(-0.25 * 0.04 * math.log(0.8), rel=1e-5)


def test_class_weights_by_hand():
    logits, labels = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0]]), torch.tensor([0, 2])
    plain = CrossEntropy()(logits, labels)
    weighted = WeightedCrossEntropy((3.0, 1.0, 0.5))(logits, labels)
    assert_close(weighted, plain * torch.tensor([3.0, 0.5]), 1e-6)
    assert_close(WeightedCrossEntropy((1.0,) * 3, 0.2)(logits, labels), CrossEntropy(0.2)(logits, labels), 1e-6)


def test_label_smoothing_by_hand():
    # uniform logits cost log(K + 1) whatever the target; a logit of 1 for the label saves 1 - 0.1 * (1 - 1/3)
    loss = CrossEntropy(label_smoothing=0.1)
    assert loss(torch.zeros(1, 3), torch.tensor([1])).item() == pytest.approx(math.log(3), rel=1e-6)
    expected = math.log(math.e + 2) - (0.9 + 0.1 / 3)
    assert loss(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([1])).item() == pytest.approx(expected, rel=1e-6)


def test_class_weights_of_another_number_of_classes_are_refused():
    words = ["cls_loss@model.roi_head.cls_loss=weighted_cross_entropy", "model.roi_head.cls_loss.class_weights=[1,2]"]
    config = compose([*SCRATCH, *words])
    with pytest.raises(ValueError, match=r"class_weights: expected 4 weights, one for each class .*, got 2\."):
        config.build_model(3)


@pytest.mark.parametrize("name", ["l1", "smooth_l1", "smooth_l1_ninth", "iou", "giou", "diou", "ciou"])
def test_box_losses_are_chosen_by_name_in_both_stages(name: str):
    words = [f"box_loss@model.{stage}.box_loss={name}" for stage in ("rpn", "roi_head")]
    model = compose([*SCRATCH, *words]).build_model(3)
    kind = SmoothL1 if "l1" in name else {one.__name__.lower(): one for one in ORACLES}[name]
    assert type(model.rpn.box_loss) is kind and type(model.roi_head.box_loss) is kind


@pytest.mark.parametrize("experiment", ["paper/table3_c", "compat/torchvision_r50_fpn"])
def test_a_box_loss_replaces_that_of_an_experiment(experiment: str):
    config = compose([f"experiment={experiment}", "box_loss@model.rpn.box_loss=giou"])
    assert type(config.build_model(3).rpn.box_loss) is GIoU
    changed = compose([f"experiment={experiment}", "model.rpn.box_loss.beta=0.5"])
    assert changed.build_model(3).rpn.box_loss == SmoothL1(0.5)


def test_classification_losses_are_chosen_by_name():
    words = ["objectness_loss@model.rpn.cls_loss=focal", "model.rpn.cls_loss.gamma=1.5"]
    words += ["cls_loss@model.roi_head.cls_loss=cross_entropy", "model.roi_head.cls_loss.label_smoothing=0.1"]
    model = compose([*SCRATCH, *words]).build_model(3)
    assert model.rpn.cls_loss == Focal(gamma=1.5) and model.roi_head.cls_loss == CrossEntropy(0.1)
