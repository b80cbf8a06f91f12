"""ONNX files of different heads beside torch, and parts that are refused before they are traced."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from fpn_det.export.exported import ExportedDetector, ExportedFile
from fpn_det.export.graph import Graph
from fpn_det.export.proof import cases, compare
from fpn_det.export.writing import refuse_unsupported, write
from fpn_det.models.anchors import AnchorGenerator
from fpn_det.models.box_heads import TwoLayerHead
from fpn_det.models.cascade import CascadeROIHead
from fpn_det.models.detector import Detector
from fpn_det.models.necks.bifpn import BiFPN
from fpn_det.models.necks.fpn import FPN
from fpn_det.models.resnet import ResNet
from fpn_det.models.roi_head import BoxPredictor, ROIHead
from fpn_det.models.rpn import RPN
from fpn_det.models.selection import ProposalFilter

sys.path.insert(0, str(Path(__file__).parent.parent / "models"))
from test_detector import make_batch

METADATA = {
    "class_names": ["a", "b", "c"],
    "category_ids": [1, 2, 3],
    "config": "",
    "dtype": "uint8",
    "size": None,
    "step": 0,
}


def make(neck: type = FPN, head: Callable = ROIHead, deformable: tuple[int, ...] = (), **options) -> Detector:
    """A small detector whose scores and boxes differ, as after training."""
    torch.manual_seed(0)
    proposals = ProposalFilter(100, 50)
    model = Detector(
        3,
        ResNet(18, deformable=deformable),
        partial(neck, channels=32),
        partial(
            RPN,
            anchors=partial(AnchorGenerator, sizes=[16, 32, 64, 128, 256]),
            train_filter=proposals,
            test_filter=proposals,
        ),
        partial(head, box_head=partial(TwoLayerHead, width=64), **options),
    ).eval()
    with torch.no_grad():
        model.rpn.head.objectness.weight.mul_(30)
        model.rpn.head.deltas.weight.mul_(5)
        for name, layer in model.roi_head.named_modules():
            if name.endswith("class_logits"):
                layer.weight.mul_(60)
    return model


PARTS: dict[str, Callable[[], Detector]] = {
    "fpn": make,
    "bifpn": partial(make, BiFPN),
    "cascade": partial(make, head=CascadeROIHead),
    "class-agnostic": partial(make, predictor=partial(BoxPredictor, class_agnostic=True)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_a_file_of_each_part_detects_what_torch_detects(name: str, tmp_path: Path):
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    model, path = PARTS[name](), tmp_path / "model.onnx"
    write(Graph(model).trace(None, torch.uint8), "onnx", path, METADATA)
    batches = [make_batch((1,), (100, 160)), make_batch((2,), (160, 224))]
    found = compare(model, ExportedDetector(ExportedFile(path), model), cases(batches))
    assert found.detections > 20
    assert found.is_within_tolerance, found


def test_deformable_convolutions_are_refused_before_tracing_where_the_format_has_none():
    with pytest.raises(ValueError, match="got deformable convolutions and format=openvino"):
        refuse_unsupported(make(deformable=(5,)), "openvino")
    refuse_unsupported(make(), "openvino")
    refuse_unsupported(make(deformable=(5,)), "onnx")
