from __future__ import annotations

import pytest
import torch
from compare import assert_close

from fpn_det.data.sampling import GlobalBatches, describe_repeats, evaluation_batches, micro_batches, repeat_factors
from fpn_det.runtime import Ranks
from fpn_det.structures import Annotations


def sizes(landscape: int, portrait: int) -> torch.Tensor:
    """Return the sizes of landscape and portrait images in random order."""
    rows = [[480, 640]] * landscape + [[640, 480]] * portrait
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return torch.tensor(rows)[order]


COUNTS = [(20, 12), (5, 30), (0, 16), (17, 0), (9, 7), (3, 2)]


@pytest.mark.parametrize(("landscape", "portrait"), COUNTS)
@pytest.mark.parametrize("batch_size", [1, 4, 8])
def test_an_epoch_contains_each_image_at_most_once(landscape, portrait, batch_size):
    batches = GlobalBatches(sizes(landscape, portrait), batch_size, seed=0)
    for epoch in range(3):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        seen = []
        for step in steps:
            found, indices = batches.slice(step)
            assert found == epoch
            assert len(indices) == batches.batch_size
            seen += indices.tolist()
        assert len(set(seen)) == len(seen) > landscape + portrait - batches.batch_size


def test_batches_mix_aspects_only_in_the_remainder():
    shapes = sizes(21, 14)
    batches = GlobalBatches(shapes, 4, seed=0)
    for epoch in range(5):
        mixed = 0
        for step in range(batches.steps_per_epoch):
            _, indices = batches.slice(epoch * batches.steps_per_epoch + step)
            mixed += len(shapes[indices].unique(dim=0)) > 1
        assert mixed <= 1  # 21 = 5 * 4 + 1 and 14 = 3 * 4 + 2: the remainders are less than a batch
    ungrouped = GlobalBatches(shapes, 4, seed=0, group_by_aspect=False)
    assert sum(len(shapes[ungrouped.slice(step)[1]].unique(dim=0)) > 1 for step in range(8)) > 1


def test_every_image_is_sometimes_dropped_when_the_last_batch_is_incomplete():
    batches = GlobalBatches(sizes(9, 6), 4, seed=0)  # 3 steps hold 12 of the 15
    seen = torch.zeros(15, dtype=torch.int64)
    for step in range(3 * 200):
        seen[batches.slice(step)[1]] += 1
    assert seen.min() > 120
    assert seen.max() < 200


def test_a_step_is_a_pure_function_of_its_number():
    shapes = sizes(20, 12)
    straight = GlobalBatches(shapes, 4, seed=3)
    expected = [straight.slice(step) for step in range(40)]
    jumping = GlobalBatches(shapes, 4, seed=3)
    for step in (39, 0, 17, 18, 5):
        epoch, indices = jumping.slice(step)
        assert epoch == expected[step][0]
        assert torch.equal(indices, expected[step][1])
    other = GlobalBatches(shapes, 4, seed=4)
    assert not torch.equal(other.slice(0)[1], expected[0][1])
    assert not torch.equal(straight.slice(straight.steps_per_epoch)[1], expected[0][1])  # the next epoch


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (1, 4), (2, 4), (8, 1)])
def test_micro_batches_contain_the_same_images_on_any_number_of_ranks(world_size, accumulate):
    indices = torch.arange(100, 116)
    parts = [micro_batches(indices, Ranks(rank, world_size), accumulate) for rank in range(world_size)]
    assert all(part.shape == (accumulate, 16 // world_size // accumulate) for part in parts)
    assert torch.equal(torch.cat(parts, dim=1), micro_batches(indices, Ranks(), accumulate))


def test_a_small_data_set_makes_one_smaller_batch_without_repeats():
    batches = GlobalBatches(sizes(4, 3), batch_size=16, seed=0, parts=2)
    assert (batches.batch_size, batches.steps_per_epoch) == (6, 1)  # 6 of the 7: two ranks get three each
    assert len(set(batches.slice(0)[1].tolist())) == 6
    with pytest.raises(ValueError, match=r"at least one image for each of 8 .*got 7"):
        GlobalBatches(sizes(4, 3), batch_size=16, seed=0, parts=8)
    with pytest.raises(ValueError, match=r"at least one image for each of 4 .*got 3"):
        GlobalBatches(sizes(4, 3), batch_size=16, seed=0, parts=4, repeats=torch.full((7,), 0.5, dtype=torch.float64))


def test_a_batch_that_cannot_be_divided_is_refused():
    with pytest.raises(
        ValueError, match=r"trainer\.batch_size: expected a multiple of ranks x trainer\.accumulate = 4, got 6\. Use 4"
    ):
        GlobalBatches(sizes(20, 0), batch_size=6, seed=0, parts=4)


@pytest.mark.parametrize(
    ("images", "world_size", "batch_size"), [(5, 2, 1), (5, 2, 4), (1, 2, 1), (16, 3, 4), (0, 2, 2)]
)
def test_evaluation_covers_every_image_once_over_all_ranks(images, world_size, batch_size):
    shapes = sizes(images // 2, images - images // 2).view(-1, 2)
    seen = []
    for rank in range(world_size):
        for batch in evaluation_batches(shapes, batch_size, Ranks(rank, world_size)):
            assert 0 < len(batch) <= batch_size
            seen += batch.tolist()
    assert sorted(seen) == list(range(images))


def with_labels(labels: list[list[int]], num_classes: int) -> Annotations:
    """Return images with one box for each of their labels; 99 is a crowd of class 0."""
    flat = torch.tensor([label for image in labels for label in image])
    count = len(flat)
    return Annotations(
        image_ids=torch.arange(len(labels)),
        path_bytes=torch.zeros(0, dtype=torch.uint8),
        path_offsets=torch.zeros(len(labels) + 1, dtype=torch.int64),
        sizes=sizes(len(labels), 0),
        offsets=torch.tensor([0, *[len(image) for image in labels]]).cumsum(0),
        boxes=torch.tensor([[0.0, 0, 4, 4]], dtype=torch.float64).repeat(count, 1),
        labels=flat.where(flat < 99, 0),
        iscrowd=flat == 99,
        area=torch.full((count,), 16.0, dtype=torch.float64),
        annotation_ids=torch.arange(count) + 1,
        class_names=tuple(f"class {label}" for label in range(num_classes)),
        category_ids=tuple(range(num_classes)),
    )


def test_repeat_factors_equal_those_of_lvis():
    # of eight images class 0 is in 8, class 1 in 2 (twice in one of them), class 2 in 1, class 3 only as a crowd
    annotations = with_labels([[0], [0, 1, 1], [0, 1, 2], [0], [0], [0], [0], [0, 99]], 4)
    of_images, of_classes = repeat_factors(annotations, 0.5)
    # sqrt(0.5 / 1) < 1; sqrt(0.5 / 0.25); sqrt(0.5 / 0.125)
    assert_close(of_classes, torch.tensor([1, 2**0.5, 2, 1], dtype=torch.float64), 1e-7)
    assert_close(of_images, torch.tensor([1, 2**0.5, 2, 1, 1, 1, 1, 1], dtype=torch.float64), 1e-7)
    line = describe_repeats(of_images, of_classes, annotations.class_names)
    assert "an epoch has 9 instead of 8 images" in line and "class 2 2.00, class 1 1.41." in line


def test_an_epoch_repeats_each_image_by_its_factor():
    repeats = torch.tensor([1.0, 2.5, 1.0, 3.0, 1.25, 1.0, 1.0, 1.25], dtype=torch.float64)  # 12
    batches = GlobalBatches(sizes(5, 3), 4, seed=0, repeats=repeats)
    assert batches.steps_per_epoch == 3
    total = torch.zeros(8)
    for epoch in range(200):
        rows = torch.cat([batches.slice(3 * epoch + step)[1] for step in range(3)])
        counts = torch.bincount(rows, minlength=8)
        assert (counts >= repeats.floor()).all() and (counts <= repeats.ceil()).all()
        occurrences = torch.cat([batches.occurrences(3 * epoch + step) for step in range(3)])
        assert len(set(zip(rows.tolist(), occurrences.tolist(), strict=True))) == 12  # no augmentation occurs twice
        assert set((occurrences % (1 << 32)).tolist()) == {epoch}
        total += counts
    torch.testing.assert_close(total / 200, repeats.float(), atol=0.12, rtol=0)
    again = GlobalBatches(sizes(5, 3), 4, seed=0, repeats=repeats)
    assert torch.equal(again.slice(500)[1], batches.slice(500)[1])


def test_repeats_of_one_keep_the_number_of_images():
    plain, repeated = (
        GlobalBatches(sizes(5, 4), 4, seed=0, repeats=repeats) for repeats in (None, torch.ones(9, dtype=torch.float64))
    )
    assert plain.steps_per_epoch == repeated.steps_per_epoch == 2
    for step in range(20):
        assert len(set(repeated.slice(step)[1].tolist())) == 4
        assert repeated.occurrences(step).tolist() == plain.occurrences(step).tolist() == [step // 2] * 4


def test_integer_sums_with_rounding_errors_fill_the_epoch():
    repeats = torch.full((3000,), 1.1, dtype=torch.float64)  # the sum is 3300 up to rounding
    batches = GlobalBatches(sizes(2000, 1000), 100, seed=0, repeats=repeats)
    for epoch in range(50):
        rows = torch.cat(
            [batches.slice(batches.steps_per_epoch * epoch + step)[1] for step in range(batches.steps_per_epoch)]
        )
        assert len(rows) in (3200, 3300) and torch.bincount(rows).max() <= 2
