from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from parts import TinyDetector, make_annotations, make_batch, make_optimization

from fpn_det.runtime import Ranks, seed_step
from fpn_det.structures import Batch, Proposals
from fpn_det.training.nonfinite import Examination, examine, explain, load_dump


def spoiled_pixel(batch: Batch) -> Batch:
    pixels = batch.pixels.float()
    pixels[1, 0, 3, 3] = float("nan")
    return dataclasses.replace(batch, pixels=pixels)


def spoiled_box(batch: Batch) -> Batch:
    boxes = batch.targets.boxes.clone()
    boxes[0, 0, 2] = float("inf")
    return dataclasses.replace(batch, targets=dataclasses.replace(batch.targets, boxes=boxes))


def explained(optimization, batches: list[Batch], folder: Path, step: int = 4) -> str:
    state = {**optimization.state(), "rng": {"seed": 3}}
    return explain(optimization, batches, make_annotations(8), step, 3, Ranks(), folder, lambda: state)


def test_dump_holds_what_went_in_and_what_came_out(tmp_path):
    optimization = make_optimization(TinyDetector(dropout=0.5))
    given = Proposals.stack(list(torch.rand(2, 5, 4)))
    batches = [make_batch([0, 1]), spoiled_pixel(dataclasses.replace(make_batch([2, 3]), proposals=given))]
    text = explained(optimization, batches, tmp_path / "nan_dump")
    assert text.startswith("not finite: pixels of image_3.jpg, roi_class=nan, roi_box=nan. First bad output: conv.")
    assert "Images of that batch: image_3.jpg. Repeat it with 'fpn-det replay dump=" in text

    state, share, loaded = load_dump(tmp_path / "nan_dump", 0)
    assert torch.equal(state["model"]["head.weight"], optimization.model.head.weight)
    for batch, same in zip(batches, loaded, strict=True):
        torch.testing.assert_close(batch.pixels, same.pixels, equal_nan=True, rtol=0, atol=0)
        assert torch.equal(batch.targets.boxes, same.targets.boxes)
        assert torch.equal(batch.targets.labels, same.targets.labels)
    assert loaded[0].proposals is None and torch.equal(loaded[1].proposals.boxes, given.boxes)
    assert share["images"][1][0] == {"path": "image_2.jpg", "image_id": 12, "annotation_ids": [3]}
    assert (share["step"], share["precision"], share["loss_scale"], share["lr"]) == (4, "fp32", 1.0, 0.1)
    assert share["gradient_norms"].keys() == {"conv", "norm", "head"}


def test_replay_gives_the_losses_of_the_step(tmp_path):
    optimization = make_optimization(TinyDetector(dropout=0.5))
    batches = [make_batch([0, 1]), spoiled_pixel(make_batch([2, 3]))]
    seed_step(3, 4, 0)
    before = {name: tensor.clone() for name, tensor in optimization.model.state_dict().items()}
    losses = optimization.step(batches, 4)
    explained(optimization, batches, tmp_path)
    _, share, loaded = load_dump(tmp_path, 0)
    model = TinyDetector(dropout=0.5)
    model.load_state_dict(before)
    seed_step(3, 4, 0)
    examinations, norms = examine(model, loaded, 4, share["loss_scale"], nullcontext)
    assert examinations[0].terms == share["examinations"][0]["terms"]
    assert examinations[0].terms == {name: term.item() for name, term in losses[0].terms.items()}
    assert norms == pytest.approx(share["gradient_norms"], nan_ok=True)


def test_gradient_norms_are_those_of_the_batch(tmp_path):
    model, batch = TinyDetector(), make_batch([0, 1, 2])
    _, norms = examine(model, [batch, batch], 0, scale=8.0, autocast=nullcontext)
    other = TinyDetector()
    other.load_state_dict(model.state_dict())
    other(batch, 0).total().backward()
    expected = torch.cat([weight.grad.flatten() for weight in other.head.parameters()]).norm()
    assert norms["head"] == pytest.approx(expected.item(), rel=1e-4)


def test_box_that_is_not_finite_raises_the_alarm_where_no_loss_shows_it(tmp_path):
    class Blind(TinyDetector):
        def forward(self, batch, step):
            return super().forward(make_batch(batch.indices.tolist()), step)

    optimization = make_optimization(Blind())
    batch = spoiled_box(make_batch([5, 6]))
    (losses,) = optimization.step([batch], 0)
    assert torch.isfinite(losses.total())
    assert int(optimization.alarm) == 0
    assert explained(optimization, [batch], tmp_path).startswith("not finite: boxes of image_5.jpg.")


def test_images_that_are_bad_alone_are_named():
    batch = make_batch([0, 1, 2])
    (found,), _ = examine(TinyDetector(norm=False), [spoiled_pixel(batch)], 0, 1.0, nullcontext)
    assert found.images == [1] and found.inputs == [("pixels", 1)] and found.module == "conv"
    (sound,), _ = examine(TinyDetector(), [batch], 0, 1.0, nullcontext)
    assert sound == Examination(sound.terms, [], "", [])


def test_explanation_survives_a_dump_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    text = explained(make_optimization(), [spoiled_pixel(make_batch([0, 1]))], tmp_path / "file" / "nan_dump")
    assert (
        "not finite: pixels of image_1.jpg" in text
        and "The dump could not be written ([Errno 20] Not a directory" in text
    )


def test_new_dump_replaces_the_old_one(tmp_path):
    (tmp_path / "rank7").mkdir()
    (tmp_path / "rank7" / "step.pt").touch()
    explained(make_optimization(), [spoiled_pixel(make_batch([0, 1]))], tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.pt")) == [
        "checkpoint.pt",
        "rank0/step.pt",
    ]
