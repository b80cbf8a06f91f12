from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from test_detector import make_batch, make_model, spread_out

from fpn_det.models.nms import nms_keep
from fpn_det.models.selection import DetectionFilter
from fpn_det.models.views import Views, make_view, resize_boxes
from fpn_det.structures import Batch, Candidates, Targets


def test_boxes_are_carried_to_the_sizes_of_a_view_and_back():
    # 100 x 60 px (w x h) to 50 x 90: x * 0.5, y * 1.5; mirrored, x becomes 50 - x
    source, target = torch.tensor([[60, 100]]), torch.tensor([[90, 50]])
    boxes = torch.tensor([[[10.0, 20.0, 40.0, 60.0]]])
    assert resize_boxes(boxes, source, target, mirrored=False).tolist() == [[[5.0, 30.0, 20.0, 90.0]]]
    there = resize_boxes(boxes, source, target, mirrored=True)
    assert there.tolist() == [[[30.0, 30.0, 45.0, 90.0]]]
    assert resize_boxes(there, target, source, mirrored=True).tolist() == boxes.tolist()


@pytest.mark.parametrize("scale", [0.37, 0.5, 1.6, 2.0])
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_view_shows_each_image_resized_within_its_own_size(scale: float, mirrored: bool):
    batch = make_batch(sizes=[[96, 128], [70, 33]])
    view = make_view(batch, scale, mirrored, stride=32)
    assert all(side % 32 == 0 for side in view.pixels.shape[2:])
    for row, (height, width) in enumerate(batch.sizes.tolist()):
        size = [round(height * scale), round(width * scale)]
        assert view.sizes[row].tolist() == size
        image = batch.pixels[row : row + 1, :, :height, :width].float()
        expected = F.interpolate(image, size, mode="bilinear", antialias=True)[0]
        shown = view.pixels[row, :, : size[0], : size[1]]
        assert_close(shown, expected.flip(2) if mirrored else expected, 4e-5)
        assert not view.pixels[row, :, size[0] :].any() and not view.pixels[row, :, :, size[1] :].any()


def test_a_mirrored_view_moves_the_objects_with_their_pixels():
    pixels = torch.zeros(1, 3, 32, 64, dtype=torch.uint8)
    pixels[0, :, 4:10, 6:20] = 200
    size = torch.tensor([[30, 50]])
    boxes = torch.tensor([[6.0, 4.0, 20.0, 10.0]])
    batch = Batch(pixels, size, size, Targets.pad([boxes], [torch.tensor([1])]), torch.tensor([0]))
    view = make_view(batch, 1.0, True, 32)
    x1, y1, x2, y2 = view.targets.boxes[0, 0].long().tolist()
    assert (x1, y1, x2, y2) == (30, 4, 44, 10)  # 50 - 20, 50 - 6
    assert (view.pixels[0, :, y1:y2, x1:x2] == 200).all() and view.pixels.sum() == 200 * 3 * 6 * 14


def test_one_plain_view_is_the_detector_to_the_bit():
    model, batch = spread_out(make_model()).eval(), make_batch()
    plain, viewed = model.detect(batch), model.detect(batch, Views())
    assert plain.valid.any()
    assert all(
        torch.equal(getattr(plain, name), getattr(viewed, name)) for name in ("boxes", "scores", "labels", "valid")
    )


def test_two_equal_views_say_what_one_says():
    # boxes without area overlap nothing, not even themselves
    model, batch = (
        spread_out(make_model(roi_head={"test_filter": DetectionFilter(min_side=0.01)})).eval(),
        make_batch(sizes=[[96, 128], [70, 90]]),
    )
    once, twice = model.detect(batch), model.detect(batch, Views((1.0, 1.0)))
    assert once.valid.any()
    for mine, theirs in zip(once.images(), twice.images(), strict=True):
        assert all(torch.equal(one, two) for one, two in zip(mine, theirs, strict=True))


def bright_box(batch: Batch) -> Candidates:
    """A detector that is equivariant: the extent of what is bright, with its mean brightness as score."""
    boxes, scores = [], []
    for pixels, (height, width) in zip(batch.pixels.float(), batch.sizes.tolist(), strict=True):
        bright = pixels[0, :height, :width] > 100
        y, x = torch.where(bright)
        boxes.append(torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]).float())
        scores.append(pixels[0, :height, :width][bright].mean() / 255)
    return Candidates(
        torch.stack(boxes)[:, None, None],
        torch.stack(scores)[:, None, None],
        torch.ones(len(boxes), 1, dtype=torch.bool),
    )


@pytest.mark.parametrize("views", [Views(flip=True), Views((1.0, 2.0)), Views((0.5, 1.0, 3.0), flip=True)])
def test_views_of_an_equivariant_detector_agree(views: Views):
    pixels = torch.zeros(2, 3, 64, 96, dtype=torch.uint8)
    pixels[0, :, 8:24, 16:60], pixels[1, :, 20:40, 4:16] = 250, 250
    size = torch.tensor([[64, 96], [48, 40]])
    batch = Batch(
        pixels,
        size,
        size,
        Targets.pad([torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.int64)] * 2),
        torch.arange(2),
    )
    merged, alone = views.merge(bright_box, batch, stride=32), bright_box(batch)
    assert merged.boxes.shape == (2, len(views.scales) * (1 + views.flip), 1, 4)
    assert_close(merged.boxes, alone.boxes.expand_as(merged.boxes), 1e-6)
    keep = nms_keep(merged.boxes[:, :, 0], merged.scores[:, :, 0], merged.valid, 0.5)
    assert keep.sum(dim=1).tolist() == [1, 1]  # after suppression, what one view says


def test_padding_of_a_batch_does_not_reach_a_view():
    model, batch = spread_out(make_model()).eval(), make_batch(sizes=[[96, 128], [70, 90]])
    noisy = copy.deepcopy(batch.pixels)
    noisy[1, :, 70:], noisy[1, :, :, 90:] = 255, 255
    views = Views((0.6, 1.3), flip=True)
    mine, theirs = model.detect(batch, views), model.detect(replace(batch, pixels=noisy), views)
    assert torch.equal(mine.boxes, theirs.boxes) and torch.equal(mine.scores, theirs.scores)


def test_an_image_pyramid_merges_scales_and_trains_on_their_mean():
    model, batch = spread_out(make_model()).eval(), make_batch()
    half = make_view(batch, 0.5, False, model.stride)
    parts = [model(view, 3) for view in (half, batch)]
    merged = model.detect(batch, Views((0.5, 1.0)))
    model.views = model.train_views = Views((0.5, 1.0))
    losses = model(batch, 3)
    for name, value in losses.terms.items():
        assert value.item() == pytest.approx((parts[0].terms[name].item() + parts[1].terms[name].item()) / 2)
    assert torch.equal(model.detect(batch).boxes, merged.boxes)
    losses.total().backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


@pytest.mark.parametrize("scales", [(), (0.0,), (1.0, -1.0)])
def test_impossible_scales_are_refused(scales: tuple[float, ...]):
    with pytest.raises(ValueError, match="at least one scale above 0"):
        Views(scales)
