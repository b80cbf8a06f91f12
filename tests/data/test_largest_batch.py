from __future__ import annotations

import pytest
import torch

from fpn_det.annotations.reading import read_annotations
from fpn_det.data.collation import Collator
from fpn_det.data.dataset import DetectionDataset
from fpn_det.data.largest_batch import largest_batch
from fpn_det.data.proposals import SavedProposals
from fpn_det.data.tiles import Tiles, Tiling
from fpn_det.data.transforms import Pipeline, ResizeShortestSide


@pytest.mark.parametrize(
    ("resize", "canvas", "size"),
    [
        ([], "batch", (64, 96)),  # the tallest is 64 x 48, the widest 40 x 80: 64 x 80 px, in steps of 32
        ([ResizeShortestSide([60, 100], 150)], "batch", (160, 160)),  # 133 x 100 and 75 x 150, from sides of 100
        ([ResizeShortestSide([20, 40, 60, 80, 100], 150, per_step=True)], "batch", (160, 160)),
        ([], (128, 160), (128, 160)),
    ],
)
def test_largest_batch_has_the_largest_canvas_and_the_most_objects(document, write, pictures, resize, canvas, size):
    for number in range(5):
        document["annotations"].append({**document["annotations"][4], "id": 100 + number})
    dataset = DetectionDataset(read_annotations(write(document), pictures), Pipeline(resize), seed=0)
    batch = largest_batch(dataset, 3, Collator(32, canvas))
    assert batch.pixels.shape == (3, 3, *size) and batch.pixels.dtype == torch.uint8
    assert batch.targets.valid.sum(dim=1).tolist() == [7, 7, 7]
    assert batch.sizes.tolist() == [list(size)] * 3


def test_tiles_may_need_the_largest_canvas(document, write, pictures):
    document["images"] = [image for image in document["images"] if image["file_name"] == "2.png"]  # 40 x 80 px
    document["annotations"] = []
    annotations = read_annotations(write(document), pictures)
    tiles = Tiles.of(annotations.sizes, Tiling(40))
    dataset = DetectionDataset(annotations, Pipeline([ResizeShortestSide([80], 120)]), seed=0, tiles=tiles)
    assert len(tiles) == 3
    # the image becomes 60 x 120 px, a tile 80 x 80 px
    assert largest_batch(dataset, 2, Collator(4)).pixels.shape == (2, 3, 80, 120)


def test_largest_batch_has_the_saved_proposals(document, write, pictures):
    annotations = read_annotations(write(document), pictures)
    boxes = torch.tensor([[1.0, 2, 10, 12]] * len(annotations))
    proposals = SavedProposals(boxes, torch.arange(len(annotations) + 1), limit=3)
    found = largest_batch(
        DetectionDataset(annotations, Pipeline([]), 0, proposals=proposals), 2, Collator(32)
    ).proposals
    assert found is not None and found.valid.tolist() == [[True, False, False]] * 2
    assert found.boxes[:, 0].tolist() == boxes[:2].tolist()
