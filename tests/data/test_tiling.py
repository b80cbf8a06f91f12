from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import albumentations as A
import numpy as np
import pytest
import torch
from PIL import Image
from test_loaders import assert_same

from fpn_det.data import loaders
from fpn_det.data.collation import Collator
from fpn_det.data.dataset import DetectionDataset
from fpn_det.data.loaders import EvalLoader, TrainLoader
from fpn_det.data.mixing import Mosaic
from fpn_det.data.proposals import SavedProposals
from fpn_det.data.sampling import GlobalBatches, Key
from fpn_det.data.tiles import Tiles, Tiling, TrainTiles, shown_objects
from fpn_det.data.transforms import Pipeline, ResizeShortestSide
from fpn_det.data.workers import Workers
from fpn_det.image_io import BadImage, read_image
from fpn_det.runtime import Ranks
from fpn_det.structures import Annotations, Batch

CPU = torch.device("cpu")


def test_tiles_are_evenly_spaced_and_end_with_the_image():
    # stride at most 100 * 0.8 = 80; 300 - 100 = 200 px of room in 3 steps: 66.7
    assert Tiling(100, 0.2).starts(300) == [0, 66, 133, 200]
    assert Tiling(100, 0.0).starts(300) == [0, 100, 200]
    assert Tiling(100, 0.2).starts(101) == [0, 1]
    assert Tiling(100, 0.2).starts(100) == Tiling(100, 0.2).starts(7) == [0]
    assert Tiling(100, 0.2).windows(80, 180) == [(0, 0, 100, 80), (80, 0, 180, 80)]


@pytest.mark.parametrize(("size", "overlap"), [(1, 0.0), (7, 0.5), (64, 0.2), (100, 0.99)])
def test_every_box_within_the_overlap_is_whole_in_a_tile(size: int, overlap: float):
    tiling, random = Tiling(size, overlap), np.random.default_rng(0)
    for length in (size + 1, 2 * size, 301):
        starts = tiling.starts(length)
        assert starts[0] == 0 and starts[-1] + size == max(length, size)
        side = int(size * overlap)
        for left in random.integers(0, length - side + 1, 50):
            assert any(start <= left and left + side <= start + size for start in starts)


@pytest.mark.parametrize("side", [50, 51, 1000])
def test_an_image_no_larger_than_a_tile_has_no_tiles(side: int):
    assert Tiling(side, 0.2).windows(50, 50) == []
    tiles = Tiles.of(torch.tensor([[50, 50], [30, 40]]), Tiling(side))
    assert len(tiles) == 0 and list(tiles.rows_of(1)) == []


@pytest.fixture
def annotations(tmp_path) -> Annotations:
    """Pictures of 60 x 100, 30 x 40 and 110 x 50 px."""
    random, sizes = np.random.default_rng(0), [(60, 100), (30, 40), (110, 50)]
    for number, size in enumerate(sizes):
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    paths = [str(tmp_path / f"{number}.png") for number in range(3)]
    return Annotations.without_objects(paths, sizes, ["cat"], [1], [7, 8, 9])


def dataset_of(annotations: Annotations, tiling: Tiling | None, transforms=(), read=read_image) -> DetectionDataset:
    tiles = None if tiling is None else Tiles.of(annotations.sizes, tiling)
    return DetectionDataset(annotations, Pipeline(transforms), 0, read=read, tiles=tiles)


def batches_of(dataset: DetectionDataset, batch_size: int, on_bad_image=None, workers: int = 0) -> list[Batch]:
    loader = EvalLoader(dataset, batch_size, Ranks(), Collator(32), Workers(workers), CPU, on_bad_image)
    batches = list(loader)
    assert len(loader) >= len(batches)
    return batches


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_the_tiles_of_a_batch_follow_it_and_show_their_windows(annotations, batch_size):
    whole = batches_of(dataset_of(annotations, None), batch_size)
    batches = batches_of(dataset_of(annotations, Tiling(40, 0.2)), batch_size)
    for one, other in zip(whole, [batch for batch in batches if batch.windows is None], strict=True):
        assert_same(one, other)
    present: list[int] = []
    seen: dict[int, list[list[int]]] = {0: [], 1: [], 2: []}
    for batch in batches:
        assert len(batch) <= batch_size
        if batch.windows is None:
            present = batch.indices.tolist()
            continue
        assert len(set(batch.indices.tolist())) == 1 and batch.indices[0] in present
        for row, index in enumerate(batch.indices.tolist()):
            left, top, right, bottom = batch.windows[row].tolist()
            expected = read_image(annotations.path(index))[top:bottom, left:right]
            assert batch.sizes[row].tolist() == batch.original_sizes[row].tolist() == [bottom - top, right - left]
            pixels = batch.pixels[row, :, : bottom - top, : right - left]
            assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)
            seen[index].append([left, top, right, bottom])
    assert seen[1] == []
    assert seen[0] == [[x, y, x + 40, y + 40] for y in (0, 20) for x in (0, 30, 60)]
    assert sorted(seen[2]) == sorted([x, y, x + 40, y + 40] for y in (0, 23, 46, 70) for x in (0, 10))


def test_tiles_do_not_depend_on_workers(annotations):
    dataset = dataset_of(annotations, Tiling(40, 0.2), [ResizeShortestSide([50], 90)])
    for one, other in zip(batches_of(dataset, 2), batches_of(dataset, 2, workers=2), strict=True):
        assert_same(one, other)
        assert (one.windows is None) == (other.windows is None)
        assert one.windows is None or torch.equal(one.windows, other.windows)


def test_an_image_is_decoded_once_for_its_tiles(annotations, monkeypatch):
    read: list[str] = []

    def reads(path: Path, reduction: int) -> np.ndarray:
        read.append(path.name)
        return read_image(path, reduction)

    batches_of(dataset_of(annotations, Tiling(20, 0.2), read=reads), 1)
    assert {name: read.count(name) for name in read} == {"0.png": 2, "1.png": 2, "2.png": 2}
    read.clear()
    monkeypatch.setattr(loaders, "TILE_BYTES", 4 * 20 * 20 * 3)  # four tiles at a time
    batches_of(dataset_of(annotations, Tiling(20, 0.2), read=reads), 1)
    assert {name: read.count(name) for name in read} == {"0.png": 2, "1.png": 2, "2.png": 2}


def test_a_bad_image_is_reported_once(annotations):
    annotations.path(0).write_bytes(annotations.path(0).read_bytes()[:-2000])
    bad: list[BadImage] = []
    batches = batches_of(dataset_of(annotations, Tiling(40, 0.2)), 2, on_bad_image=bad.append)
    assert [error.path.name for error in bad] == ["0.png"]
    assert {index for batch in batches for index in batch.indices.tolist()} == {1, 2}
    with pytest.raises(BadImage, match=r"0\.png"):
        batches_of(dataset_of(annotations, Tiling(40, 0.2)), 2)


def with_objects(
    annotations: Annotations, boxes: list[list[list[float]]], labels: list[int] | None = None
) -> Annotations:
    """The pictures with the boxes of each."""
    flat = torch.tensor([box for of_image in boxes for box in of_image], dtype=torch.float64).view(-1, 4)
    counts = torch.tensor([len(of_image) for of_image in boxes])
    return replace(
        annotations,
        boxes=flat,
        labels=torch.tensor(labels or [0] * len(flat)),
        iscrowd=torch.zeros(len(flat), dtype=torch.bool),
        area=(flat[:, 2:] - flat[:, :2]).prod(dim=1),
        annotation_ids=torch.arange(len(flat)),
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
    )


def test_objects_are_cut_to_their_tile(annotations):
    one = with_objects(annotations, [[[5, 6, 25, 36], [35, 15, 55, 25], [90, 50, 100, 60]], [], []])
    dataset = dataset_of(one, Tiling(40, 0.2))
    windows = {dataset[Key(row, 0)].window: dataset[Key(row, 0)].boxes.tolist() for row in range(3, 9)}
    assert windows[0, 0, 40, 40] == [[5, 6, 25, 36], [35, 15, 40, 25]]
    assert windows[30, 20, 70, 60] == [[5, 0, 25, 5]]  # 35 - 30, 15 - 20 clipped, 55 - 30, 25 - 20
    assert windows[60, 20, 100, 60] == [[30, 30, 40, 40]]


def train_tiles(
    annotations: Annotations, tiling: Tiling, min_visible=0.3, empty_share=0.0, of_classes=(1.0,)
) -> TrainTiles:
    classes = torch.tensor(of_classes, dtype=torch.float64)
    return TrainTiles.of_images(annotations, tiling, min_visible, empty_share, classes)


def test_training_leaves_out_objects_of_which_a_tile_shows_too_little(annotations):
    # tiles of 40 px at x = 0, 30, 60 and y = 0, 20; the box is 20 px wide, from 25 to 45, and from 0 to 10
    one = with_objects(annotations, [[[25, 0, 45, 10]], [], []])
    for min_visible, shown in (
        (0.0, [0, 1]),
        (0.75, [0, 1]),
        (0.76, []),
        (1.0, []),
    ):  # 15 px of 20 in each of two tiles
        tiles = train_tiles(one, Tiling(40, 0.2), min_visible)
        assert tiles.shows_objects[:6].nonzero()[:, 0].tolist() == shown
        dataset = DetectionDataset(one, Pipeline([]), 0, tiles=replace(tiles, reach=0))
        assert dataset[Key(3, 0)].boxes.tolist() == ([[25, 0, 40, 10]] if shown else [])
        assert dataset[Key(4, 0)].boxes.tolist() == ([[0, 0, 15, 10]] if shown else [])


@pytest.mark.parametrize("pairs", [1, 7, 1000])
def test_objects_of_tiles_equal_those_of_a_loop(annotations, monkeypatch, pairs):
    monkeypatch.setattr("fpn_det.data.tiles.PAIRS", pairs)
    random, sizes = np.random.default_rng(0), annotations.sizes.tolist()
    boxes = []
    for count, (height, width) in zip((9, 2, 0), sizes, strict=True):
        low = random.uniform(0, (width - 15, height - 15), (count, 2))
        boxes.append(np.hstack([low, low + random.uniform(3, 15, low.shape)]).tolist())
    many = replace(with_objects(annotations, boxes), iscrowd=torch.arange(11) == 4)
    tiles = Tiles.of(many.sizes, Tiling(30, 0.3))
    expected = []
    for tile in range(len(tiles)):
        left, top, right, bottom = tiles.window(tile)
        rows = many.rows(int(tiles.images[tile]))
        for row in range(rows.start, rows.stop):
            x1, y1, x2, y2 = many.boxes[row].tolist()
            inside = max(min(x2, right) - max(x1, left), 0) * max(min(y2, bottom) - max(y1, top), 0)
            if inside >= 0.3 * (x2 - x1) * (y2 - y1) and row != 4:
                expected.append((tile, row))
    found = list(zip(*(column.tolist() for column in shown_objects(tiles, many, 0.3)), strict=True))
    assert found == expected and len(found) > 9


def test_an_epoch_shows_every_image_every_tile_with_objects_and_a_share_of_the_others(annotations):
    one = with_objects(annotations, [[[5, 6, 15, 12], [90, 50, 100, 60]], [], [[0, 0, 9, 9]]])
    tiles = train_tiles(one, Tiling(20, 0.0), empty_share=0.4)
    busy = 3 + tiles.shows_objects.nonzero()[:, 0]
    assert len(tiles) == 15 + 4 + 18  # 3 x 5, 2 x 2 and 6 x 3
    assert len(busy) == 3  # each box is in one tile
    repeats = torch.cat([torch.ones(3, dtype=torch.float64), tiles.factors])
    batches = GlobalBatches(torch.cat([one.sizes, tiles.sizes]), 1, seed=3, repeats=repeats)
    assert batches.images_per_epoch == 3 + 3 + 2  # 2 of 5 tiles are empty
    assert tiles.describe() == "an epoch shows 3 whole images, 3 tiles with objects, and 2 of 34 tiles without"
    epochs = []
    for epoch in range(3):
        rows = [int(batches.slice(epoch * 8 + position)[1]) for position in range(8)]
        assert len(set(rows)) == 8 and {0, 1, 2, *busy.tolist()} <= set(rows)
        epochs.append(set(rows))
    assert epochs[0] != epochs[1] != epochs[2]
    assert train_tiles(one, Tiling(20, 0.0), empty_share=0.99).factors.tolist() == [1.0] * len(tiles)


def test_tiles_of_rare_classes_are_repeated(annotations):
    two = with_objects(annotations, [[[5, 5, 15, 15], [80, 45, 90, 55]], [], []], labels=[0, 1])
    tiles = train_tiles(two, Tiling(40, 0.0), of_classes=(1.0, 2.5))
    shown = {tiles.window(tile): tiles.factors[tile].item() for tile in tiles.shows_objects.nonzero()[:, 0].tolist()}
    assert shown == {(0, 0, 40, 40): 1.0, (60, 20, 100, 60): 2.5}


def test_windows_move_at_random_within_reach_and_within_the_image(annotations):
    tiles = train_tiles(annotations, Tiling(40, 0.5))
    assert tiles.reach == 10
    for tile in range(len(tiles)):
        height, width = annotations.sizes[tiles.images[tile]].tolist()
        start = np.array(tiles.window(tile))
        windows = np.array([tiles.drawn_window(tile, (height, width), (1, epoch, tile)) for epoch in range(40)])
        assert (windows[:, 2:] - windows[:, :2] == start[2:] - start[:2]).all()
        assert (windows >= 0).all() and (windows[:, 2:] <= (width, height)).all()
        assert np.abs(windows - start).max() <= 10 and len(np.unique(windows, axis=0)) > 5
        assert tiles.drawn_window(tile, (height, width), (1, 7, tile)) == tuple(windows[7])


def training_loader(annotations: Annotations, workers: int = 0, transforms=()) -> TrainLoader:
    tiles = train_tiles(annotations, Tiling(40, 0.5), empty_share=0.3)
    dataset = DetectionDataset(annotations, Pipeline(transforms), 5, tiles=tiles)
    repeats = torch.cat([torch.ones(3, dtype=torch.float64), tiles.factors])
    batches = GlobalBatches(dataset.sizes, 4, 1, repeats=repeats)
    return TrainLoader(dataset, batches, Ranks(), 1, Collator(32, (128, 128)), Workers(workers), CPU)


def test_training_batches_are_a_function_of_the_step(annotations):
    one = with_objects(annotations, [[[5, 6, 25, 36], [90, 50, 100, 60]], [], [[0, 0, 9, 9]]])
    flip = [A.HorizontalFlip(p=0.5)]
    loader = training_loader(one, transforms=flip)
    per_epoch = loader.steps_per_epoch
    assert loader.tiles is not None and per_epoch == loader.images_per_epoch // 4 > 1
    steps = list(islice(loader.iterate(0), 2 * per_epoch + 1))
    resumed = islice(training_loader(one, workers=2, transforms=flip).iterate(per_epoch - 1), per_epoch + 2)
    for batch, other in zip(steps[per_epoch - 1 :], resumed, strict=True):
        assert_same(batch, other)
        assert batch.windows is None  # of evaluation only
    assert any(not torch.equal(steps[0].pixels, batch.pixels) for batch in steps[1:])


def test_the_pixels_of_a_moved_window_are_those_of_its_objects(annotations):
    pixels = np.zeros((60, 100, 3), np.uint8)
    pixels[22:30, 41:55] = 255
    Image.fromarray(pixels).save(annotations.path(0))
    dataset = training_loader(with_objects(annotations, [[[41, 22, 55, 30]], [], []]))._maker.dataset
    windows = set()
    for row in [3 + tile for tile in range(len(dataset.tiles)) if dataset.tiles.images[tile] == 0]:
        for epoch in range(5):
            example = dataset[Key(row, epoch)]
            windows.add(example.window)
            num_white = int((example.pixels[..., 0] > 0).sum())
            if len(example.boxes):
                (x1, y1, x2, y2) = example.boxes[0].astype(int).tolist()
                assert (example.pixels[y1:y2, x1:x2] == 255).all() and num_white == (x2 - x1) * (y2 - y1)
            else:
                assert num_white < 0.3 * 14 * 8
    assert len(windows) > 20


def test_a_mosaic_is_made_of_images_and_tiles_with_objects(annotations):
    one = with_objects(annotations, [[[41, 22, 55, 30]], [], []])
    dataset = training_loader(one, transforms=[Mosaic([64, 64])])._maker.dataset
    shown = [row for row in range(len(dataset)) if row < 3 or dataset.tiles.shows_objects[row - 3]]
    assert list(dataset._scene_rows) == shown and 4 < len(shown) < len(dataset)
    assert dataset[Key(4, 0)].pixels.shape == (64, 64, 3)
    assert np.array_equal(dataset[Key(4, 0)].pixels, dataset[Key(4, 0)].pixels)


def test_proposals_are_cut_like_objects(annotations):
    one = with_objects(annotations, [[[41, 22, 55, 30]], [], []])
    saved = SavedProposals(torch.tensor([[30.0, 20, 50, 40], [0, 0, 10, 10]]), torch.tensor([0, 2, 2, 2]), limit=3)
    tiles = Tiles.of(one.sizes, Tiling(40, 0.2))
    dataset = DetectionDataset(one, Pipeline([]), 0, proposals=saved, tiles=tiles)
    row = 3 + [tiles.window(tile) for tile in range(6)].index((30, 20, 70, 60))
    assert dataset[Key(row, 0)].proposals.tolist() == [[0, 0, 20, 20], [0] * 4, [0] * 4]
    assert dataset[Key(row, 0)].boxes.tolist() == [[11, 2, 25, 10]]


def test_shared_memory_is_asked_for_the_tiles_of_one_image_at_most(annotations, monkeypatch):
    asked = []
    monkeypatch.setattr(loaders, "check_shared_memory", lambda *arguments: asked.append(arguments[:2]))
    dataset = dataset_of(annotations, Tiling(40, 0.0))  # 6, 0 and 6 tiles
    assert dataset.tiles is not None and dataset.tiles.offsets.diff().max() == 6
    for batch_size, most in ((1, 6), (4, 8)):
        EvalLoader(dataset, batch_size, Ranks(), Collator(32), Workers(0), CPU)
        assert asked.pop() == (40 * 40 * 3, most)
