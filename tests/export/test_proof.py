from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fpn_det.export.proof import cases
from fpn_det.structures import Batch, Targets


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_no_two_cells_of_the_image_without_objects_look_the_same(dtype):
    size = torch.tensor([[480, 640]])
    pixels = torch.zeros(1, 3, 480, 640, dtype=dtype)
    batch = Batch(pixels, size, size, Targets.pad([torch.zeros(0, 4)], [torch.zeros(0).long()]), torch.tensor([0]))
    *_, plain, _ = cases([batch])
    assert plain.pixels.dtype == dtype and plain.pixels.shape == pixels.shape and plain.pixels.is_contiguous()
    views = F.unfold(plain.pixels.float(), 32, stride=32)[0].T  # [cells, values]
    assert len(views) == 15 * 20 and len(views.unique(dim=0)) == len(views)
