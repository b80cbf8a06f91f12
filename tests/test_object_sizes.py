from __future__ import annotations

import re

import numpy as np
import pytest

from fpn_det.data.transforms import Pipeline, ResizeShortestSide
from fpn_det.data_report.object_sizes import size_advice

TO_800 = [ResizeShortestSide([800], 1333)]


@pytest.mark.parametrize(
    ("side", "image", "transforms", "anchors", "tile", "expected"),
    [
        # 6000 x 4000 px shrink to 1200 x 800, by 5: 12 px become 2.4. Tiles of 300 px are shown 800 / 300 times as large: 32 px
        (
            12,
            (4000, 6000),
            TO_800,
            [32, 64],
            None,
            "is 12 px wide in its image and 2.4 px .* anchors 32 px.* data.tile.size=300",
        ),
        (12, (4000, 6000), TO_800, [32, 64], 300, None),  # in these tiles
        (12, (4000, 6000), TO_800, [32, 64], 4000, "2.4 px .*data.tile.size=300"),
        # 20 px, shrunk by 1.25: 16 px, four cells of stride 4; the pyramid shows them, the anchors are too large
        (20, (1000, 1200), TO_800, [32, 64, 128], None, r"smaller anchors: model.rpn.anchors.sizes=\[16,32,64\]"),
        # 5 px become 4, less than two cells; twice as large is enough for anchors of 8 px
        (
            5,
            (1000, 1200),
            TO_800,
            [8, 64],
            None,
            r"train_transforms.resize.sides=\[1600\] .*train_transforms.resize.max_side=2688",
        ),
        (4, (100, 100), [], [32], None, "Enlarge the images 8 times with a resize"),
        (40, (1000, 1000), TO_800, [32], None, None),
    ],
)
def test_advice_names_the_setting_that_makes_the_median_object_fit(side, image, transforms, anchors, tile, expected):
    sides = np.array([side, side, side, 1, 900], float)
    found = size_advice(sides, np.tile(image, (5, 1)), Pipeline(transforms), anchors, 4, tile)
    if expected is None:
        assert found is None
    else:
        assert found is not None and re.search(expected, found), found


def test_no_objects_need_no_advice():
    assert size_advice(np.zeros(0), np.zeros((0, 2)), Pipeline(TO_800), [32], 4) is None
