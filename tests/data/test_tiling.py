from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_loaders import assert_same

from fpn_det.data import loaders
from fpn_det.data.collation import Collator
from fpn_det.data.dataset import DetectionDataset
from fpn_det.data.loaders import EvalLoader
from fpn_det.data.tiles import Tiles, Tiling
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


def test_objects_are_cut_to_their_tile(annotations):
    boxes = torch.tensor([[5.0, 6, 25, 36], [35, 15, 55, 25], [90, 50, 100, 60]], dtype=torch.float64)
    one = Annotations(
        **{
            **vars(annotations),
            "boxes": boxes,
            "labels": torch.zeros(3, dtype=torch.int64),
            "iscrowd": torch.zeros(3, dtype=torch.bool),
            "offsets": torch.tensor([0, 3, 3, 3]),
            "annotation_ids": torch.arange(3),
        }
    )
    dataset = dataset_of(one, Tiling(40, 0.2))
    windows = {dataset[(row, 0)].window: dataset[(row, 0)].boxes.tolist() for row in range(3, 9)}
    assert windows[0, 0, 40, 40] == [[5, 6, 25, 36], [35, 15, 40, 25]]
    assert windows[30, 20, 70, 60] == [[5, 0, 25, 5]]  # 35 - 30, 15 - 20 clipped, 55 - 30, 25 - 20
    assert windows[60, 20, 100, 60] == [[30, 30, 40, 40]]
