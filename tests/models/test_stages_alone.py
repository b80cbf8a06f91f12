"""The two stages alone: an RPN whose proposals are the detections, and an ROI head on proposals that come with the batch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from compare import assert_close
from test_detector import gradients, make_batch, make_model, spread_out

from fpn_det.boxes import box_iou
from fpn_det.models.box_heads import TwoLayerHead
from fpn_det.models.detector import Detector
from fpn_det.models.necks.fpn import FPN
from fpn_det.models.resnet import ResNet
from fpn_det.models.roi_head import ROIHead
from fpn_det.models.rpn import RPN
from fpn_det.models.selection import ProposalFilter
from fpn_det.models.views import Views, make_view
from fpn_det.structures import Batch, Proposals


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


def make_second_stage() -> Detector:
    torch.manual_seed(0)
    return Detector(
        3,
        ResNet(18, norm="frozen"),
        partial(FPN, channels=32),
        None,
        partial(ROIHead, box_head=partial(TwoLayerHead, width=64)),
    )


def with_proposals(batch: Batch, number: int = 9) -> Batch:
    boxes = torch.rand(len(batch), number, 4, generator=torch.Generator().manual_seed(2)) * 40
    boxes[..., 2:] += boxes[..., :2] + 5
    return replace(batch, proposals=Proposals.stack(list(boxes)))


@pytest.mark.parametrize("objects", [(3, 1), (0, 0)])
def test_second_stage_alone_has_its_own_losses_and_trains_every_parameter(objects: tuple[int, ...]):
    model, batch = make_second_stage(), with_proposals(make_batch(objects))
    assert set(model(batch, 0).terms) == {"roi_class", "roi_box"}
    for name, gradient in gradients(model, batch).items():
        assert gradient is not None and gradient.isfinite().all(), name


def test_second_stage_alone_detects_what_the_whole_does_from_the_same_proposals():
    whole, batch = spread_out(make_model()), make_batch(sizes=[(90, 100), (64, 128)])
    part = make_second_stage().eval()
    part.load_state_dict({name: value for name, value in whole.state_dict().items() if not name.startswith("rpn.")})
    expected, found = whole.detect(batch), part.detect(replace(batch, proposals=whole.propose(batch)))
    assert expected.valid.any()
    assert torch.equal(found.boxes, expected.boxes) and torch.equal(found.scores, expected.scores)


def test_second_stage_alone_finds_nothing_where_nothing_is_proposed():
    model, batch = make_second_stage(), make_batch()
    batch = replace(batch, proposals=Proposals.stack([torch.zeros(5, 4)] * 2))
    assert not model.detect(batch).valid.any()
    assert model(batch, 0).total().isfinite()


def test_a_view_carries_the_proposals_of_a_batch():
    batch = with_proposals(make_batch())
    view = make_view(batch, 0.5, True, 32)
    x1, y1, x2, y2 = batch.proposals.boxes.unbind(2)
    assert_close(view.proposals.boxes, torch.stack([64 - x2 / 2, y1 / 2, 64 - x1 / 2, y2 / 2], dim=2), 1e-5)
    assert make_second_stage().detect(batch, Views((1.0, 0.5), flip=True)).boxes.shape == (2, 100, 4)


def test_stages_that_lack_something_say_so():
    with pytest.raises(ValueError, match="expected proposals in the batch for a model without an RPN, got none"):
        make_second_stage().detect(make_batch())
    with pytest.raises(ValueError, match="expected an RPN, an ROI head or both, got neither"):
        Detector(3, ResNet(18), rpn=None, roi_head=None)
