from __future__ import annotations

import random
from functools import partial
from itertools import islice

import albumentations as A
import numpy as np
import pytest
import torch
from test_flip_resize import assert_same

from fpn_det.annotations.reading import read_annotations
from fpn_det.data.collation import Collator
from fpn_det.data.dataset import DetectionDataset
from fpn_det.data.loaders import TrainLoader
from fpn_det.data.mixing import CopyPaste, MixUp, Mosaic, Scene
from fpn_det.data.sampling import GlobalBatches
from fpn_det.data.transforms import LargeScaleJitter, Pipeline, ResizeShortestSide
from fpn_det.data.workers import Workers
from fpn_det.runtime import Ranks
from fpn_det.structures import Batch

CPU = torch.device("cpu")


def square(value: int, height: int, width: int, box: tuple[int, int, int, int], label: int = 0) -> Scene:
    """Return a grey square on black."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = value
    return Scene(pixels, np.array([box], np.float64), np.array([label]), np.ones(1))


def test_mosaic_keeps_boxes_on_their_pixels():
    scenes = [square(200, 60, 80, (20, 15, 60, 45), number) for number in range(3)]
    for number, scene in enumerate(scenes):  # red, green, blue
        scene.pixels[..., [channel for channel in range(3) if channel != number]] = 0
    nothing = Scene(np.zeros((60, 80, 3), np.uint8), np.zeros((0, 4)), np.zeros(0, np.int64), np.ones(0))
    mosaic, whole, cut = Mosaic((96, 128), (0.5, 1.5), fill=0), 0, 0
    for seed in range(60):
        order = [*scenes[seed % 3 :], nothing, *scenes[: seed % 3]]
        mixed = mosaic(order[0], order[1:], random.Random(seed))
        assert mixed.pixels.shape == (96, 128, 3)
        for box, label, visible in zip(mixed.boxes, mixed.labels.tolist(), mixed.visible.tolist(), strict=True):
            shown = mixed.pixels[..., label] > 100
            if visible < 0.05:
                assert shown.sum() < 0.1 * 90 * 60
                continue
            columns, rows = np.flatnonzero(shown.any(axis=0)), np.flatnonzero(shown.any(axis=1))
            found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert np.abs(box - found).max() <= 1
            whole, cut = whole + (visible == 1), cut + (visible < 1)
    assert whole > 15 and cut > 40


def test_mosaic_places_each_image_at_the_center_by_the_arithmetic():
    # fits 40 x 40 in 80 x 80 by 2, times 0.5 = 1; center (40, 40)
    scenes = [square(200, 40, 40, (10, 10, 30, 20), number) for number in range(4)]
    mixed = Mosaic((80, 80), (0.5, 0.5), (0.5, 0.5))(scenes[0], scenes[1:], random.Random(0))
    assert mixed.boxes.tolist() == [[10, 10, 30, 20], [50, 10, 70, 20], [10, 50, 30, 60], [50, 50, 70, 60]]
    assert mixed.labels.tolist() == [0, 1, 2, 3] and mixed.visible.tolist() == [1] * 4
    # twice as large: of the first image only the lower right quarter is left, which has a corner of the box
    mixed = Mosaic((80, 80), (1, 1), (0.5, 0.5))(scenes[0], scenes[1:], random.Random(0))
    # 20..60 x 20..40 in a frame that starts at -40: -20..20 x -20..0, cut to 0..20 x 0..0
    assert mixed.boxes[0].tolist() == [0, 0, 20, 0] and mixed.visible[0] == 0
    # starts at (40, 40), to the right and below: 60..100 x 60..80, cut to 60..80
    assert mixed.boxes[3].tolist() == [60, 60, 80, 80] and mixed.visible[3] == 0.5


@pytest.mark.parametrize(
    ("dtype", "fill", "border"),
    [
        ("uint8", None, [114, 114]),
        ("uint16", None, [6, 4]),  # the means by channel
        ("float32", None, [6.25, 4.5]),
        ("float32", 0.5, [0.5, 0.5]),
    ],
)
def test_mosaic_fills_with_a_value_of_the_images(dtype, fill, border):
    pixels = np.zeros((40, 40, 2), dtype)
    pixels[:20, :, 0], pixels[:, :30, 1] = 12.5, 6
    scene = Scene(pixels, np.zeros((0, 4)), np.zeros(0, np.int64), np.ones(0))
    mixed = Mosaic((80, 80), (0.25, 0.25), (0.5, 0.5), fill)(scene, [scene] * 3, random.Random(0))  # 20 x 20 px each
    assert mixed.pixels.dtype == dtype and mixed.pixels[0, 0].tolist() == border
    assert (mixed.pixels[:20] == mixed.pixels[0, 0]).all() and not (
        mixed.pixels[20:60, 20:60] == mixed.pixels[0, 0]
    ).all()


def test_mix_up_keeps_the_objects_of_both():
    own, other = square(200, 40, 60, (10, 10, 20, 20), 1), square(100, 80, 80, (40, 40, 80, 80), 2)
    mixed = MixUp(alpha=1e6)(own, [other], random.Random(0))  # weight 0.5
    assert mixed.pixels.shape == (40, 60, 3)
    assert mixed.boxes.tolist() == [[10, 10, 20, 20], [20, 20, 40, 40]]  # the other image at half its size
    assert mixed.labels.tolist() == [1, 2] and mixed.visible.tolist() == [1, 1]
    assert abs(int(mixed.pixels[15, 15, 0]) - 100) <= 1 and abs(int(mixed.pixels[30, 30, 0]) - 50) <= 1
    assert own.pixels[15, 15, 0] == 200  # the inputs do not change


def test_copy_paste_hides_what_it_covers():
    own = square(200, 40, 40, (0, 0, 40, 40), 1)
    other = square(100, 80, 80, (40, 40, 60, 50), 2)
    for seed in range(10):
        mixed = CopyPaste()(own, [other], random.Random(seed))
        assert mixed.labels.tolist() == [1, 2]
        x1, y1, x2, y2 = mixed.boxes[1].astype(int).tolist()
        assert (x2 - x1, y2 - y1) == (20, 10) and (mixed.pixels[y1:y2, x1:x2] == 100).all()
        assert (mixed.pixels == 100).sum() == 20 * 10 * 3
        assert mixed.visible.tolist() == [1 - 200 / 1600, 1]
    too_large = CopyPaste()(square(1, 8, 8, (0, 0, 4, 4)), [other], random.Random(0))
    assert too_large.labels.tolist() == [0]


def test_a_fully_covered_box_is_dropped():
    own = square(200, 40, 40, (18, 18, 22, 22), 1)
    other = square(100, 40, 40, (0, 0, 40, 40), 2)
    _, _, labels, _ = Pipeline([CopyPaste()]).prepare(
        (40, 40), own.boxes, own.labels, lambda least: own.pixels, (0,), lambda random_state: other
    )
    assert labels.tolist() == [2]


def reading(pixels: np.ndarray, least: tuple[int, int] | None) -> np.ndarray:
    return pixels


STEPS = [
    Mosaic((50, 70)),
    MixUp(),
    CopyPaste(5),
    A.HorizontalFlip(p=0.5),
    A.VerticalFlip(p=0.5),
    A.Transpose(p=0.5),
    A.RandomResizedCrop(size=(40, 50), scale=(0.2, 1.0)),
    A.Affine(scale=(0.5, 1.5), rotate=(-30, 30), shear=(-10, 10), translate_percent=(-0.2, 0.2)),
    A.Perspective(),
    A.PadIfNeeded(min_height=90, min_width=90),
    A.RandomBrightnessContrast(p=1),
    A.OneOf([A.HorizontalFlip(p=1), A.RandomSizedBBoxSafeCrop(height=40, width=50, p=1)], p=1),
    LargeScaleJitter((64, 64)),
    ResizeShortestSide([40, 50], 100),
]


@pytest.mark.parametrize("seed", range(30))
def test_any_pipeline_keeps_boxes_and_labels_together(seed):
    draw = random.Random(seed)
    chosen = sorted(draw.sample(range(len(STEPS)), draw.randint(1, 6)), key=lambda number: number if number < 3 else 3)
    pipeline = Pipeline(
        [STEPS[number] for number in chosen],
        min_visibility=draw.choice([0.0, 0.0, 0.3]),
        min_area=draw.choice([1.0, 9.0]),
    )
    numbers = np.random.default_rng(seed)

    def scene(first: int) -> Scene:
        height, width, count = (int(numbers.integers(*limits)) for limits in ((20, 90), (20, 90), (0, 300)))
        corners = numbers.uniform(-0.05, 1.05, (count, 2, 2)) * (width, height)
        boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
        pixels = numbers.integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Scene(pixels, boxes, np.arange(count) + first, np.ones(count))

    for number in range(5):
        own = scene(0)
        _, boxes, labels, flip_resize = pipeline.prepare(
            own.size, own.boxes, own.labels, partial(reading, own.pixels), (seed, number), lambda draw: scene(1000)
        )
        height, width = flip_resize.size
        assert boxes.shape == (len(labels), 4)
        assert (boxes.dtype, labels.dtype) == (np.float32, np.int64)
        assert (boxes >= 0).all() and (boxes <= (width, height, width, height)).all()
        assert ((boxes[:, 2:] - boxes[:, :2]).prod(axis=1) >= pipeline.min_area).all()
        for image in np.unique(labels // 1000):
            of_image = labels[labels // 1000 == image]
            if not any(isinstance(step, CopyPaste | Mosaic | MixUp) for step in pipeline.mixing):
                assert (np.diff(of_image) > 0).all()  # the order is kept, and no label occurs twice
            assert len(np.unique(of_image)) <= 300


@pytest.fixture
def dataset(document, write, pictures) -> DetectionDataset:
    mixing = [Mosaic((64, 96), p=0.7), MixUp(p=0.5), CopyPaste(p=0.7)]
    chain = [*mixing, A.RandomBrightnessContrast(), A.HorizontalFlip(), ResizeShortestSide([48, 64], 100)]
    return DetectionDataset(read_annotations(write(document), pictures), Pipeline(chain, min_visibility=0.1), seed=5)


def batches(
    dataset: DetectionDataset, workers: int = 0, ranks: Ranks | None = None, resize_on="worker", count: int = 5
) -> list[Batch]:
    ranks = ranks or Ranks()
    order = GlobalBatches(dataset.annotations.sizes, 4, seed=1, parts=ranks.world_size)
    collator = Collator(32, (128, 128), resize_on)
    return list(islice(TrainLoader(dataset, order, ranks, 1, collator, Workers(workers), CPU).iterate(0), count))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_mixed_batches_do_not_depend_on_workers_ranks_or_resize_on(dataset):
    expected = batches(dataset)
    for options in ({"workers": 1}, {"workers": 4}, {"resize_on": "device"}):
        for one, other in zip(expected, batches(dataset, **options), strict=True):
            assert_same(one, other)
    halves = [batches(dataset, ranks=Ranks(rank, 2)) for rank in (0, 1)]
    for step, one in enumerate(expected):
        assert torch.equal(torch.cat([half[step].pixels for half in halves]), one.pixels)


def test_mixed_images_differ_between_epochs(dataset):
    seen = [
        pixels.numpy().tobytes() for batch in batches(dataset, count=20) for pixels in batch.pixels
    ]  # 80 images of 10 epochs
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Mosaic((64,)), r"Mosaic: expected size \(h, w\)"),
        (lambda: Mosaic((64, 64), (1, 0.5)), "expected scale_range"),
        (lambda: Mosaic((64, 64), center_range=(0, 1)), "expected center_range"),
        (lambda: MixUp(0), "expected alpha above 0"),
        (lambda: CopyPaste(0), "expected max_objects of at least 1"),
        (lambda: CopyPaste(p=2), r"CopyPaste: expected p in 0\.\.1, got 2"),
        (
            lambda: Pipeline([A.HorizontalFlip(), MixUp()]),
            "expected MixUp before all others, got it after HorizontalFlip",
        ),
    ],
)
def test_mixing_refuses_invalid_arguments(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_mixing_a_single_image_is_refused():
    pixels = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="MixUp: expected images of a data set, got a single one"):
        Pipeline([MixUp()])(pixels, np.zeros((0, 4)), np.zeros(0, np.int64), (0,))
