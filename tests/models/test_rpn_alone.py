"""A detector without an ROI head: the RPN is trained alone, and its proposals are the detections."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from test_detector import gradients, make_batch, make_model, spread_out

from fpn_det.boxes import box_iou
from fpn_det.models.backbone import ResNet
from fpn_det.models.detector import Detector
from fpn_det.models.neck import FPN
from fpn_det.models.rpn import RPN, ProposalFilter
from fpn_det.models.views import Views


def make_proposer() -> Detector:
    torch.manual_seed(0)
    rpn = partial(RPN, train_filter=ProposalFilter(200, 100), test_filter=ProposalFilter(100, 50))
    return Detector(3, ResNet(18), partial(FPN, channels=32), rpn, roi_head=None)


@pytest.mark.parametrize("objects", [(3, 1), (0, 0)])
def test_rpn_alone_has_its_own_losses_and_trains_every_parameter(objects: tuple[int, ...]):
    model, batch = make_proposer(), make_batch(objects)
    assert set(model(batch, 0).terms) == {"rpn_objectness", "rpn_box"}
    for name, gradient in gradients(model, batch).items():
        assert gradient is not None and gradient.isfinite().all(), name


def test_detections_of_the_rpn_alone_are_its_proposals():
    model, batch = make_proposer().eval(), make_batch(sizes=[(90, 100), (64, 128)])
    detections, proposals = model.detect(batch), model.propose(batch)
    assert model.max_detections == 50 == detections.boxes.shape[1]
    assert torch.equal(detections.boxes, proposals.boxes) and torch.equal(detections.valid, proposals.valid)
    assert torch.equal(detections.scores[detections.valid], proposals.logits.sigmoid()[proposals.valid])
    assert (detections.scores[~detections.valid] == 0).all() and (detections.labels == 0).all()


def test_a_whole_detector_gives_its_proposals_without_its_roi_head():
    model, batch = spread_out(make_model()), make_batch()
    proposer = model.without_roi_head()
    assert torch.equal(proposer.detect(batch).boxes, model.propose(batch).boxes)
    assert model.roi_head is not None and model.detect(batch).labels.any()
    weights = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in proposer.parameters()} < weights


def test_proposals_of_several_views_are_suppressed_once_more():
    model, batch = make_proposer().eval(), make_batch()
    detections = model.detect(batch, Views((1.0, 1.5), flip=True))
    assert detections.boxes.shape[1] == 50
    for boxes, scores, _ in detections.images():
        assert (scores.diff() <= 0).all()
        overlap = box_iou(boxes[None], boxes[None])[0].fill_diagonal_(0)
        assert len(boxes) == 50 and overlap.max() <= 0.7
