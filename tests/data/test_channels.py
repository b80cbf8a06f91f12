"""Images of other channels and more bits on their way to a batch: every channel goes the way that a single one goes."""

from __future__ import annotations

from pathlib import Path

import albumentations as A
import numpy as np
import pytest
import torch
from compare import assert_close
from tiny import TINY

from fpn_det.composition import compose
from fpn_det.data.channel_statistics import measure_channels
from fpn_det.data.collation import Collator
from fpn_det.data.dataset import Example
from fpn_det.data.flip_resize import FlipResize, resize
from fpn_det.data.image_cache import ImageCache
from fpn_det.data.mixing import CopyPaste, MixUp, Mosaic, Scene
from fpn_det.data.transforms import LargeScaleJitter, Normalize, Pipeline, ResizeShortestSide
from fpn_det.image_io import BadImage, PixelFormat, read_image
from fpn_det.structures import Annotations, Batch, Targets

FORMATS = [PixelFormat(1), PixelFormat(4), PixelFormat(9), PixelFormat(5, "uint16"), PixelFormat(3, "uint16")]
FORMATS += [PixelFormat(2, "float32")]
BOXES, LABELS = np.array([[3.0, 4, 30, 20]]), np.array([1])


def noise(pixel_format: PixelFormat, height: int = 40, width: int = 50) -> np.ndarray:
    high = {"uint8": 256, "uint16": 65536, "float32": 9000}[pixel_format.dtype]
    values = np.random.default_rng(0).integers(0, high, (height, width, pixel_format.channels))
    return values.astype(pixel_format.dtype)


def assert_near(found: np.ndarray, expected: np.ndarray, levels: float) -> None:
    """OpenCV rounds several channels otherwise than one: by less than a grey level, or 1e-5 of a float."""
    difference = np.abs(found.astype(np.float64) - expected.astype(np.float64)).max()
    assert difference <= levels * (1 if found.dtype.kind == "u" else 1e-4 * float(np.abs(expected).max()))


@pytest.mark.parametrize("pixel_format", FORMATS, ids=str)
@pytest.mark.parametrize("backend", ["cv2", "torch_float"])
@pytest.mark.parametrize("antialias", [False, True])
def test_channels_are_flipped_and_resized_one_by_one(pixel_format, backend, antialias):
    pixels = noise(pixel_format)
    for size in ((20, 25), (64, 80), (33, 80), (40, 50)):
        for flip in (False, True):
            step = FlipResize(size, flip, backend, antialias)
            dtype = np.float32 if step.returns_float else pixels.dtype
            canvas = np.zeros((70, 90, pixel_format.channels), dtype)
            step.apply(pixels, canvas[: size[0], : size[1]])
            assert not canvas[size[0] :].any() and not canvas[:, size[1] :].any()
            source = pixels[:, ::-1] if flip else pixels
            for channel in range(pixel_format.channels):
                one = np.ascontiguousarray(np.repeat(source[..., channel, None], 3, axis=2))
                expected = resize(one, size, backend, antialias)[..., 0]
                assert_near(canvas[: size[0], : size[1], channel], expected, 1)


@pytest.mark.parametrize("pixel_format", FORMATS, ids=str)
@pytest.mark.parametrize("resize_on", ["worker", "device"])
def test_batches_hold_all_channels(pixel_format, resize_on):
    pixels = noise(pixel_format)
    examples = [
        Example(part, FlipResize(size, flip), BOXES.astype(np.float32), LABELS, part.shape[:2], 0)
        for part, size, flip in ((pixels, (20, 25), True), (pixels[:30], (30, 50), False))
    ]
    batch = Collator(32, resize_on=resize_on).collate(examples)
    assert batch.pixels.shape == (2, pixel_format.channels, 32, 64)
    assert str(batch.pixels.dtype) == f"torch.{pixel_format.dtype}"
    assert np.array_equal(batch.pixels[1, :, :30, :50].permute(1, 2, 0).numpy(), pixels[:30])
    assert not batch.pixels[1, :, 30:].numpy().any()
    other = Collator(32, resize_on="worker").collate(examples)
    assert torch.equal(batch.pixels, other.pixels)


@pytest.mark.parametrize("pixel_format", FORMATS, ids=str)
def test_a_chain_keeps_channels_and_dtype(pixel_format):
    chain = [A.HorizontalFlip(p=1), A.VerticalFlip(p=1), A.RandomCrop(30, 40, p=1), ResizeShortestSide([60], 90)]
    pixels = noise(pixel_format)
    found, boxes, labels = Pipeline(chain, pixel_format=pixel_format)(pixels, BOXES, LABELS, (0,))
    assert found.dtype == pixel_format.dtype and found.shape == (60, 80, pixel_format.channels)
    # the channels move together: as the first one does alone
    alone = PixelFormat(1, pixel_format.dtype)
    first, same, _ = Pipeline(chain, pixel_format=alone)(pixels[..., :1], BOXES, LABELS, (0,))
    assert_near(found[..., :1], first, 1)
    assert np.array_equal(boxes, same) and labels.tolist() == [1]


@pytest.mark.parametrize("pixel_format", FORMATS, ids=str)
@pytest.mark.parametrize("mixing", [Mosaic((60, 70)), MixUp(), CopyPaste()])
def test_mixing_keeps_channels_and_dtype(pixel_format, mixing):
    pixels = noise(pixel_format)
    scene = Scene(pixels, BOXES, LABELS, np.ones(1))
    chain = Pipeline([mixing, ResizeShortestSide([40], 90)], pixel_format=pixel_format)
    found, *_ = chain.prepare((40, 50), BOXES, LABELS, lambda least: pixels, (0,), lambda draw: scene)
    assert found.dtype == pixel_format.dtype and found.shape[2] == pixel_format.channels


def test_large_scale_jitter_and_normalization_take_any_channels():
    pixel_format = PixelFormat(6, "uint16")
    chain = [LargeScaleJitter((32, 32)), Normalize([0.5] * 6, [2.0] * 6)]
    found, *_ = Pipeline(chain, pixel_format=pixel_format)(noise(pixel_format), BOXES, LABELS, (0,))
    assert found.dtype == np.float32 and found.shape[2] == 6


@pytest.mark.parametrize(
    ("step", "pixel_format", "words"),
    [
        (A.HueSaturationValue(p=1), PixelFormat(4), r"HueSaturationValue: expected a transform that takes 4 channels of 8 bits"),
        (A.OneOf([A.ToGray(p=1)], p=1), PixelFormat(4), r"OneOf: expected a transform that takes 4 channels"),
        (A.RandomBrightnessContrast(p=1), PixelFormat(3, "uint16"), r"RandomBrightnessContrast: expected images of 8 bits"),
        (A.Sequential([A.Blur(p=1)], p=1), PixelFormat(2, "float32"), r"Blur: expected images of 8 bits, .* got 2 channels of float32"),
        (Normalize([0.1] * 3, [1.0] * 3), PixelFormat(4), r"Normalize: expected a transform that takes 4 channels"),
        (ResizeShortestSide([60], 90, backend="pil"), PixelFormat(4), r"expected backend cv2 or torch_float"),
    ],
)  # fmt: skip
def test_a_transform_that_does_not_take_the_format_is_refused(step, pixel_format, words):
    with pytest.raises(ValueError, match=words):
        Pipeline([step], pixel_format=pixel_format)


def test_a_transform_of_colors_of_eight_bits_takes_any_channels():
    pixel_format = PixelFormat(4)
    chain = Pipeline([A.RandomBrightnessContrast(p=1)], pixel_format=pixel_format)
    found, *_ = chain(noise(pixel_format), BOXES, LABELS, (0,))
    assert found.shape == (40, 50, 4) and not np.array_equal(found, noise(pixel_format))


def test_the_cache_keeps_formats_apart(tmp_path):
    values = noise(PixelFormat(3, "uint16"))
    np.save(tmp_path / "a.npy", values)
    for pixel_format in (PixelFormat(3, "uint16"), PixelFormat(3, "float32"), PixelFormat()):
        expected = read_image(tmp_path / "a.npy", pixel_format=pixel_format)
        cache = ImageCache(tmp_path / "cache", pixel_format=pixel_format)
        for _ in range(2):
            found = cache.read(tmp_path / "a.npy")
            assert found.dtype == expected.dtype and np.array_equal(found, expected)
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 3


def images(folder: Path, arrays: list[np.ndarray]) -> Annotations:
    for number, values in enumerate(arrays):
        np.save(folder / f"{number}.npy", values)
    paths = [str(folder / f"{number}.npy") for number in range(len(arrays))]
    return Annotations.without_objects(paths, [values.shape[:2] for values in arrays], ["thing"], [1])


def read_any(path: Path, reduction: int) -> np.ndarray:
    return np.load(path)


def test_mean_and_deviation_are_those_of_all_pixels(tmp_path):
    first, second = noise(PixelFormat(4, "uint16")), noise(PixelFormat(4, "uint16"), 10, 20) // 7
    found = measure_channels(images(tmp_path, [first, second]), read_any)
    pixels = np.concatenate([first.reshape(-1, 4), second.reshape(-1, 4)]).astype(np.float64)
    assert_close(torch.tensor(found.mean), torch.tensor(pixels.mean(axis=0)).float(), 1e-5)
    assert_close(torch.tensor(found.std), torch.tensor(pixels.std(axis=0)).float(), 1e-5)
    assert found.num_images == 2 and "measured on 2 training images" in found.describe()


def test_mean_and_deviation_by_hand(tmp_path):
    # channel 0: 1, 3 and 5, 7: mean 4, deviation sqrt((9 + 1 + 1 + 9) / 4); channel 1: 0, 0 and 2, 2
    one, two = np.array([[[1, 0], [3, 0]]], np.uint8), np.array([[[5, 2], [7, 2]]], np.uint8)
    found = measure_channels(images(tmp_path, [one, two]), read_any)
    assert found.mean == [4.0, 1.0] and found.std == [2.23607, 1.0]


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_measured_channels_are_in_the_order_of_the_model(tmp_path, order):
    values = noise(PixelFormat(3, "uint16"), 64, 64) // np.array([1, 10, 100], np.uint16)
    annotations = images(tmp_path, [values])
    config = compose([*TINY, "data.dtype=uint16", f"model.channel_order={order}"])
    measured = config.measure_channels(annotations)
    model = config.with_normalization(measured.mean, measured.std).build_model(1)
    batch = Batch(
        torch.from_numpy(values).permute(2, 0, 1)[None],  # [h, w, C] -> [1, C, h, w]
        *[torch.tensor([[64, 64]])] * 2,
        Targets.pad([torch.zeros(0, 4)], [torch.zeros(0).long()]),
        torch.tensor([0]),
    )
    found = model.normalize(batch)
    assert found.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert (found.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-3


def test_a_channel_that_does_not_vary_and_files_that_do_not_open_are_refused(tmp_path):
    values = noise(PixelFormat(3))
    values[..., 1] = 7
    annotations = images(tmp_path, [values])
    with pytest.raises(ValueError, match="got 7 everywhere in channel 1 of 1 training images"):
        measure_channels(annotations, read_any)

    def fail(path: Path, reduction: int) -> np.ndarray:
        raise BadImage(path, "broken")

    with pytest.raises(ValueError, match="got none that can be read"):
        measure_channels(annotations, fail)
