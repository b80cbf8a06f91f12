"""Soft-NMS against a plain loop over boxes of one class after the other."""

from __future__ import annotations

import math

import pytest
import torch
from compare import assert_close
from test_detector import make_batch
from torchvision.ops import box_iou

from fpn_det.models.selection import SoftDetectionFilter
from fpn_det.structures import Candidates


def loop(boxes, scores, select: SoftDetectionFilter):
    """Detections (score, label, box) of one image, in the words of the paper: take the best, lower the others, repeat."""
    found = []
    for label in range(scores.shape[1]):
        left = [
            [score, box]
            for score, box in zip(scores[:, label].tolist(), boxes[:, label if boxes.shape[1] > 1 else 0], strict=True)
            if score > select.score_threshold
        ]
        while left:
            best = max(left, key=lambda pair: pair[0])
            left = [pair for pair in left if pair is not best]
            found.append((best[0], label, best[1]))
            for pair in left:
                iou = box_iou(best[1][None], pair[1][None]).item()
                if select.decay == "gaussian":
                    pair[0] *= math.exp(-(iou**2) / select.sigma)
                elif iou > select.nms_iou:
                    pair[0] *= 1 - iou
            left = [pair for pair in left if pair[0] > select.score_threshold]
    return sorted(found, key=lambda item: -item[0])[: select.max_detections]


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("decay", ["linear", "gaussian"])
def test_soft_nms_equals_the_plain_loop(decay: str, agnostic: bool):
    generator, batch = torch.Generator().manual_seed(0), make_batch((1, 1))
    corner = torch.rand(2, 40, 1 if agnostic else 3, 2, generator=generator) * 40
    boxes = torch.cat([corner, corner + 20 + torch.rand(corner.shape, generator=generator) * 20], dim=-1)
    scores = torch.rand(2, 40, 3, generator=generator)
    valid = torch.rand(2, 40, generator=generator) < 0.9
    select = SoftDetectionFilter(0.2, 0.3, 50, decay=decay, sigma=0.5)
    detections = select(Candidates(boxes, scores, valid), batch)
    for row, (found_boxes, found_scores, found_labels) in enumerate(detections.images()):
        expected = loop(boxes[row, valid[row]], scores[row, valid[row]], select)
        assert 10 < len(expected) == len(found_scores)
        assert_close(found_scores, torch.tensor([score for score, _, _ in expected]), 1e-5)
        assert found_labels.tolist() == [label for _, label, _ in expected]
        assert_close(found_boxes, torch.stack([box for _, _, box in expected]), 1e-6)


def test_soft_nms_by_hand():
    # two boxes of 10 x 10, shifted by 5: IoU 1/3
    boxes = torch.tensor([[[[0.0, 0, 10, 10]], [[5, 0, 15, 10]]]])
    candidates = Candidates(boxes, torch.tensor([[[0.9], [0.6]]]), torch.ones(1, 2, dtype=torch.bool))
    linear = SoftDetectionFilter(0.05, 0.3, 3, decay="linear")(candidates, make_batch((1,)))
    assert_close(linear.scores, torch.tensor([[0.9, 0.6 * 2 / 3, 0.0]]), 1e-6)
    gaussian = SoftDetectionFilter(0.05, 0.3, 3)(candidates, make_batch((1,)))
    assert_close(gaussian.scores, torch.tensor([[0.9, 0.6 * math.exp(-1 / 9 / 0.5), 0.0]]), 1e-6)
    assert gaussian.valid.tolist() == [[True, True, False]]


def test_without_candidates_there_are_no_detections():
    candidates = Candidates(torch.zeros(1, 0, 1, 4), torch.zeros(1, 0, 3), torch.zeros(1, 0, dtype=torch.bool))
    empty = Candidates(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.bool))
    for found in (candidates, empty):
        detections = SoftDetectionFilter(max_detections=4)(found, make_batch((1,)))
        assert detections.boxes.shape == (1, 4, 4) and not detections.valid.any()
