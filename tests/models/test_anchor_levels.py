"""The pyramid level of the anchor that a detection comes from, carried from the RPN through every selection."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_detector import make_batch, make_model, spread_out
from test_tile_merging import FindsSquares, draw, find

from fpn_det.boxes import clip_boxes
from fpn_det.data.tiles import Tiling
from fpn_det.models.selection import DetectionFilter, ProposalFilter, SoftDetectionFilter
from fpn_det.models.tiles import detect_all
from fpn_det.models.views import Views
from fpn_det.structures import Batch, Candidates


def test_a_proposal_names_its_anchor_and_level():
    """Without deltas a proposal is its anchor, clipped; the anchors of level l have an area of (16 * 2**l)**2."""
    model, batch = (
        make_model(rpn={"test_filter": ProposalFilter(100, 300)}).eval(),
        make_batch(sizes=[(90, 100), (64, 128)]),
    )
    torch.nn.init.zeros_(model.rpn.head.deltas.weight)
    torch.nn.init.normal_(model.rpn.head.objectness.weight)
    pyramid = model.pyramid(batch)
    with torch.no_grad():
        output = model.rpn(pyramid)
    proposals = model.rpn.propose(output, batch, model.rpn.test_filter)
    valid = proposals.valid
    anchors = output.anchors[proposals.anchor_idxs]
    torch.testing.assert_close(proposals.boxes[valid], clip_boxes(anchors, batch.sizes)[valid])
    levels = model.rpn.levels_of(proposals.anchor_idxs, pyramid)
    sides = (anchors[..., 2:] - anchors[..., :2]).prod(dim=-1).sqrt()
    torch.testing.assert_close(sides[valid], 16.0 * 2 ** levels[valid])
    assert levels[valid].unique().tolist() == [0, 1, 2, 3, 4]  # each level proposes something


def candidates_by_hand() -> Candidates:
    """Proposals of levels 2, 0 and 1; the second suppresses the third in class 0, not in class 1."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40], [20, 20, 40, 41]])
    scores = torch.tensor([[0.5, 0.0], [0.9, 0.0], [0.8, 0.7]])
    return Candidates(boxes[None, :, None], scores[None], torch.ones(1, 3, dtype=torch.bool), torch.tensor([[2, 0, 1]]))


@pytest.mark.parametrize("soft", [False, True])
def test_detections_keep_the_level_of_their_proposal(soft: bool):
    if soft:
        select: DetectionFilter = SoftDetectionFilter(max_detections=4, decay="linear", score_threshold=0.1)
    else:
        select = DetectionFilter(max_detections=4)
    found = select(candidates_by_hand(), make_batch((0,)))
    assert found.scores[found.valid].tolist() == pytest.approx([0.9, 0.7, 0.5])
    assert found.anchor_levels[found.valid].tolist() == [0, 1, 2]
    unknown = select(replace(candidates_by_hand(), anchor_levels=None), make_batch((0,)))
    assert unknown.anchor_levels is None and torch.equal(unknown.boxes, found.boxes)


def test_detections_of_every_view_have_the_level_in_their_own_view():
    model, batch = spread_out(make_model()).eval(), make_batch()
    views = Views((1.0, 0.5), flip=True)
    merged = model.candidates(batch, views)
    alone = [model.raw(view).anchor_levels for view, _ in views.of(batch, model.stride)]
    assert torch.equal(merged.anchor_levels, torch.cat(alone, dim=1))
    proposer = model.without_roi_head()
    for detector in (model, proposer):
        found = detector.detect(batch, views)
        assert found.anchor_levels.shape == found.labels.shape
        # a detection has the level of some candidate
        assert set(found.anchor_levels[found.valid].tolist()) <= set(merged.anchor_levels[merged.valid].tolist())


class FindsSquaresOnLevels(FindsSquares):
    """Gives every candidate a level: 3 in a whole image, which is wide, and 1 in a tile."""

    def candidates(self, batch: Batch, views: Views | None = None) -> Candidates:
        found = super().candidates(batch, views)
        level = 3 if batch.windows is None else 1
        return replace(found, anchor_levels=torch.full_like(found.valid, level, dtype=torch.int64))


def test_candidates_of_tiles_bring_their_level(tmp_path, monkeypatch):
    seen = []

    def recorded(*arguments, **options):
        for batch, detections in detect_all(*arguments, **options):
            seen.append(detections.anchor_levels[detections.valid].tolist())
            yield batch, detections

    monkeypatch.setattr("test_tile_merging.detect_all", recorded)
    # a square of 60 px is cut by every tile of 50 px; one of 10 px is too small in the whole image at half its size
    pictures = [draw((200, 200), [[20, 20, 80, 80], [150, 150, 160, 160]])]
    ((boxes, _, _),) = find(FindsSquaresOnLevels(), tmp_path, pictures, Tiling(50, 0.5), 100)
    assert len(boxes) == 2 and sorted(seen[0]) == [1, 3]
