from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from test_detector import make_model, spread_out

from fpn_det.data.collation import Collator
from fpn_det.data.dataset import DetectionDataset
from fpn_det.data.loaders import EvalLoader
from fpn_det.data.tiles import Tiles, Tiling
from fpn_det.data.transforms import Pipeline, ResizeShortestSide
from fpn_det.data.workers import Workers
from fpn_det.models import tiles
from fpn_det.models.selection import DetectionFilter
from fpn_det.models.tiles import check_tiles, cut_by_edges, detect_all, move_to_whole
from fpn_det.models.views import Views
from fpn_det.runtime import Ranks
from fpn_det.structures import Annotations, Batch, Candidates, Detections, Targets

CPU = torch.device("cpu")


def no_targets(count: int) -> Targets:
    return Targets.pad([torch.zeros(0, 4)] * count, [torch.zeros(0, dtype=torch.int64)] * count)


def tiles_at(windows: list[list[int]], input_sizes: list[list[int]]) -> Batch:
    corners, sizes = torch.tensor(windows), torch.tensor(input_sizes)
    original = (corners[:, 2:] - corners[:, :2]).flip(1)
    pixels = torch.zeros(len(sizes), 3, *sizes.amax(dim=0).tolist(), dtype=torch.uint8)
    return Batch(pixels, sizes, original, no_targets(len(sizes)), torch.zeros(len(sizes)).long(), windows=corners)


def test_boxes_of_a_tile_are_moved_to_the_frame_of_the_whole_image():
    # a tile of 50 x 100 px (w x h) at (200, 300), shown at 100 x 200; its image of 400 x 600 is shown at 200 x 150
    tile = tiles_at([[200, 300, 250, 400]], [[200, 100]])
    boxes = torch.tensor([[[[20.0, 40, 60, 100]]]])
    # halved and moved: 210, 320, 230, 350; x * 0.5, y * 0.25
    moved = move_to_whole(boxes, tile, tile.windows, torch.tensor([[600, 400]]), torch.tensor([[150, 200]]))
    assert moved.tolist() == [[[[105, 80, 115, 87.5]]]]


def test_candidates_at_inner_edges_are_cut():
    # the first tile is in the upper left corner of the image, the second in the lower right one, the third within it
    windows = torch.tensor([[0, 0, 50, 50], [50, 50, 100, 100], [25, 25, 75, 75]])
    sizes, image_sizes = torch.tensor([[100, 100]] * 3), torch.tensor([[100, 100]] * 3)
    boxes = torch.tensor(
        [
            [0.0, 40, 30, 60],  # left edge
            [40, 0, 60, 30],  # top edge
            [80, 40, 100, 60],  # right edge
            [40, 80, 60, 100],  # bottom edge
            [79, 40, 99, 60],  # 1 px from the right edge: less than a tenth of 20
            [77, 40, 97, 60],  # 3 px from it
            [30, 30, 70, 70],  # inside
        ]
    )
    cut = cut_by_edges(boxes[None, :, None].expand(3, -1, -1, -1), sizes, windows, image_sizes)[..., 0]
    assert cut.tolist() == [
        [False, False, True, True, True, False, False],
        [True, True, False, False, False, False, False],
        [True, True, True, True, True, False, False],
    ]


class FindsSquares:
    """Detector of bright squares by their pixels. It does not see those below 8 px."""

    def __init__(self) -> None:
        self.filter = DetectionFilter(max_detections=1000)
        self.score_threshold = self.filter.score_threshold
        self.seen: list[tuple[int, int]] = []

    def candidates(self, batch: Batch, views: Views | None = None) -> Candidates:
        found = []
        for pixels, (height, width) in zip(batch.pixels, batch.sizes.tolist(), strict=True):
            self.seen.append((height, width))
            mask = (pixels[0, :height, :width] > 128).to(torch.uint8).numpy()
            _, _, stats, _ = cv2.connectedComponentsWithStats(mask)
            large = [(x, y, w, h) for x, y, w, h, _ in stats[1:].tolist() if min(w, h) >= 8]
            found.append(torch.tensor([[x, y, x + w, y + h] for x, y, w, h in large]).view(-1, 4))
        boxes = torch.nn.utils.rnn.pad_sequence([*found, torch.zeros(1, 4)], batch_first=True).float()[:-1]
        counts = torch.tensor([len(part) for part in found])
        valid = torch.arange(boxes.shape[1]) < counts[:, None]
        return Candidates(boxes[:, :, None], valid.float()[..., None] * 0.9, valid)

    def select(self, candidates: Candidates, batch: Batch) -> Detections:
        return self.filter(candidates, batch)

    def detect(self, batch: Batch, views: Views | None = None) -> Detections:
        return self.select(self.candidates(batch, views), batch)


def find(model, tmp_path, pixels: list[np.ndarray], tiling: Tiling | None, side: int, batch_size: int = 1, views=None):
    """Boxes, scores and labels of each picture, in the original frame."""
    paths = [tmp_path / f"{number}.png" for number in range(len(pixels))]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    sizes = [image.shape[:2] for image in pixels]
    annotations = Annotations.without_objects(list(map(str, paths)), sizes, ["square"], [1])
    chain = [ResizeShortestSide([side], 4 * side, antialias=True)]
    dataset = DetectionDataset(annotations, Pipeline(chain), 0, tiles=tiling and Tiles.of(annotations.sizes, tiling))
    loader = EvalLoader(dataset, batch_size, Ranks(), Collator(32), Workers(), CPU)
    found = {}
    for batch, detections in detect_all(model, loader, views=views):
        found |= dict(zip(batch.indices.tolist(), detections.to_original(batch).images(), strict=True))
    return [found[number] for number in range(len(pixels))]


def draw(size: tuple[int, int], boxes: list[list[int]]) -> np.ndarray:
    pixels = np.zeros((*size, 3), np.uint8)
    for x1, y1, x2, y2 in boxes:
        pixels[y1:y2, x1:x2] = 255
    return pixels


@pytest.mark.parametrize("batch_size", [1, 3])
def test_small_objects_are_found_once_wherever_the_seams_are(tmp_path, batch_size):
    # tiles of 100 px start every 75 px; squares of 16 px at every distance from the seams
    tiling, size = Tiling(100, 0.25), (400, 700)
    assert tiling.starts(400) == [0, 75, 150, 225, 300]
    boxes = [[x, y, x + 16, y + 16] for y in range(2, 380, 31) for x in range(3, 680, 29)]
    (blind,) = find(FindsSquares(), tmp_path, [draw(size, boxes)], None, 100)
    assert not len(blind[0])
    pictures = [draw(size, boxes), draw((50, 60), [[4, 5, 44, 45]]), draw(size, [])]
    model = FindsSquares()
    many, one, none = find(model, tmp_path, pictures, tiling, 100, batch_size)
    assert len(many[0]) == len(boxes)
    order = np.lexsort(many[0].numpy()[:, :2].round().T)
    expected = np.array(boxes)[np.lexsort(np.array(boxes)[:, :2].T)]
    assert np.abs(many[0].numpy()[order] - expected).max() <= 1
    assert len(one[0]) == 1 and (one[0] - torch.tensor([4, 5, 44, 45])).abs().max() <= 1 and not len(none[0])
    # two whole images of 400 x 700 with 5 x 9 tiles each, and one without tiles
    assert len(model.seen) == 3 + 2 * 45


def test_a_large_object_is_found_once_by_the_whole_image(tmp_path, monkeypatch):
    large = [130, 90, 330, 240]  # larger than a tile
    across = [380, 30, 450, 60]  # larger than the overlap, on a seam: halves in two tiles
    picture = draw((300, 500), [large, across])
    ((found, _, _),) = find(FindsSquares(), tmp_path, [picture], Tiling(100, 0.25), 100)
    assert (found.round()[found[:, 0].argsort()] - torch.tensor([large, across])).abs().max() <= 3
    monkeypatch.setattr(tiles, "EDGE", 0.0)
    ((with_parts, _, _),) = find(FindsSquares(), tmp_path, [picture], Tiling(100, 0.25), 100)
    assert len(with_parts) > 4


@pytest.mark.parametrize(("views", "single_stage"), [(None, False), (None, True), (Views((0.5,), flip=True), False)])
def test_tiles_join_the_candidates_of_the_whole_image_before_one_suppression(tmp_path, views, single_stage):
    head = {"test_filter": DetectionFilter(0.02, 0.4, 30)}
    model = spread_out(make_model(roi_head=head)).eval()
    model = model.without_roi_head() if single_stage else model
    random = np.random.default_rng(3)
    pictures = [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in [(120, 150), (60, 70)]]
    tiling = Tiling(90, 0.3)
    found = find(model, tmp_path, pictures, tiling, 96, views=views)
    for pixels, (boxes, scores, labels) in zip(pictures, found, strict=True):
        height, width = pixels.shape[:2]
        parts = []
        for x1, y1, x2, y2 in [(0, 0, width, height), *tiling.windows(height, width)]:
            resize = Pipeline([ResizeShortestSide([96], 384, antialias=True)])
            shown, _, _ = resize(pixels[y1:y2, x1:x2], np.zeros((0, 4)), np.zeros(0, np.int64), (0,))
            size = torch.tensor([shown.shape[:2]])
            canvas = torch.zeros(1, 3, *(-(-size[0] // 32) * 32).tolist(), dtype=torch.uint8)
            canvas[0, :, : size[0, 0], : size[0, 1]] = torch.from_numpy(shown).permute(2, 0, 1)
            batch = Batch(canvas, size, torch.tensor([[y2 - y1, x2 - x1]]), no_targets(1), torch.tensor([0]))
            part = model.candidates(batch, views)
            scale = torch.tensor([x2 - x1, y2 - y1] * 2) / size[0].flip(0).repeat(2)
            moved = part.boxes * scale + torch.tensor([x1, y1, x1, y1])
            sides = (part.boxes[..., 2:] - part.boxes[..., :2]) * 0.1
            low, high = part.boxes[..., :2], size[0].flip(0) - part.boxes[..., 2:]
            inner = [x1 > 0, y1 > 0], [x2 < width, y2 < height]
            cut = ((low < sides) & torch.tensor(inner[0])) | ((high < sides) & torch.tensor(inner[1]))
            parts.append(replace(part, boxes=moved, scores=part.scores * ~cut.any(dim=-1)))
        assert len(parts) == (1 if height == 60 else 5)
        merged = Candidates(*(torch.cat([getattr(p, name) for p in parts], 1) for name in ("boxes", "scores", "valid")))
        if single_stage:
            merged = replace(merged, valid=merged.valid & (merged.scores[..., 0] > 0))
        size = torch.tensor([[height, width]])
        expected = model.select(merged, replace(batch, sizes=size, original_sizes=size))
        assert expected.valid.sum() == len(boxes) > 10
        assert (expected.boxes[expected.valid] - boxes).abs().max() < 1e-3
        assert torch.allclose(expected.scores[expected.valid], scores, atol=1e-6)
        assert torch.equal(expected.labels[expected.valid], labels)


def test_a_model_without_candidates_is_refused():
    class Closed:
        def detect(self, batch, views=None):
            raise AssertionError

    check_tiles(make_model())
    check_tiles(FindsSquares())
    with pytest.raises(ValueError, match=r"tile.size: expected null for Closed, which suppresses.*in Python tile=0"):
        check_tiles(Closed())
