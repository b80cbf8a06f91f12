from __future__ import annotations

import torch
from parts import make_annotations
from torch import nn

from fpn_det.annotations.findings import WITHOUT_OBJECTS, Finding
from fpn_det.training.introduction import (
    describe_device,
    describe_input,
    describe_model,
    describe_node,
    describe_split,
    introduce,
)


def test_rows_are_aligned_and_continue_below_their_text():
    assert introduce({"a": "one\ntwo", "long": "three"}) == "a     one\n      two\nlong  three"


def test_a_split_counts_objects_and_faults_by_kind():
    annotations = make_annotations(4)
    annotations.iscrowd[0] = True  # not an object to learn
    found = [Finding("outside", "x"), Finding("outside", "y"), Finding("no_area", "z")]
    found += [Finding("overlap", "w", "warning"), Finding("flagged", "n", "note")]
    assert describe_split(annotations, [], "fail") == "4 images, 3 objects, 1 class"
    faults, warnings = describe_split(annotations, found, "fix").splitlines()[1:]
    assert (faults, warnings) == ("repaired or left out: outside (2), no_area (1)", "warnings: overlap (1)")
    assert "\nleft out: outside (2), no_area (1)\n" in describe_split(annotations, found, "skip")
    empty = Finding(WITHOUT_OBJECTS, "2 without objects are left out", "note")
    assert describe_split(annotations, [empty], "fail").splitlines()[1:] == ["2 without objects are left out"]


def test_a_model_is_named_by_its_parts_and_counted():
    model = nn.Sequential(nn.Linear(1000, 999), nn.Linear(10, 10))
    model[1].requires_grad_(False)
    settings = {"backbone": {"_target_": "a.ResNet", "depth": 50}, "neck": {"_target_": "b.FPN"}, "rpn": None}
    assert describe_model(model, settings) == ("ResNet(depth=50), FPN\n1.0 M parameters, 1.0 M of them trained")
    assert describe_model(model[1], {}) == "Linear\n110 parameters, 0 of them trained"


def test_input_is_the_resize_of_training_and_of_evaluation():
    train = {"resize": {"_target_": "x.ResizeShortestSide", "sides": [640, 672, 800], "max_side": 1333, "p": 1.0}}
    evaluation = {"resize": {"_target_": "x.ResizeShortestSide", "sides": [800], "max_side": 1333}}
    assert describe_input(train, evaluation).splitlines() == [
        "ResizeShortestSide(sides=640..800, max_side=1333)",
        "ResizeShortestSide(sides=800, max_side=1333) in evaluations",
    ]
    assert describe_input(evaluation, evaluation) == "ResizeShortestSide(sides=800, max_side=1333)"
    assert describe_node(None) == "as large as the images"


def test_device_is_named_with_precision_and_ranks():
    threads = torch.get_num_threads()
    assert describe_device(torch.device("cpu"), "bf16", 1) == f"cpu ({threads} threads), bf16"
    assert describe_device(torch.device("cpu"), "fp32", 2).endswith(", fp32, 2 ranks")
