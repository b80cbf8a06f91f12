"""Dynamic R-CNN: its two statistics by hand, and that they are kept, undone and left alone where they should be."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from compare import assert_close
from test_detector import make_batch, make_model

from fpn_det.models.box_heads import TwoLayerHead
from fpn_det.models.dynamic import DynamicROIHead, Dynamics
from fpn_det.models.losses import SmoothL1
from fpn_det.models.roi_head import SampledBoxes
from fpn_det.structures import Proposals, Sample, Targets
from fpn_det.training.optimization import Optimization
from fpn_det.training.optimizers import SGD
from fpn_det.training.schedule import MultiStep


def make_dynamic(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    model = make_model()
    model.roi_head = DynamicROIHead(32, (4, 8, 16, 32), box_head=partial(TwoLayerHead, width=64), **options)
    model.reset_classifier(3)
    return model


def test_values_follow_the_mean_iou_and_the_median_error_of_an_interval():
    dynamics, has = Dynamics(0.4, 1.0, 3), torch.tensor(True)
    for step, (iou, beta) in enumerate([(0.5, 0.7), (0.6, 0.2), (0.7, 0.3)]):
        dynamics.begin(step)
        assert (dynamics.iou.item(), dynamics.beta.item()) == pytest.approx((0.4, 1.0))
        dynamics.add(torch.tensor(iou), torch.tensor(beta), has, step)
    dynamics.begin(3)
    assert (dynamics.iou.item(), dynamics.beta.item()) == pytest.approx((0.6, 0.3))
    # worse proposals do not lower the IoU below the first one, and without positives beta stays
    for step in range(3, 6):
        dynamics.begin(step)
        dynamics.add(torch.tensor(0.1), torch.tensor(9.0), torch.tensor(False), step)
    dynamics.begin(6)
    assert (dynamics.iou.item(), dynamics.beta.item()) == pytest.approx((0.4, 0.3))


def test_micro_batches_of_a_step_are_averaged():
    dynamics, has = Dynamics(0.0, 1.0, 2), torch.tensor(True)
    for step, values in enumerate([(0.2, 0.4), (0.6, 0.8)]):
        for value in values:
            dynamics.begin(step)
            dynamics.add(torch.tensor(value), torch.tensor(value), has, step)
    dynamics.begin(torch.tensor(2))  # as a compiled graph gives it
    assert (dynamics.iou.item(), dynamics.beta.item()) == pytest.approx((0.5, (0.3 + 0.7) / 2))


def test_what_is_gathered_by_hand():
    head = make_dynamic(iou_rank=2, beta_rank=1).roi_head
    targets = Targets.pad([torch.tensor([[0.0, 0, 40, 40]])] * 2, [torch.tensor([0])] * 2)
    # shifted right by 8, 10 and 30: IoU 2/3, 0.6 and 1/7; the ground truth itself joins with IoU 1
    boxes = torch.tensor([[8.0, 0, 48, 40], [10, 0, 50, 40], [30, 0, 70, 40]]).expand(2, 3, 4)
    proposals = Proposals(boxes, torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool))
    assert head.iou_of_rank(proposals, targets).item() == pytest.approx(2 / 3)
    # errors 10 * 8 / 40 / 2 = 1 and 1.25 in each image: number 1 * B = 2 of 1, 1, 1.25, 1.25
    positive = torch.tensor([[True, True, False]] * 2)
    sample = Sample(torch.arange(3).expand(2, 3), positive, torch.ones(2, 3, dtype=torch.bool))
    gt_boxes = targets.boxes[:, :1].expand(2, 3, 4)
    error, has = head.error_of_rank(SampledBoxes(boxes, gt_boxes, torch.zeros(2, 3).long(), sample))
    assert error.item() == pytest.approx(1.0) and has
    head.beta_rank = 5  # more than there are: the largest
    assert head.error_of_rank(SampledBoxes(boxes, gt_boxes, torch.zeros(2, 3).long(), sample))[
        0
    ].item() == pytest.approx(1.25)
    match = head.match(targets, boxes, torch.ones(2, 3, dtype=torch.bool))
    assert match.positive[0].tolist() == [True, True, False] and match.negative[0].tolist() == [False, False, True]
    head.dynamics.iou.fill_(0.65)
    assert head.match(targets, boxes, torch.ones(2, 3, dtype=torch.bool)).positive[0].tolist() == [True, False, False]


def test_loss_is_smooth_l1_with_the_present_beta():
    head = make_dynamic().roi_head
    head.dynamics.beta.fill_(0.3)
    deltas, boxes = torch.randn(20, 4), make_batch((8, 8)).targets.boxes.flatten(0, 1)[:16]
    arguments = deltas[:16], boxes, boxes.roll(1, 0), head.predictor.coder
    assert_close(head.smooth_l1(*arguments), SmoothL1(0.3)(*arguments), 1e-6)


def test_a_bad_step_and_an_evaluation_leave_the_statistics_alone():
    model, batch = make_dynamic(interval=2), make_batch()
    optimization = Optimization(
        model.train(), SGD(lr=0.01).build(model, 2), MultiStep(steps=9, milestones=(), warmup_steps=0)
    )
    optimization.step([batch], 0)
    kept = {name: buffer.clone() for name, buffer in model.roi_head.dynamics.named_buffers()}
    assert kept["ious"][1] == 1
    model.eval()(batch, 5)
    model.train().rpn.head.objectness.bias.data.fill_(torch.nan)
    optimization.step([batch], 3)
    for name, buffer in model.roi_head.dynamics.named_buffers():
        assert torch.equal(buffer, kept[name]), name
