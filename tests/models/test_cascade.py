"""The cascade: targets of its stages, gradients between them, and the average of scores, worked out by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from compare import assert_close
from test_detector import gradients, make_batch, make_model
from torch import Tensor

from fpn_det.boxes import BoxCoder
from fpn_det.models.box_heads import TwoLayerHead
from fpn_det.models.cascade import CascadeROIHead, Stage, refine
from fpn_det.models.detector import Detector
from fpn_det.models.layers import scale_gradient
from fpn_det.models.matching import Matcher, ProposalSampler
from fpn_det.models.roi_head import BoxPredictor
from fpn_det.structures import Batch, Proposals, Pyramid, Targets


def make_cascade(ious: tuple[float, ...] = (0.5, 0.6, 0.7), **options) -> Detector:
    torch.manual_seed(0)
    model = make_model()
    model.roi_head = CascadeROIHead(32, (4, 8, 16, 32), box_head=partial(TwoLayerHead, width=64), ious=ious, **options)
    model.reset_classifier(3)
    return model


def make_pyramid(batch: Batch) -> Pyramid:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 32, 96 // s, 128 // s, generator=generator) for s in (4, 8, 16, 32)]
    return Pyramid([level.requires_grad_() for level in maps], (4, 8, 16, 32), batch.sizes)


def given(boxes: Tensor) -> Proposals:
    return Proposals(boxes, torch.zeros(boxes.shape[:2]), torch.ones(boxes.shape[:2], dtype=torch.bool))


def moves_by(predictor: BoxPredictor, deltas: list[float]) -> None:
    """Every box gets the same raw deltas and logits of the same order."""
    predictor.box_deltas.weight.data.zero_()
    predictor.box_deltas.bias.data.copy_(torch.tensor(deltas))


def test_each_stage_has_its_threshold_and_larger_weights_of_deltas():
    head = make_cascade((0.4, 0.5, 0.6, 0.8)).roi_head
    assert [stage.matcher for stage in head.stages] == [Matcher(iou, iou) for iou in (0.4, 0.5, 0.6, 0.8)]
    weights = [stage.predictor.coder.weights for stage in head.stages]
    assert weights == [(10 * n, 10 * n, 5 * n, 5 * n) for n in (1, 2, 3, 4)]
    assert all(stage.predictor.box_deltas.out_features == 4 for stage in head.stages)
    assert len({id(stage.box_head) for stage in head.stages}) == 4


def test_targets_of_a_later_stage_are_those_of_the_refined_boxes_at_its_threshold():
    # one object of 40 x 40; proposals shifted right by 10, 16 and 40 have IoU 0.6, 0.4286 and 0
    targets = Targets.pad([torch.tensor([[0.0, 0, 40, 40]])], [torch.tensor([2])])
    boxes = torch.tensor([[[10.0, 0, 50, 40], [16, 0, 56, 40], [40, 0, 80, 40]]])
    batch = Batch(
        torch.zeros(1, 3, 64, 96), torch.tensor([[64, 96]]), torch.tensor([[64, 96]]), targets, torch.tensor([0])
    )
    valid, coder = torch.ones(1, 3, dtype=torch.bool), BoxCoder((10.0, 10.0, 5.0, 5.0))
    # all move left by 0.15 * 40 = 6: to shifts 4, 10 and 34, IoU 0.8182, 0.6 and 0.0811
    moved, valid = refine(torch.tensor([-1.5, 0, 0, 0]).expand(1, 3, 1, 4), boxes, valid, coder, batch)
    assert_close(moved[..., 0], torch.tensor([[4.0, 10.0, 34.0]]), 1e-6)
    for iou, expected in ((0.5, [True, True, False]), (0.7, [True, False, False])):
        sampled = Stage(TwoLayerHead(1, 1, 1), Matcher(iou, iou)).match(moved, valid, targets)
        assert sampled.sample.positive.tolist() == [expected]
        assert sampled.sample.valid.all() and sampled.gt_labels[0, 0] == 2
        assert sampled.gt_boxes[0, 0].tolist() == [0, 0, 40, 40]


def test_refined_boxes_are_clipped_and_those_without_area_drop_out():
    batch, coder = make_batch((1,)), BoxCoder()
    boxes = torch.tensor([[[0.0, 0, 10, 10], [100, 0, 128, 20], [120, 0, 128, 20], [0, 0, 10, 10]]])
    deltas = torch.zeros(1, 4, 1, 4)
    deltas[0, 1, 0, 0], deltas[0, 2, 0, 0], deltas[0, 3] = 0.5, 3.0, torch.nan
    moved, valid = refine(deltas, boxes, torch.ones(1, 4, dtype=torch.bool), coder, batch)
    assert valid.tolist() == [[True, True, False, False]]
    assert moved[0].tolist() == [[0, 0, 10, 10], [114, 0, 128, 20], [0, 0, 0, 0], [0, 0, 0, 0]]
    _, valid = refine(deltas, boxes, torch.zeros(1, 4, dtype=torch.bool), coder, batch)
    assert not valid.any()


def test_scores_are_the_mean_of_the_stages_and_boxes_those_of_the_last():
    head, batch = make_cascade().roi_head, make_batch()
    pyramid, boxes = make_pyramid(batch), torch.tensor([[[10.0, 10, 50, 50]], [[20, 20, 40, 60]]])
    logits = torch.tensor([[1.0, 0, 0, 2], [0, 3, 0, 0], [2, 2, 0, 1]])
    for stage, row in zip(head.stages, logits, strict=True):
        stage.predictor.class_logits.weight.data.zero_()
        stage.predictor.class_logits.bias.data.copy_(row)
        moves_by(stage.predictor, [6.0, 0, 0, 0])
    found = head.raw(pyramid, given(boxes), batch)
    expected = logits.softmax(dim=1)[:, :3].mean(dim=0)
    assert_close(found.scores, expected.expand(2, 1, 3), 1e-6)
    # shifts of 6/10, 6/20 and 6/30 of the width: 1.1 of it
    assert_close(found.boxes[:, 0, 0], torch.tensor([[54.0, 10, 94, 50], [42, 20, 62, 60]]), 1e-5)


def test_gradients_on_the_features_are_divided_by_the_number_of_stages_and_those_of_parameters_are_not():
    batch, proposals = make_batch(), given(make_batch().targets.boxes[:, :1] + 2)
    results = []
    for ious in ((0.5,), (0.5, 0.6)):
        head = make_cascade(ious, sampler=ProposalSampler(8)).roi_head
        head.load_state_dict(make_cascade((0.5, 0.6)).roi_head.state_dict(), strict=False)
        pyramid = make_pyramid(batch)
        terms = head.losses(pyramid, proposals, batch, 0).terms
        first = terms["roi_class"] + terms["roi_box"]
        results.append(torch.autograd.grad(first, [pyramid.levels[0], head.box_head.fc1.weight]))
    (alone, alone_weight), (of_two, of_two_weight) = results
    assert alone.abs().max() > 0
    assert_close(of_two, alone / 2, 1e-5)
    assert_close(of_two_weight, alone_weight, 1e-6)


def test_no_gradient_flows_through_the_boxes_from_one_stage_to_the_next():
    head, batch = make_cascade((0.5, 0.6)).roi_head, make_batch()
    terms = head.losses(make_pyramid(batch), given(batch.targets.boxes + 2), batch, 0).terms
    later = terms["roi_class_2"] + terms["roi_box_2"]
    first = list(head.box_head.parameters()) + list(head.predictor.parameters())
    assert all(gradient is None for gradient in torch.autograd.grad(later, first, allow_unused=True))


def test_a_cascade_of_one_stage_is_a_class_agnostic_head():
    batch, plain = make_batch(), make_model(roi_head={"predictor": partial(BoxPredictor, class_agnostic=True)})
    cascade = make_cascade((0.5,))
    cascade.load_state_dict(plain.state_dict())
    expected = plain(batch, 3).terms
    for name, value in cascade(batch, 3).terms.items():
        assert value == expected[name]
    mine, theirs = gradients(cascade, batch), gradients(plain, batch)
    for name, gradient in mine.items():
        assert_close(gradient, theirs[name], 1e-6, name)
    mine, theirs = cascade.eval().detect(batch), plain.eval().detect(batch)
    assert torch.equal(mine.scores, theirs.scores) and torch.equal(mine.boxes, theirs.boxes)


@pytest.mark.parametrize("objects", [(3, 1), (0, 0)])
def test_every_parameter_of_every_stage_gets_a_finite_gradient(objects: tuple[int, ...]):
    model = make_cascade()
    names = set(model(make_batch(objects), 0).terms)
    assert {"roi_class", "roi_box", "roi_class_2", "roi_box_2", "roi_class_3", "roi_box_3"} < names
    for name, gradient in gradients(model, make_batch(objects)).items():
        assert gradient is not None and gradient.isfinite().all(), name


def test_scaled_gradient_leaves_values_alone():
    input = torch.tensor([1.0, 2.0], requires_grad=True)
    output = scale_gradient(input, 0.25)
    output.sum().backward()
    assert torch.equal(output, input) and input.grad.tolist() == [0.25, 0.25]


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="expected an IoU for each stage, got none"):
        make_cascade(())
    with pytest.raises(ValueError, match=r"class_agnostic: expected true in a cascade"):
        make_cascade(predictor=BoxPredictor)
