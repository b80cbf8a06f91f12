from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fpn_det.interop.coco_classes import NAMES, assumed_class_names
from fpn_det.interop.conversion import convert
from fpn_det.interop.loading import Weights, load_weights, read_as_ours
from fpn_det.interop.naming import DELTAS, LOGITS
from fpn_det.models.cascade import CascadeROIHead
from fpn_det.models.detector import Detector
from fpn_det.models.dynamic import DynamicROIHead

CLASSES = ("square", "disk", "triangle")
Maker = Callable[..., Detector]


@pytest.fixture
def weights(ours: dict[str, Tensor]) -> Weights:
    return Weights(ours, CLASSES, "file.pth", "fpn_det")


def test_the_same_classes_load_to_the_bit(make_detector: Maker, weights: Weights):
    for class_names in (None, CLASSES):
        model = make_detector()
        report = load_weights(model, weights, class_names)
        assert all(torch.equal(value, weights.state[name]) for name, value in model.state_dict().items())
        assert len(report.loaded) == len(weights.state) and report.share == 1
        assert not report.replaced and not report.dropped
        assert (
            report.table()
            == f"weights of file.pth (fpn_det)\n  loaded    {len(weights.state)} tensors, 100.0% of the model"
        )


def test_rows_of_other_classes_are_copied_by_name(make_detector: Maker, weights: Weights):
    model = make_detector(num_classes=4)
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    report = load_weights(model, weights, ("ellipse", "triangle", "square", "cross"))
    loaded = model.state_dict()
    for leaf in ("weight", "bias"):
        name = f"{LOGITS}.{leaf}"
        # triangle is row 2 of the file, square row 0, the background its last
        expected = torch.stack(
            [fresh[name][0], weights.state[name][2], weights.state[name][0], fresh[name][3], weights.state[name][3]]
        )
        assert torch.equal(loaded[name], expected)
        name = f"{DELTAS}.{leaf}"
        expected = torch.cat(
            [fresh[name][0:4], weights.state[name][8:12], weights.state[name][0:4], fresh[name][12:16]]
        )
        assert torch.equal(loaded[name], expected)
    assert torch.equal(loaded["backbone.conv1.weight"], weights.state["backbone.conv1.weight"])
    assert report.copied == ("triangle", "square") and report.new_classes == ("ellipse", "cross")
    assert "copied    2 classes by name: triangle, square" in report.table()
    assert f"replaced  {LOGITS}.weight, {LOGITS}.bias, {DELTAS}.weight, {DELTAS}.bias: other classes" in report.table()


def test_the_same_classes_in_another_order_are_permuted(make_detector: Maker, weights: Weights):
    model = make_detector()
    report = load_weights(model, weights, ("triangle", "square", "disk"))
    assert torch.equal(model.state_dict()[f"{LOGITS}.bias"], weights.state[f"{LOGITS}.bias"][[2, 0, 1, 3]])
    assert report.new_classes == ()


def test_one_set_of_deltas_for_all_classes_is_kept(make_detector: Maker):
    state = make_detector(class_agnostic=True).state_dict()
    model = make_detector(num_classes=5, class_agnostic=True)
    load_weights(model, Weights(state, CLASSES, "file.pth", "fpn_det"), ("a", "b", "c", "d", "disk"))
    assert torch.equal(model.state_dict()[f"{DELTAS}.weight"], state[f"{DELTAS}.weight"])


def test_a_single_class_takes_its_own_row_and_the_background(make_detector: Maker, weights: Weights):
    model = make_detector(num_classes=1)
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    load_weights(model, weights, ("disk",))  # row 1 of the file
    assert torch.equal(model.state_dict()[f"{LOGITS}.weight"], weights.state[f"{LOGITS}.weight"][[1, 3]])
    assert torch.equal(model.state_dict()[f"{DELTAS}.bias"], weights.state[f"{DELTAS}.bias"][4:8])

    model = make_detector(num_classes=1)
    model.load_state_dict(fresh)
    report = load_weights(model, weights, ("ellipse",))
    expected = torch.stack([fresh[f"{LOGITS}.weight"][0], weights.state[f"{LOGITS}.weight"][3]])
    assert torch.equal(model.state_dict()[f"{LOGITS}.weight"], expected)
    assert torch.equal(model.state_dict()[f"{DELTAS}.weight"], fresh[f"{DELTAS}.weight"])
    assert report.copied == () and report.new_classes == ("ellipse",)


def test_all_stages_of_a_cascade_take_the_rows_of_their_classes(make_detector: Maker):
    state = make_detector(roi_head=CascadeROIHead).state_dict()
    logits = [name for name in state if name.endswith("class_logits.bias")]
    assert len(logits) == 3
    for number, name in enumerate(logits):
        state[name] = 10 * number + torch.arange(4.0)
    model = make_detector(num_classes=4, roi_head=CascadeROIHead)
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    report = load_weights(
        model, Weights(state, CLASSES, "file.pth", "fpn_det"), ("triangle", "ellipse", "square", "cross")
    )
    for number, name in enumerate(logits):
        expected = fresh[name].clone()
        expected[[0, 2, 4]] = 10 * number + torch.tensor([2.0, 0.0, 3.0])  # triangle, square, background
        assert torch.equal(model.state_dict()[name], expected)
    assert set(report.replaced) == {name.replace("bias", leaf) for name in logits for leaf in ("bias", "weight")}
    assert "and 1 more: other classes" in report.table()


@pytest.mark.parametrize("agnostic", [True, False])
def test_deltas_by_class_and_one_set_for_all_are_different_models(make_detector: Maker, agnostic: bool):
    state = make_detector(class_agnostic=agnostic).state_dict()
    with pytest.raises(ValueError, match="2 of other shape: roi_head.predictor.box_deltas.weight"):
        load_weights(
            make_detector(num_classes=2, class_agnostic=not agnostic),
            Weights(state, CLASSES, "file.pth", "fpn_det"),
            ("triangle", "disk"),
        )


def test_rows_without_names_keep_their_order(make_detector: Maker, weights: Weights):
    model = make_detector()
    report = load_weights(model, replace(weights, class_names=None), ("a", "b", "c"))
    assert torch.equal(model.state_dict()[f"{LOGITS}.bias"], weights.state[f"{LOGITS}.bias"])
    assert "note      the file does not name its classes: rows are taken in their order" in report.table()
    report = load_weights(make_detector(num_classes=4), replace(weights, class_names=None), ("a", "b", "c", "d"))
    assert report.copied == () and len(report.replaced) == 4


def test_counters_of_norms_are_no_difference(make_detector: Maker, weights: Weights):
    counting = make_detector(norm="batch")
    assert len(load_weights(counting, weights).loaded) == len(counting.state_dict())
    report = load_weights(make_detector(), replace(weights, state=counting.state_dict()))
    assert set(report.dropped.values()) == {"the model's norms do not count batches"}


def test_another_model_is_refused_with_what_does_not_fit(make_detector: Maker, weights: Weights):
    with pytest.raises(
        ValueError, match=r"file.pth: expected weights of this model, got others: 80 without .*layer1.2.conv1.weight"
    ):
        load_weights(make_detector(depth=34), weights)
    with pytest.raises(ValueError, match=r"1 of other shape: rpn.head.objectness.bias \[7\] instead of \[3\]"):
        load_weights(
            make_detector(), replace(weights, state=weights.state | {"rpn.head.objectness.bias": torch.zeros(7)})
        )
    with pytest.raises(ValueError, match="1 with extra"):
        load_weights(make_detector(), replace(weights, state=weights.state | {"extra": torch.zeros(7)}))
    with pytest.raises(ValueError, match="got a file that fills 0% of it. Is it the right file?"):
        load_weights(make_detector(), replace(weights, state={"extra": torch.zeros(7)}, class_names=CLASSES))


def test_weights_that_are_not_finite_are_refused(make_detector: Maker, weights: Weights):
    state = dict(weights.state)
    name = next(name for name in state if name.endswith("conv1.weight"))
    state[name] = torch.full_like(state[name], float("nan"))
    with pytest.raises(ValueError, match=rf"expected finite weights, got NaN or infinity in {name}\."):
        load_weights(make_detector(), replace(weights, state=state))


def test_weights_that_came_from_caffe_are_named_where_the_model_gives_rgb(make_detector: Maker, weights: Weights):
    plain = {"backbone.bn1.running_mean": torch.zeros(64), "backbone.bn1.running_var": torch.ones(64)}
    caffe = replace(weights, state=weights.state | plain, project="detectron2")
    assert "BGR pixels of deviation 1" in load_weights(make_detector(), caffe).table()
    assert not load_weights(make_detector(), replace(weights, project="detectron2")).remarks
    blue_first = make_detector()
    blue_first.flips_channels = True
    assert not load_weights(blue_first, caffe).remarks


def test_statistics_of_dynamic_training_neither_come_from_a_file_nor_go_into_one(make_detector: Maker):
    older = make_detector(roi_head=DynamicROIHead)
    older.roi_head.dynamics.iou.fill_(0.65)
    dynamic = Weights(older.state_dict(), CLASSES, "file.pth", "fpn_det")
    model = make_detector(roi_head=partial(DynamicROIHead, interval=7))
    report = load_weights(model, dynamic)
    assert float(model.roi_head.dynamics.iou) == pytest.approx(0.4) and model.roi_head.dynamics.betas.shape == (7, 2)
    assert set(report.dropped.values()) == {"statistics of another training run"} and len(report.dropped) == 5
    plain = make_detector()
    load_weights(plain, dynamic)
    assert all(torch.equal(value, dynamic.state[name]) for name, value in plain.state_dict().items())
    load_weights(model, Weights(plain.state_dict(), CLASSES, "file.pth", "fpn_det"))
    for project in ("torchvision", "detectron2", "mmdet"):
        assert (
            convert(dynamic.state, "fpn_det", project).state.keys()
            == convert(plain.state_dict(), "fpn_det", project).state.keys()
        )


def test_offsets_of_deformable_convolutions_are_new_where_the_file_has_none(make_detector: Maker, weights: Weights):
    model = make_detector(deformable=[4, 5])
    report = load_weights(model, weights)
    offsets = {name: value for name, value in model.state_dict().items() if ".conv2.offset." in name}
    assert len(offsets) == 8 and not any(value.any() for value in offsets.values())
    assert len(report.loaded) == len(weights.state)
    assert "note      8 tensors of deformable convolutions are new" in report.table()


def test_another_structure_is_refused_with_the_experiment_that_fits(make_detector: Maker, weights: Weights):
    theirs = replace(weights, project="torchvision")
    advice = r"They fit experiment=compat/torchvision_r50_fpn model\.backbone\.depth=18\.$"
    with pytest.raises(ValueError, match=advice):
        load_weights(make_detector(depth=34), theirs)


def test_weights_of_coco_have_its_category_ids(tmp_path: Path, make_detector: Maker, ours: dict[str, Tensor]):
    state = convert(make_detector(num_classes=80).state_dict(), "fpn_det", "detectron2").state
    torch.save(state, tmp_path / "coco.pth")
    assert read_as_ours(tmp_path / "coco.pth").category_ids == tuple(NAMES)
    torch.save(convert(ours, "fpn_det", "detectron2").state, tmp_path / "model.pth")
    assert read_as_ours(tmp_path / "model.pth").category_ids == (1, 2, 3)


def test_names_of_coco_are_assumed_for_its_numbers_of_classes():
    eighty, ninety = assumed_class_names(80), assumed_class_names(90)
    assert eighty is not None and ninety is not None and assumed_class_names(3) is None
    assert [name for name in ninety if not name.startswith("N/A")] == list(eighty) == list(NAMES.values())
    # row i of 90 is category id i + 1
    assert all(ninety[category_id - 1] == name for category_id, name in NAMES.items())
    unused = [12, 26, 29, 30, 45, 66, 68, 69, 71, 83]
    assert [ninety[category_id - 1] for category_id in unused] == [f"N/A {category_id}" for category_id in unused]


def test_a_file_of_any_project_can_be_the_start_for_other_classes(tmp_path: Path, make_detector: Maker):
    source = make_detector(num_classes=90)
    torch.save(convert(source.state_dict(), "fpn_det", "torchvision").state, tmp_path / "coco.pth")
    model = make_detector(num_classes=2)
    report = load_weights(model, tmp_path / "coco.pth", ("zebra", "unicorn"))
    assert (report.copied, report.new_classes, report.project) == (("zebra",), ("unicorn",), "torchvision")
    zebra = 24 - 1
    assert torch.equal(model.state_dict()[f"{LOGITS}.weight"][0], source.state_dict()[f"{LOGITS}.weight"][zebra])


def test_names_for_rows_can_be_given_and_must_be_as_many(tmp_path: Path, ours: dict[str, Tensor]):
    torch.save(convert(ours, "fpn_det", "detectron2").state, tmp_path / "model.pth")
    assert read_as_ours(tmp_path / "model.pth", CLASSES).class_names == CLASSES
    with pytest.raises(ValueError, match="expected names for its 3 classes, got 2"):
        read_as_ours(tmp_path / "model.pth", CLASSES[:2])
    theirs = convert(ours, "fpn_det", "torchvision").state
    torch.save({name: value for name, value in theirs.items() if "fc6" not in name}, tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"without roi_head.box_head.fc1.weight, roi_head.box_head.fc1.bias"):
        read_as_ours(tmp_path / "part.pth")
