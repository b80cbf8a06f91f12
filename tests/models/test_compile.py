"""torch.compile of the training step and of detection: one graph without a break, compiled once for each canvas."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import torch
from compare import assert_close
from test_detector import make_batch, make_model, spread_out
from tiny import INGREDIENTS, TINY
from torch._dynamo.testing import CompileCounterWithBackend

from fpn_det.composition import compose
from fpn_det.models.box_heads import TwoLayerHead
from fpn_det.models.detector import Detector
from fpn_det.models.necks.fpn import FPN
from fpn_det.models.roi_head import ROIHead
from fpn_det.models.timm_backbone import TimmBackbone
from fpn_det.structures import Detections

CONTENTS = [
    {"objects": (3, 1)},
    {"objects": (0, 0)},
    {"objects": (8, 2)},
    {"objects": (1, 1), "sizes": [[96, 100], [50, 128]]},
    {"objects": (5, 0), "sizes": [[64, 64], [96, 128]]},
]


@pytest.fixture(autouse=True)
def empty_compile_cache() -> None:
    torch._dynamo.reset()


def compiled(function, backend: CompileCounterWithBackend):
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=False)


def check_losses(canvases: list[tuple[int, int]], model: Detector | None = None) -> None:
    model, backend = (model or make_model()).train(), CompileCounterWithBackend("aot_eager")
    step = compiled(lambda batch, number: model(batch, number).terms, backend)
    number = 0
    for canvas in canvases:
        for content in CONTENTS if canvas == (96, 128) else CONTENTS[:2]:
            batch = make_batch(canvas=canvas, **content)
            torch.manual_seed(number)  # of stochastic depth
            expected = model(batch, number).terms
            torch.manual_seed(number)
            losses = step(batch, torch.tensor(number))
            for name, value in expected.items():
                assert_close(losses[name], value, 1e-5)
            number += 1
    torch.stack(list(losses.values())).sum().backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)
    assert backend.frame_count == len(canvases)


def check_detections(canvases: list[tuple[int, int]], model: Detector | None = None) -> None:
    model, backend = spread_out(model or make_model()).eval(), CompileCounterWithBackend("aot_eager")
    detect = compiled(lambda batch: model.detect(batch), backend)
    for canvas in canvases:
        for content in CONTENTS if canvas == (96, 128) else CONTENTS[:2]:
            batch = make_batch(canvas=canvas, **content)
            assert_same_detections(detect(batch), model.detect(batch))
    assert backend.frame_count == len(canvases)


def assert_same_detections(detections: Detections, expected: Detections) -> None:
    assert expected.valid.any()
    for image, expected_image in zip(detections.images(), expected.images(), strict=True):
        for values, expected_values in zip(image, expected_image, strict=True):
            assert_close(values.float(), expected_values.float(), 1e-5)


def test_losses_are_one_graph_for_any_content():
    check_losses([(96, 128)])


def test_detection_is_one_graph_for_any_content():
    check_detections([(96, 128)])


@pytest.mark.slow
@pytest.mark.parametrize("words", INGREDIENTS)
def test_losses_and_detection_with_an_ingredient_are_one_graph_each(words: str):
    model = compose([*TINY, *words.split()]).build_model(3)
    check_losses([(96, 128)], model)
    check_detections([(96, 128)], model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convnext_atto", "tf_efficientnet_lite0"])
def test_losses_and_detection_with_a_backbone_of_timm_are_one_graph_each(name: str):
    pytest.importorskip("timm", reason="needs the extra timm")
    torch.manual_seed(0)
    head = partial(ROIHead, box_head=partial(TwoLayerHead, width=64))
    model = Detector(3, TimmBackbone(name), partial(FPN, channels=32), roi_head=head)
    check_losses([(96, 128)], model)
    check_detections([(96, 128)], model)


@pytest.mark.slow
def test_losses_are_one_graph_for_each_canvas():
    check_losses([(96, 128), (128, 128), (64, 96)])


@pytest.mark.slow
def test_detection_is_one_graph_for_each_canvas():
    check_detections([(96, 128), (128, 128), (64, 96)])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_losses_and_gradients_of_inductor_are_those_of_the_plain_step():
    model = make_model().train()
    step = torch.compile(lambda batch, number: model(batch, number).terms, fullgraph=True, dynamic=False)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for number, content in enumerate(CONTENTS):
        batch = make_batch(**content)
        expected, terms = model(batch, number).terms, step(batch, torch.tensor(number))
        for name, value in expected.items():
            assert_close(terms[name], value, 1e-5)
        plain, gradient = (
            torch.cat([part.flatten() for part in torch.autograd.grad(sum(losses.values()), weights)])
            for losses in (expected, terms)
        )
        # rounding turns a few ReLUs near zero on or off
        assert torch.linalg.vector_norm(gradient - plain) < 2e-3 * torch.linalg.vector_norm(plain)


def test_suppression_by_class_equals_suppression_of_the_candidates_that_pass(monkeypatch: pytest.MonkeyPatch):
    model, batch = spread_out(make_model()).eval(), make_batch()
    expected = model.detect(batch)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # selects the way with fixed shapes
    assert_same_detections(model.detect(batch), expected)
