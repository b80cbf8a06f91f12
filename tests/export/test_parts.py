"""Parts that are refused before they are traced, and a small detector for the tests of files."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch

from fpn_det.export.metadata import Metadata
from fpn_det.export.writing import refuse_unsupported, require_libraries
from fpn_det.models.anchors import AnchorGenerator
from fpn_det.models.box_heads import TwoLayerHead
from fpn_det.models.detector import Detector
from fpn_det.models.necks.fpn import FPN
from fpn_det.models.resnet import ResNet
from fpn_det.models.roi_head import ROIHead
from fpn_det.models.rpn import RPN
from fpn_det.models.selection import ProposalFilter

METADATA = Metadata(class_names=["a", "b", "c"], category_ids=[1, 2, 3])


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


def test_deformable_convolutions_are_refused_before_tracing_where_the_format_has_none():
    with pytest.raises(ValueError, match="got deformable convolutions and format=openvino"):
        refuse_unsupported(make(deformable=(5,)), "openvino")
    refuse_unsupported(make(), "openvino")
    refuse_unsupported(make(deformable=(5,)), "onnx")


def test_a_missing_library_is_told_before_tracing(monkeypatch):
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # an import of it fails
    with pytest.raises(ValueError, match=r"the library onnxruntime, got none .* pip install 'fpn_det\[onnx\]'"):
        require_libraries("onnx", "fp32")
    require_libraries("torch", "fp16")
