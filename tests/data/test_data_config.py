from __future__ import annotations

import pytest
from tiny import TINY

from fpn_det.composition import compose


@pytest.mark.parametrize("limit", [[], ["data.max_images=6"]])
def test_evaluation_of_the_training_images_leaves_out_the_held_out_ones(shapes_dataset, limit):
    words = [f"data.root={shapes_dataset}", "data.val_fraction=0.25", "data.keep_empty=true", *limit]
    data = compose([*TINY, *words]).data
    trained = data.read_train_and_val(seed=5)
    for split, expected in (("train", trained.train), ("val", trained.val)):
        again = data.read_split(split, trained.train.class_names, seed=5)
        assert again.image_ids.tolist() == expected.image_ids.tolist()
