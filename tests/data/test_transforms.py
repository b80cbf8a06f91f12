from __future__ import annotations

import pickle
from collections import Counter

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from compare import assert_close
from PIL import Image
from torchvision.models.detection.transform import _resize_image_and_masks

from fpn_det.data.collation import Collator
from fpn_det.data.dataset import Example
from fpn_det.data.flip_resize import FlipResize, resize, resized_size
from fpn_det.data.transforms import LargeScaleJitter, Pipeline, ResizeShortestSide

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
NO_BOXES = np.zeros((0, 4)), np.zeros(0, np.int64)


def random_boxes(random: np.random.Generator, count: int, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    corners = random.uniform(0, 1, (count, 2, 2)) * (width, height)
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    return boxes, random.integers(0, 80, count)


def test_pipeline_without_transforms_changes_nothing():
    boxes, labels = random_boxes(np.random.default_rng(0), 20, 64, 48)
    pixels, same, kept = Pipeline([], min_area=0)(PIXELS, boxes, labels, (0, 0, 0))
    assert np.array_equal(pixels, PIXELS)
    np.testing.assert_array_equal(same, boxes.astype(np.float32))  # to the last bit of float32
    assert np.array_equal(kept, labels)
    assert kept.dtype == np.int64


def test_flip_takes_x_to_width_minus_x():
    pipeline = Pipeline([A.HorizontalFlip(p=1)])
    pixels, boxes, labels = pipeline(PIXELS, np.array([[4.0, 5, 10, 20], [0, 0, 64, 48]]), np.array([7, 3]), (0, 0, 0))
    assert np.array_equal(pixels, PIXELS[:, ::-1])
    assert boxes.tolist() == [[54, 5, 60, 20], [0, 0, 64, 48]]
    assert labels.tolist() == [7, 3]


def test_resize_scales_boxes_by_the_actual_ratio_of_the_sides():
    boxes, labels = random_boxes(np.random.default_rng(0), 50, 64, 47)
    pipeline = Pipeline([ResizeShortestSide([800], 1333)], min_area=0)
    pixels, resized, _ = pipeline(PIXELS[:47], boxes, labels, (0, 0, 0))
    # 47 -> 800, 64 * 800 / 47 = 1089.4
    assert pixels.shape == (800, 1089, 3)
    exact = boxes * (1089 / 64, 800 / 47, 1089 / 64, 800 / 47)
    np.testing.assert_allclose(resized, exact.astype(np.float32), rtol=2e-7)


@pytest.mark.parametrize(
    ("size", "side", "max_side", "rounding", "expected"),
    [
        ((480, 640), 800, 1333, "round", (800, 1067)),  # 640 * 800 / 480 = 1066.67
        ((480, 640), 800, 1333, "floor", (800, 1066)),
        ((161, 200), 800, 1333, "round", (800, 994)),  # 993.79
        ((161, 200), 800, 1333, "floor", (799, 993)),  # 161 * (800 / 161) = 799.9999999999999
        ((640, 200), 800, 1333, "round", (1333, 417)),  # the longer side decides: 200 * 1333 / 640 = 416.56
        ((2000, 1), 800, 1333, "round", (1333, 1)),
    ],
)
def test_resized_size_matches_the_arithmetic(size, side, max_side, rounding, expected):
    assert resized_size(size, side, max_side, rounding) == expected


@pytest.mark.parametrize("size", [(161, 600), (480, 640), (335, 500), (1000, 301)])
def test_floored_size_equals_torchvision(size):
    image = torch.empty(1, *size)
    assert resized_size(size, 800, 1333, "floor") == _resize_image_and_masks(image, 800, 1333)[0].shape[1:]


def test_resize_shortest_side_draws_every_side():
    pipeline = Pipeline([ResizeShortestSide([32, 40, 64], 200)])
    heights = Counter(pipeline(PIXELS, *NO_BOXES, (0, 0, index))[0].shape[0] for index in range(300))
    assert sorted(heights) == [32, 40, 64]
    assert min(heights.values()) > 70


def test_resize_backends_are_opencv_and_pillow():
    size = (20, 30)
    assert np.array_equal(
        resize(PIXELS, size, "cv2", False), cv2.resize(PIXELS, (30, 20), interpolation=cv2.INTER_LINEAR)
    )
    assert np.array_equal(resize(PIXELS, size, "cv2", True), cv2.resize(PIXELS, (30, 20), interpolation=cv2.INTER_AREA))
    assert np.array_equal(
        resize(PIXELS, size, "pil", True),
        np.asarray(Image.fromarray(PIXELS).resize((30, 20), Image.Resampling.BILINEAR)),
    )
    # means of 2x2 pixels
    halves = PIXELS.reshape(24, 2, 32, 2, 3).mean(axis=(1, 3))
    assert np.abs(resize(PIXELS, (24, 32), "cv2", True) - halves).max() <= 0.5


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: ResizeShortestSide([], 100), "expected sides in 1..max_side=100"),
        (lambda: ResizeShortestSide([200], 100), "expected sides in 1..max_side=100"),
        (lambda: ResizeShortestSide([10], 100, rounding="up"), "expected rounding round or floor, got 'up'"),  # type: ignore[arg-type]
        (lambda: ResizeShortestSide([10], 100, backend="gpu"), "expected backend cv2, pil or torch_float, got 'gpu'"),  # type: ignore[arg-type]
        (lambda: ResizeShortestSide([10], 100, backend="pil", antialias=False), "pil always antialiases"),
        (lambda: LargeScaleJitter((100,)), r"expected size \(h, w\)"),
        (lambda: LargeScaleJitter((100, 100), (2, 1)), "expected scale_range"),
    ],
)
def test_transform_refuses_invalid_arguments(build, words):
    with pytest.raises(ValueError, match=words):
        build()


@pytest.mark.parametrize("side", [20, 48, 75])
def test_resizing_in_float_equals_torchvision(side: int):
    image = torch.from_numpy(PIXELS).permute(2, 0, 1).float()
    expected = _resize_image_and_masks(image, side, 133)[0]
    pipeline = Pipeline([ResizeShortestSide([side], 133, "floor", "torch_float")])
    pixels, _, _ = pipeline(PIXELS, *NO_BOXES, (0,))
    assert pixels.dtype == np.float32
    assert_close(torch.from_numpy(pixels).permute(2, 0, 1), expected, 1e-5)
    no_boxes, no_labels = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    batch = Collator(32).collate([Example(pixels, FlipResize(pixels.shape[:2]), no_boxes, no_labels, (48, 64), 0)])
    assert torch.equal(
        batch.pixels[0, :, : pixels.shape[0], : pixels.shape[1]], torch.from_numpy(pixels).permute(2, 0, 1)
    )
    assert batch.pixels[0, :, pixels.shape[0] :].abs().sum() == 0


def test_large_scale_jitter_keeps_boxes_on_their_pixels():
    """A bright square stays inside its box for any scale and window."""
    pixels = np.zeros((120, 160, 3), np.uint8)
    pixels[30:70, 50:110] = 255
    pipeline = Pipeline([LargeScaleJitter((96, 128), (0.5, 2.0))])
    scales = []
    for index in range(100):
        out, boxes, _ = pipeline(pixels, np.array([[50.0, 30, 110, 70]]), np.array([1]), (0, 0, index))
        assert out.shape[0] <= 96 and out.shape[1] <= 128
        bright = out[..., 0] > 127
        if not len(boxes):
            assert bright.sum() <= 128
            continue
        columns, rows = np.flatnonzero(bright.any(axis=0)), np.flatnonzero(bright.any(axis=1))
        found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert np.abs(boxes[0] - found).max() <= 1
        scales.append((boxes[0, 2] - boxes[0, 0]) / 60)
    assert min(scales) < 0.45 and max(scales) > 1.2


def test_boxes_are_dropped_by_their_visibility_after_all_crops_together():
    # 20 px wide; the first cut leaves 14 of them (70 %), the second 7 (35 %)
    boxes, labels = np.array([[10.0, 10, 30, 20], [0, 0, 10, 10]]), np.array([5, 6])
    cuts = [A.Crop(0, 0, 24, 48, p=1), A.Crop(0, 0, 17, 48, p=1)]
    for min_visibility, expected in [(0.0, [5, 6]), (0.34, [5, 6]), (0.36, [6])]:
        _, kept, left = Pipeline(cuts, min_visibility=min_visibility)(PIXELS, boxes, labels, (0, 0, 0))
        assert left.tolist() == expected
    _, kept, left = Pipeline(cuts, min_area=75)(PIXELS, boxes, labels, (0, 0, 0))  # 70 and 100 px^2
    assert left.tolist() == [6]
    assert kept.tolist() == [[0, 0, 10, 10]]


def test_min_area_counts_in_the_input_frame():
    tiny = np.array([[4.0, 4, 4.8, 4.8]])  # 0.64 px^2, then 16 times as much
    for chain in ([ResizeShortestSide([192], 256)], [A.HorizontalFlip(p=1), ResizeShortestSide([192], 256)]):
        assert len(Pipeline(chain)(PIXELS, tiny, np.array([0]), (0, 0, 0))[1]) == 1


def test_boxes_outside_the_image_are_clipped_or_dropped():
    boxes = np.array([[-5.0, -5, 10, 10], [70, 0, 80, 10], [60, 40, 65, 50], [np.nan, 0, 3, 3], [9, 9, 9, 20]])
    _, kept, labels = Pipeline([A.HorizontalFlip(p=0)])(PIXELS, boxes, np.arange(5), (0, 0, 0))
    assert labels.tolist() == [0, 2]
    np.testing.assert_allclose(kept, [[0, 0, 10, 10], [60, 40, 64, 48]], rtol=1e-6)


CHAINS = {
    "flips": [A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5), A.Transpose(p=0.5)],
    "crop": [A.RandomResizedCrop(size=(32, 40), scale=(0.2, 1.0), p=1)],
    "safe crop": [A.RandomSizedBBoxSafeCrop(height=40, width=50, p=1)],
    "affine": [A.Affine(scale=(0.5, 1.5), rotate=(-30, 30), shear=(-10, 10), translate_percent=(-0.2, 0.2), p=1)],
    "perspective": [A.Perspective(p=1)],
    "photometric": [A.RandomBrightnessContrast(p=1), A.HueSaturationValue(p=1), A.GaussianBlur(p=0.5)],
    "one of": [
        A.OneOf([A.HorizontalFlip(p=1), A.RandomCrop(height=30, width=30, p=1)], p=1),
        A.SomeOf([A.Transpose(), A.NoOp()], n=1),
    ],
    "pad": [A.PadIfNeeded(min_height=100, min_width=100, p=1), A.RandomCrop(height=60, width=60, p=1)],
    "our own": [A.HorizontalFlip(p=0.5), ResizeShortestSide([40, 50], 100), LargeScaleJitter((64, 64))],
    "dropout": [A.CoarseDropout(p=1)],
}


@pytest.mark.filterwarnings(
    "ignore:invalid value encountered in divide:RuntimeWarning"
)  # CoarseDropout, on boxes under 1 px
@pytest.mark.parametrize("name", CHAINS)
def test_any_chain_keeps_boxes_and_labels_together(name):
    pipeline = Pipeline(CHAINS[name])
    random = np.random.default_rng(0)
    for index in range(40):
        boxes, _ = random_boxes(random, int(random.integers(0, 30)), 64, 48)
        labels = np.arange(len(boxes)) + 1000
        pixels, moved, kept = pipeline(PIXELS, boxes, labels, (0, 0, index))
        height, width = pixels.shape[:2]
        assert pixels.dtype == np.uint8
        assert moved.shape == (len(kept), 4)
        assert (moved.dtype, kept.dtype) == (np.float32, np.int64)
        assert (moved >= 0).all() and (moved <= (width, height, width, height)).all()
        assert (moved[:, 2:] > moved[:, :2]).all()
        assert (np.diff(kept) > 0).all()  # the order is kept, and no label occurs twice


@pytest.mark.parametrize("name", CHAINS)
def test_any_chain_accepts_images_without_objects(name):
    _, boxes, labels = Pipeline(CHAINS[name])(PIXELS, *NO_BOXES, (0, 0, 0))
    assert (boxes.shape, boxes.dtype) == ((0, 4), np.float32)
    assert (labels.shape, labels.dtype) == ((0,), np.int64)


def test_a_sample_is_a_function_of_its_key():
    chain = [A.RandomResizedCrop(size=(32, 40), p=1), A.RandomBrightnessContrast(p=0.5), A.HorizontalFlip(p=0.5)]
    one, other = Pipeline(chain), Pipeline(chain)
    keys = [(0, epoch, index) for epoch in range(3) for index in range(4)]
    expected = {key: one(PIXELS, *NO_BOXES, key)[0] for key in keys}
    for key in reversed(keys):
        assert np.array_equal(other(PIXELS, *NO_BOXES, key)[0], expected[key])
    assert len({pixels.tobytes() for pixels in expected.values()}) == len(keys)


def test_transforms_of_a_chain_draw_independently():
    pipeline = Pipeline([A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)])
    outcomes = Counter(pipeline(PIXELS, *NO_BOXES, (0, 0, index))[0].tobytes() for index in range(200))
    assert len(outcomes) == 4
    assert min(outcomes.values()) > 25


def test_pixels_that_are_not_uint8_rgb_are_refused():
    for transform in (A.Normalize(), A.ToFloat()):
        with pytest.raises(ValueError, match=r"expected uint8 \[h, w, 3\] at the end, got float32"):
            Pipeline([transform])(PIXELS, *NO_BOXES, (0, 0, 0))


def test_pipeline_can_be_pickled():
    pipeline = Pipeline([A.HorizontalFlip(p=0.5), ResizeShortestSide([40, 50], 100)], min_visibility=0.2)
    boxes, labels = random_boxes(np.random.default_rng(0), 5, 64, 48)
    for mine, theirs in zip(
        pipeline(PIXELS, boxes, labels, (1, 2, 3)),
        pickle.loads(pickle.dumps(pipeline))(PIXELS, boxes, labels, (1, 2, 3)),
        strict=True,
    ):
        assert np.array_equal(mine, theirs)
