from __future__ import annotations

import pickle
from itertools import islice
from pathlib import Path

import pytest
import torch
from test_flip_resize import assert_same

from fpn_det.annotations.reading import read_annotations
from fpn_det.data.collation import Collator
from fpn_det.data.dataset import DetectionDataset
from fpn_det.data.loaders import EvalLoader, TrainLoader
from fpn_det.data.sampling import GlobalBatches, Key
from fpn_det.data.transforms import Pipeline, ResizeShortestSide
from fpn_det.data.workers import Workers
from fpn_det.image_io import BadImage
from fpn_det.runtime import Ranks
from fpn_det.structures import Annotations, Batch

CPU = torch.device("cpu")


@pytest.fixture
def broken(document, write, pictures, tmp_path) -> Annotations:
    """Eight images, of which those of rows 3 and 6 cannot be read."""
    for row in (3, 6):
        content = (pictures / f"{row}.png").read_bytes()
        path = tmp_path / f"cut{row}.png"
        path.write_bytes(content[: len(content) // 2])
        document["images"][row]["file_name"] = str(path)
    return read_annotations(write(document), pictures)


def train(
    annotations: Annotations, workers: int = 0, ranks: Ranks | None = None, start: int = 0, reported=None
) -> list[Batch]:
    ranks = ranks or Ranks()
    dataset = DetectionDataset(annotations, Pipeline([ResizeShortestSide([40, 48], 100)]), seed=5, replace_bad=True)
    order = GlobalBatches(annotations.sizes, 4, seed=1, parts=ranks.world_size)
    on_bad_image = (reported if reported is not None else []).append
    collator = Collator(32, (128, 128))
    loader = TrainLoader(dataset, order, ranks, 1, collator, Workers(workers), CPU, on_bad_image)
    return list(islice(loader.iterate(start), 6))


def test_training_replaces_a_bad_image_by_another(broken):
    reported: list[BadImage] = []
    batches = train(broken, reported=reported)
    assert [len(batch) for batch in batches] == [4] * 6  # three epochs of the eight images
    seen = torch.cat([batch.indices for batch in batches]).tolist()
    assert set(seen) == {0, 1, 2, 4, 5, 7}
    assert {bad.path.name for bad in reported} == {"cut3.png", "cut6.png"} and len(reported) >= 6
    for bad in reported:
        assert str(bad).startswith(f"{bad.path}: expected a complete image")
        assert str(bad).endswith(
            "It is image 37, annotations 5, 6."
            if bad.path.name == "cut3.png"
            else "It is image 67, annotations 11, 12."
        )
    for batch in batches:
        for index, boxes in zip(batch.indices.tolist(), batch.targets.valid.sum(dim=1).tolist(), strict=True):
            rows = broken.rows(index)
            assert boxes == (~broken.iscrowd[rows]).sum()


def test_replacements_do_not_depend_on_workers_ranks_or_the_start(broken):
    expected = train(broken)
    for one, other in zip(expected, train(broken, workers=2), strict=True):
        assert_same(one, other)
    for one, other in zip(expected[2:], train(broken, start=2), strict=False):
        assert_same(one, other)
    halves = [train(broken, ranks=Ranks(rank, 2)) for rank in (0, 1)]
    for step, one in enumerate(expected):
        assert torch.equal(torch.cat([half[step].pixels for half in halves]), one.pixels)
        assert torch.equal(torch.cat([half[step].indices for half in halves]), one.indices)


def test_replacements_differ_between_epochs(broken):
    dataset = DetectionDataset(broken, Pipeline([]), seed=5, replace_bad=True)
    assert len({dataset[Key(3, epoch)].index for epoch in range(30)}) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_skips_bad_images(broken, workers):
    dataset = DetectionDataset(broken, Pipeline([ResizeShortestSide([40], 100)]), seed=0)
    for batch_size in (1, 3):
        reported: list[BadImage] = []
        batches = list(EvalLoader(dataset, batch_size, Ranks(), Collator(32), Workers(workers), CPU, reported.append))
        assert sorted(torch.cat([batch.indices for batch in batches]).tolist()) == [0, 1, 2, 4, 5, 7]
        assert sorted(bad.path.name for bad in reported) == ["cut3.png", "cut6.png"]
    with pytest.raises(ValueError, match=r"cut.\.png: expected a complete image"):
        list(EvalLoader(dataset, 1, Ranks(), Collator(32), Workers(workers), CPU))


def test_a_data_set_of_bad_images_is_an_error(document, write, pictures, tmp_path):
    for record in document["images"]:
        (tmp_path / record["file_name"]).touch()
    dataset = DetectionDataset(read_annotations(write(document), tmp_path), Pipeline([]), seed=0, replace_bad=True)
    with pytest.raises(
        ValueError,
        match=r"got an empty file\. Copy or download it again\. It is image .* It is the last of 11 randomly drawn images",
    ):
        dataset[Key(0, 0)]


def test_a_bad_image_can_be_pickled():
    bad = pickle.loads(pickle.dumps(BadImage(Path("a.jpg"), "a.jpg: why")))
    assert (bad.path, str(bad)) == (Path("a.jpg"), "a.jpg: why")
