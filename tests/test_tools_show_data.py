from __future__ import annotations

import pytest
import torch
from compare import assert_close
from PIL import Image
from tiny import TINY

from fpn_det.boxes import box_iou
from fpn_det.composition import compose
from fpn_det.runtime import Ranks
from fpn_det.visualization.data_panels import match_anchors

CPU = torch.device("cpu")


def test_sheets_and_curves_of_the_first_steps(run_tool, shapes_dataset, tmp_path):
    shown = run_tool(
        "show_data.py",
        *TINY,
        f"data.root={shapes_dataset}",
        "steps=2",
        "output=shown",
        "trainer.batch_size=8",
        "data.keep_empty=true",
    )
    assert shown.returncode == 0, shown.stderr
    pictures = sorted((tmp_path / "shown").glob("*.png"))
    assert [path.name for path in pictures] == [f"step_{step:06}_{number}.png" for step in (0, 1) for number in (0, 1)]
    assert Image.open(pictures[0]).size[0] > 4 * 480  # two images beside each other, each with its anchors
    (events,) = (tmp_path / "shown").glob("events.out.tfevents.*")
    assert b"images/batch_0" in events.read_bytes()


@pytest.fixture
def shown(shapes_dataset):
    settings = compose([*TINY, f"data.root={shapes_dataset}"])
    train = settings.data.read_train_and_val(0).train
    model = settings.build_model(train.num_classes)
    return model, settings.train_loader(train, model.stride, Ranks(), CPU).rebuild(0)[0]


def test_anchors_are_those_that_the_loss_would_sample(shown):
    model, batch = shown
    output = model.rpn(model.pyramid(batch))
    match = model.rpn.matcher(batch.targets, output.anchors, output.inside)
    for row, found in enumerate(match_anchors(model, batch)):
        assert torch.equal(found.boxes, output.anchors[match.positive[row]]) and len(found.boxes)
        # anchors of level l have the size that the settings give it: 16, 32, ...
        sides = (found.boxes[:, 2:] - found.boxes[:, :2]).prod(dim=1).sqrt()
        assert_close(sides, 16 * 2.0**found.levels, 1e-5)
        ious = box_iou(batch.targets.boxes[row][batch.targets.valid[row]], found.boxes)
        assert torch.equal(ious.argmax(dim=0), found.objects)
