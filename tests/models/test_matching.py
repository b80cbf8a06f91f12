from __future__ import annotations

import pytest
import torch
from torchvision.models.detection._utils import Matcher as TorchvisionMatcher

from fpn_det.boxes import box_iou
from fpn_det.interop.conventions import ReassigningMatcher, UntouchedMatcher
from fpn_det.models import matching
from fpn_det.models.matching import Matcher, Sampler, candidate_hashes, random_keys
from fpn_det.structures import Match, Targets


def targets_of(*images: list[list[float]]) -> Targets:
    return Targets.pad(
        [torch.tensor(boxes).view(-1, 4) for boxes in images], [torch.arange(len(boxes)) for boxes in images]
    )


def everything(targets: Targets, candidates: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(targets.boxes), candidates.shape[-2], dtype=torch.bool)


def test_matcher_by_hand():
    targets = targets_of([[0, 0, 10, 10], [0, 0, 100, 2]])
    candidates = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 2], [50, 50, 60, 60], [0, 0, 20, 2]])
    # IoU with object 0: 1, .5, .2, 0, 20/120; with object 1: 20/280, 20/230, 20/200, 0, .2
    match = Matcher(0.7, 0.3)(targets, candidates, everything(targets, candidates))
    assert match.positive.tolist() == [[True, False, False, False, False]]
    assert match.negative.tolist() == [[False, False, True, True, True]]
    assert match.matched_idxs.tolist()[0][:3] == [0, 0, 0]
    low_quality = Matcher(0.7, 0.3, allow_low_quality_matches=True)(
        targets, candidates, everything(targets, candidates)
    )
    assert low_quality.positive.tolist() == [[True, False, False, False, True]]  # object 1's best is the last
    assert low_quality.negative.tolist() == [[False, False, True, True, False]]


def test_matcher_leaves_an_object_alone_that_nothing_touches():
    targets = targets_of([[500, 500, 510, 510]])
    candidates = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    allowed = everything(targets, candidates)
    assert not Matcher(0.7, 0.3, allow_low_quality_matches=True)(targets, candidates, allowed).positive.any()
    assert UntouchedMatcher(0.7, 0.3, True)(targets, candidates, allowed).positive.all()


def test_low_quality_matches_may_be_reassigned():
    # the candidate overlaps object 0 more, but is object 1's best
    targets = targets_of([[0, 0, 10, 10], [0, 0, 10, 4]])
    candidates = torch.tensor([[0.0, 0, 10, 8]])
    allowed = everything(targets, candidates)
    assert Matcher(0.9, 0.3, allow_low_quality_matches=True)(targets, candidates, allowed).matched_idxs.tolist() == [
        [0]
    ]
    assert ReassigningMatcher(0.9, 0.3, True)(targets, candidates, allowed).matched_idxs.tolist() == [[1]]


@pytest.mark.parametrize("low_quality", [False, True])
@pytest.mark.parametrize("pairs", [1 << 24, 500, 64])
def test_matcher_equals_torchvision_in_any_number_of_pieces(
    low_quality: bool, pairs: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(matching, "PAIRS_AT_ONCE", pairs)
    computed = []
    monkeypatch.setattr(matching, "box_iou", lambda *boxes: computed.append(box_iou(*boxes)) or box_iou(*boxes))
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(2, 60, 2, generator=generator) * 50
    candidates = torch.cat([corners, corners + 5 + torch.rand(2, 60, 2, generator=generator) * 40], dim=2)
    targets = Targets.pad(
        [candidates[0, :5] + 1.5, candidates[1, :3] - 2], [torch.zeros(5).long(), torch.zeros(3).long()]
    )
    match = Matcher(0.7, 0.3, allow_low_quality_matches=low_quality)(
        targets, candidates, everything(targets, candidates)
    )
    assert sum(iou.numel() for iou in computed) == targets.labels.numel() * candidates.shape[1]  # each pair once
    assert max(iou.numel() for iou in computed) <= pairs
    oracle = TorchvisionMatcher(0.7, 0.3, allow_low_quality_matches=low_quality)
    for image in range(2):
        iou = box_iou(targets.boxes[image][targets.valid[image]], candidates[image])
        expected = oracle(iou)
        assert torch.equal(match.positive[image], expected >= 0)
        assert torch.equal(match.negative[image], expected == TorchvisionMatcher.BELOW_LOW_THRESHOLD)
        assert torch.equal(match.matched_idxs[image][expected >= 0], expected[expected >= 0])


def test_matcher_without_objects_is_all_negative_where_allowed():
    targets = targets_of([], [[0, 0, 10, 10]])
    candidates = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]])
    allowed = torch.tensor([[True, False], [False, True]])
    match = Matcher(0.7, 0.3, allow_low_quality_matches=True)(targets, candidates, allowed)
    assert not match.positive.any()  # the only candidate on the object may not take part
    assert match.negative.tolist() == [[True, False], [False, True]]


def match_of(positive: int, negative: int, ignored: int, images: int = 2) -> Match:
    kinds = torch.tensor([1] * positive + [0] * negative + [2] * ignored).repeat(images, 1)
    return Match(kinds == 1, kinds == 0, torch.zeros_like(kinds))


@pytest.mark.parametrize(
    ("positive", "negative", "drawn"),
    [(100, 100, (8, 8)), (3, 100, (3, 13)), (100, 2, (8, 2)), (0, 5, (0, 5)), (0, 0, (0, 0)), (2, 1, (2, 1))],
)
def test_sampler_draws_the_right_numbers_of_the_right_kind(positive: int, negative: int, drawn: tuple[int, int]):
    match = match_of(positive, negative, 50)
    sample = Sampler(16, 0.5)(match, torch.tensor([3, 4]), step=7)
    assert sample.idxs.shape == (2, 16)
    for image in range(2):
        chosen = sample.idxs[image][sample.valid[image]]
        assert len(chosen.unique()) == len(chosen) == sum(drawn)
        assert torch.equal(match.positive[image][chosen], sample.positive[image][sample.valid[image]])
        assert match.negative[image][chosen].sum() == drawn[1]
    assert not (sample.positive & ~sample.valid).any()


def test_sampler_takes_all_when_asked_for_more_than_there_are():
    sample = Sampler(10_000, 0.5)(match_of(20, 30, 5), torch.tensor([0, 1]), step=0)
    assert sample.idxs.shape == (2, 55)
    assert sample.valid.sum(1).tolist() == [50, 50]
    assert sample.positive.sum(1).tolist() == [20, 20]


def test_sampler_depends_on_step_and_image_and_not_on_the_batch():
    match = match_of(100, 100, 0)
    sampler = Sampler(16, 0.5)
    both = sampler(match, torch.tensor([3, 4]), step=7).idxs
    swapped = sampler(match, torch.tensor([4, 3]), step=7).idxs
    assert torch.equal(both, swapped.flip(0))
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(both, sampler(match, torch.tensor([3, 4]), step=8).idxs)
    assert not torch.equal(both, Sampler(16, 0.5, seed=1)(match, torch.tensor([3, 4]), step=7).idxs)


def test_random_keys_are_distinct_and_even():
    keys = random_keys(0, 0, torch.arange(4), *candidate_hashes(50_000, torch.device("cpu")))
    assert all(len(row.unique()) == 50_000 for row in keys) and (keys >= 0).all()
    uniform = (keys >> 30).double() / 2**32
    # the mean of 50,000 uniform numbers deviates by 1 / sqrt(12 * 50,000) = 0.0013; five of those
    assert ((uniform.mean(1) - 0.5).abs() < 0.0065).all()
    correlation = torch.corrcoef(uniform)
    assert (correlation - torch.eye(4)).abs().max() < 0.03
