from __future__ import annotations

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from fpn_det.annotations.reading import read_annotations
from fpn_det.data.collation import Collator
from fpn_det.data.dataset import DetectionDataset
from fpn_det.data.flip_resize import FlipResize
from fpn_det.data.loaders import EvalLoader, TrainLoader
from fpn_det.data.sampling import GlobalBatches, Key
from fpn_det.data.transforms import LargeScaleJitter, Normalize, Pipeline, ResizeShortestSide
from fpn_det.data.workers import Workers
from fpn_det.image_io import read_image, reduction_to
from fpn_det.runtime import Ranks
from fpn_det.structures import Batch

CPU = torch.device("cpu")
SMOOTH = cv2.resize(
    np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8), (80, 48), interpolation=cv2.INTER_CUBIC
)

NOISE = np.random.default_rng(0).integers(0, 256, SMOOTH.shape, dtype=np.uint8)
BACKENDS = [("cv2", False), ("cv2", True), ("pil", True), ("torch_float", False), ("torch_float", True)]


def applied(step: FlipResize, pixels: np.ndarray) -> np.ndarray:
    out = np.empty((*step.size, 3), np.float32 if step.returns_float else np.uint8)
    step.apply(pixels, out)
    return out


def applied_on_device(step: FlipResize, pixels: np.ndarray) -> Tensor:
    out = torch.empty(*step.size, 3, dtype=torch.float32 if step.returns_float else torch.uint8)
    step.apply_on_device(torch.from_numpy(pixels), out)
    return out


@pytest.mark.parametrize(("backend", "antialias"), BACKENDS)
@pytest.mark.parametrize("size", [(48, 80), (75, 133), (24, 40), (20, 33), (40, 90)])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("pixels", [SMOOTH, NOISE], ids=["smooth", "noise"])
def test_device_and_worker_resize_equally_up_to_interpolation(backend, antialias, size, flip, pixels):
    step = FlipResize(size, flip, backend, antialias)
    expected, found = applied(step, pixels), applied_on_device(step, pixels).numpy()
    assert found.dtype == expected.dtype
    assert np.abs(found.astype(float) - expected).max() <= 1


@pytest.mark.parametrize(("backend", "antialias"), BACKENDS)
def test_apply_writes_only_to_its_part_of_the_canvas(backend, antialias):
    for size, flip in [((20, 33), True), ((60, 100), True), ((48, 80), True), ((48, 80), False)]:
        step = FlipResize(size, flip, backend, antialias)
        canvas = np.full((64, 128, 3), 7, np.float32 if step.returns_float else np.uint8)
        step.apply(SMOOTH, canvas[: size[0], : size[1]])
        assert np.array_equal(canvas[: size[0], : size[1]], applied(step, SMOOTH))
        assert (canvas[size[0] :] == 7).all() and (canvas[:, size[1] :] == 7).all()


@pytest.mark.parametrize("size", [(20, 33), (60, 100), (48, 80)])
def test_flip_before_or_after_the_resize_differs_by_rounding_only(size):
    flipped = applied(FlipResize(size, flip=True), SMOOTH)
    assert np.abs(flipped.astype(int) - applied(FlipResize(size), SMOOTH)[:, ::-1]).max() <= 1


CHAINS = {
    "default": [A.HorizontalFlip(p=0.5), ResizeShortestSide([40, 48, 64], 100)],
    "resize first": [ResizeShortestSide([40, 48, 64], 100), A.HorizontalFlip(p=0.5)],
    "others before": [
        A.RandomBrightnessContrast(p=0.5),
        A.VerticalFlip(p=0.5),
        A.HorizontalFlip(p=0.5),
        ResizeShortestSide([40, 64], 100),
    ],
    "flip between": [A.HorizontalFlip(p=0.5), A.RandomCrop(30, 30), ResizeShortestSide([40, 64], 100, backend="pil")],
    "now and then": [ResizeShortestSide([64], 100, p=0.5)],
    "float": [
        A.HorizontalFlip(p=0.5),
        Normalize((0.5,) * 3, (0.2,) * 3),
        ResizeShortestSide([40], 100, backend="torch_float"),
    ],
    "flip alone": [A.HorizontalFlip(p=0.5)],
}


def assert_same(one: Batch, other: Batch) -> None:
    assert one.pixels.stride() == other.pixels.stride()
    for name in ("pixels", "sizes", "original_sizes", "indices"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    for name in ("boxes", "labels", "valid"):
        assert torch.equal(getattr(one.targets, name), getattr(other.targets, name)), name


def batches(dataset: DetectionDataset, resize_on, workers: int) -> list[Batch]:
    order = GlobalBatches(dataset.annotations.sizes, 3, seed=1)
    options = (Collator(32, resize_on=resize_on), Workers(workers), CPU)
    train = TrainLoader(dataset, order, Ranks(), 1, *options).iterate(0)
    return [next(train) for _ in range(5)] + list(EvalLoader(dataset, 3, Ranks(), *options))


@pytest.mark.parametrize("name", CHAINS)
def test_batches_do_not_depend_on_where_they_are_resized(document, write, pictures, name):
    dataset = DetectionDataset(read_annotations(write(document), pictures), Pipeline(CHAINS[name]), seed=5)
    expected = batches(dataset, "worker", 0)
    for workers in (0, 1):
        for one, other in zip(expected, batches(dataset, "device", workers), strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("name", ["default", "resize first", "others before", "flip between"])
def test_deferred_transforms_equal_those_of_albumentations(name):
    """Compare with the same chain followed by two inversions, which make every transform eager."""
    boxes, labels = np.array([[4.0, 5, 30, 20], [40, 7, 70, 44]]), np.array([7, 3])
    deferred, eager = Pipeline(CHAINS[name]), Pipeline([*CHAINS[name], A.InvertImg(p=1), A.InvertImg(p=1)])
    assert deferred.deferred and not eager.deferred
    for index in range(20):
        one, other = deferred(SMOOTH, boxes, labels, (0, 0, index)), eager(SMOOTH, boxes, labels, (0, 0, index))
        assert np.array_equal(one[1], other[1]) and np.array_equal(one[2], other[2])
        assert np.abs(one[0].astype(int) - other[0]).max() <= 1


@pytest.mark.parametrize(
    ("chain", "words"),
    [
        ([ResizeShortestSide([40], 100), A.Blur()], "got ResizeShortestSide, then Blur. Change the order"),
        (
            [ResizeShortestSide([40], 100), A.VerticalFlip(), A.HorizontalFlip()],
            "got ResizeShortestSide, then VerticalFlip, HorizontalFlip.",
        ),
        (
            [ResizeShortestSide([40], 100), ResizeShortestSide([20], 100)],
            "got ResizeShortestSide, then ResizeShortestSide.",
        ),
        ([LargeScaleJitter((64, 64))], "got LargeScaleJitter, then nothing."),
    ],
)
def test_transforms_that_cannot_be_deferred_to_the_device_are_refused(document, write, pictures, chain, words):
    dataset = DetectionDataset(read_annotations(write(document), pictures), Pipeline(chain), seed=0)
    with pytest.raises(ValueError, match=r"data\.resize_on=device: expected ResizeShortestSide at the end") as refusal:
        batches(dataset, "device", 0)
    assert words in str(refusal.value)
    batches(dataset, "worker", 0)


@pytest.mark.parametrize(
    ("size", "least", "expected"),
    [
        ((4000, 6000), (800, 1200), 4),  # 1000 x 1500; an eighth would be 500 x 750
        ((4000, 6000), (500, 750), 8),
        ((4000, 6000), (501, 750), 4),
        ((4000, 6004), (500, 750), 4),  # 6004 / 8 = 750.5
        ((4000, 6001), (500, 750), 1),
        ((480, 640), (800, 1067), 1),
    ],
)
def test_reduction_keeps_the_least_size_and_whole_pixels(size, least, expected):
    assert reduction_to(size, least) == expected


def test_reduced_decoding_keeps_boxes_and_nearly_the_pixels(document, write, tmp_path):
    large = cv2.resize(SMOOTH, (640, 480), interpolation=cv2.INTER_CUBIC)
    assert cv2.imwrite(str(tmp_path / "large.jpg"), large)
    assert cv2.imwrite(str(tmp_path / "large.png"), large)
    names = {7: "large.jpg", 17: "large.png"}
    document["images"] = [
        {"id": number, "file_name": name, "width": 640, "height": 480} for number, name in names.items()
    ]
    document["annotations"] = document["annotations"][:2]
    annotations = read_annotations(write(document), tmp_path)
    examples = [
        DetectionDataset(annotations, Pipeline([A.HorizontalFlip(p=1), ResizeShortestSide([110], 200)]), 0, reduce)[
            Key(row, 0)
        ]
        for row in (0, 1)
        for reduce in (False, True)
    ]
    # 110 < 480 / 4 = 120; PNG cannot be decoded at a reduced size
    assert [example.pixels.shape for example in examples] == [
        (480, 640, 3),
        (120, 160, 3),
        (480, 640, 3),
        (480, 640, 3),
    ]
    full, reduced = (applied(example.flip_resize, example.pixels).astype(int) for example in examples[:2])
    assert np.array_equal(examples[0].boxes, examples[1].boxes) and len(examples[0].boxes) == 2
    assert np.abs(full - reduced).mean() < 1
    chain = [A.RandomCrop(200, 200), ResizeShortestSide([40], 200)]  # crops in pixels of the file
    dataset = DetectionDataset(annotations, Pipeline(chain), 0, reduced_decoding=True)
    assert dataset[Key(0, 0)].pixels.shape == (200, 200, 3)


def test_reduced_reading_is_upright_and_refuses_truncated_files(tmp_path):
    content = cv2.imencode(".jpg", np.ascontiguousarray(SMOOTH[..., ::-1]))[1].tobytes()
    path = tmp_path / "cut.jpg"
    path.write_bytes(content)
    assert (
        np.abs(read_image(path, 2).astype(int) - cv2.resize(SMOOTH, (40, 24), interpolation=cv2.INTER_AREA)).mean() < 3
    )
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cut\.jpg: expected a complete image"):
        read_image(path, 2)


@pytest.mark.parametrize("resize_on", ["worker", "device"])
def test_a_tiny_image_and_one_with_three_thousand_objects_make_a_batch(document, write, tmp_path, resize_on):
    random = np.random.default_rng(0)
    document["images"] = []
    for number, side in ((1, 10), (2, 100)):
        assert cv2.imwrite(str(tmp_path / f"{number}.png"), random.integers(0, 256, (side, side, 3), dtype=np.uint8))
        document["images"].append({"id": number, "file_name": f"{number}.png", "width": side, "height": side})
    corners = random.integers(0, 90, (3000, 2)).tolist()
    boxes = [(1, [2, 3, 4, 5]), *((2, [x, y, 8, 9]) for x, y in corners)]
    document["annotations"] = [
        {"id": number, "image_id": image, "category_id": 3, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for number, (image, box) in enumerate(boxes, start=1)
    ]
    dataset = DetectionDataset(
        read_annotations(write(document), tmp_path), Pipeline([ResizeShortestSide([320], 400)]), seed=0
    )
    (batch,) = EvalLoader(dataset, 2, Ranks(), Collator(32, resize_on=resize_on), Workers(), CPU)
    assert batch.pixels.shape == (2, 3, 320, 320) and batch.targets.boxes.shape == (2, 4096, 4)
    assert batch.targets.valid.sum(dim=1).tolist() == [1, 3000]
    assert batch.targets.boxes[0, 0].tolist() == [64, 96, 192, 256]  # times 32
