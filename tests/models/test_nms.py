from __future__ import annotations

import pytest
import torch
import torchvision

from fpn_det.models import nms
from fpn_det.models.nms import nms_keep

METHODS = ["torchvision", "batched"]


def crowded_boxes(groups: int, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(groups, size, 2, generator=generator) * 60
    boxes = torch.cat([corners, corners + 10 + torch.rand(groups, size, 2, generator=generator) * 30], dim=2)
    return boxes, torch.rand(groups, size, generator=generator), torch.rand(groups, size, generator=generator) > 0.2


@pytest.mark.parametrize("method", METHODS)
def test_nms_by_hand(method: str):
    # in a row, each overlapping its neighbor by 1/3: the best removes its neighbors, which then remove nothing
    boxes = torch.tensor([[[0.0, 0, 10, 10], [5, 0, 15, 10], [10, 0, 20, 10], [15, 0, 25, 10]]])
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6]])
    keep = nms_keep(boxes, scores, torch.ones(1, 4).bool(), 0.3, method=method)
    assert keep.tolist() == [[True, False, True, False]]
    # without the first, the second comes back and removes the third
    keep = nms_keep(boxes, scores, torch.tensor([[False, True, True, True]]), 0.3, method=method)
    assert keep.tolist() == [[False, True, False, True]]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(4))
def test_nms_equals_torchvision_group_by_group(method: str, seed: int):
    boxes, scores, valid = crowded_boxes(3, 200, seed)
    keep = nms_keep(boxes, scores, valid, 0.4, method=method)
    for group in range(3):
        (rows,) = torch.where(valid[group])
        expected = rows[torchvision.ops.nms(boxes[group][rows], scores[group][rows], 0.4)]
        assert set(keep[group].nonzero().flatten().tolist()) == set(expected.tolist())


@pytest.mark.parametrize("method", METHODS)
def test_nms_of_labels_equals_torchvision_batched_nms(method: str):
    boxes, scores, valid = crowded_boxes(2, 200, 9)
    labels = torch.randint(0, 4, (2, 200), generator=torch.Generator().manual_seed(0))
    keep = nms_keep(boxes, scores, valid, 0.3, labels, method)
    for group in range(2):
        (rows,) = torch.where(valid[group])
        survivors = torchvision.ops.batched_nms(boxes[group][rows], scores[group][rows], labels[group][rows], 0.3)
        assert set(keep[group].nonzero().flatten().tolist()) == set(rows[survivors].tolist())


def test_nms_batched_reaches_the_end_of_long_chains():
    # 100 boxes in a row, best first: exactly every second one survives, and the last answer needs ~50 rounds
    x = torch.arange(100.0) * 5
    boxes = torch.stack([x, torch.zeros(100), x + 10, torch.full((100,), 10.0)], dim=1)[None]
    keep = nms_keep(boxes, -torch.arange(100.0)[None], torch.ones(1, 100).bool(), 0.3, method="batched")
    assert keep[0].tolist() == [i % 2 == 0 for i in range(100)]


def test_nms_batched_is_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch):
    boxes, scores, valid = crowded_boxes(5, 50, 3)
    whole = nms_keep(boxes, scores, valid, 0.4, method="batched")
    monkeypatch.setattr(nms, "SUPPRESSION_BYTES", 2 * 50 * 50)
    monkeypatch.setattr(nms, "IOU_BYTES", 4 * 50 * 50)
    assert torch.equal(whole, nms_keep(boxes, scores, valid, 0.4, method="batched"))


@pytest.mark.parametrize("method", METHODS)
def test_nms_of_nothing(method: str):
    assert nms_keep(torch.zeros(2, 0, 4), torch.zeros(2, 0), torch.zeros(2, 0).bool(), 0.5, method=method).shape == (
        2,
        0,
    )
    nothing = nms_keep(torch.zeros(2, 3, 4), torch.zeros(2, 3), torch.zeros(2, 3).bool(), 0.5, method=method)
    assert not nothing.any()


def test_nms_refuses_an_unknown_method():
    with pytest.raises(ValueError, match="got 'fast'"):
        nms_keep(torch.zeros(1, 1, 4), torch.zeros(1, 1), torch.ones(1, 1).bool(), 0.5, method="fast")
