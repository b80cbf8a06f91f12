"""A file of a fixed size takes images that fit into it, whatever padding a loader has put around them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fpn_det.export import exported
from fpn_det.export.graph import on_canvas
from fpn_det.export.metadata import Metadata


def test_a_file_of_a_fixed_size_takes_images_that_fit_without_their_padding(tmp_path, monkeypatch):
    texts = Metadata(class_names=["a"], category_ids=[1], size=(100, 140)).texts()

    def run(images: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
        """The whole canvas as a box, and the value in its lower right corner as the score."""
        count, height, width, _ = images.shape
        boxes = np.array([[[0, 0, width, height]]] * count, np.float32)
        return [boxes, images[:, -1, -1, :1].astype(np.float32), sizes[:, :1], sizes[:, :1] > 0, sizes[:, 0]]

    monkeypatch.setitem(exported._OPENERS, ".pt2", (lambda *arguments: (run, texts), "torch"))
    (tmp_path / "model.pt2").touch()
    file = exported.ExportedFile(tmp_path / "model.pt2")
    images = torch.full((2, 128, 160, 3), 9, dtype=torch.uint8)  # padded to a stride of 32
    images[:, :100, :140] = 4
    found = file(images, torch.tensor([[100, 130], [90, 140]]))
    assert found.boxes.tolist() == [[[0, 0, 140, 100]]] * 2 and found.scores.tolist() == [[4]] * 2
    with pytest.raises(
        ValueError, match=r"model.pt2: expected images of at most 100 x 140 px \(h x w\), got 101 x 130. Export with"
    ):
        file(images, torch.tensor([[101, 130], [90, 100]]))


def test_a_canvas_of_any_size_keeps_padding_and_one_that_is_too_small_cuts_nothing_else():
    images = torch.arange(128 * 160 * 3).reshape(1, 128, 160, 3)
    assert torch.equal(on_canvas(images, torch.tensor([[20, 30]]), None), images)
    assert torch.equal(on_canvas(images, torch.tensor([[20, 160]]), (20, 170))[:, :, :160], images[:, :20])
    with pytest.raises(ValueError, match="got 20 x 171"):
        on_canvas(images, torch.tensor([[20, 171]]), (20, 170))
