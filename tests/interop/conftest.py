from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from fpn_det.models.box_heads import TwoLayerHead
from fpn_det.models.detector import Detector
from fpn_det.models.necks.fpn import FPN
from fpn_det.models.resnet import ResNet
from fpn_det.models.roi_head import BoxPredictor, ROIHead


def _make_detector(
    num_classes: int = 3,
    depth: int = 18,
    norm: str = "frozen",
    roi_head: Callable[..., ROIHead] = ROIHead,
    deformable: Sequence[int] = (),
    **predictor,
) -> Detector:
    parts = {"predictor": partial(BoxPredictor, **predictor)} if predictor else {}
    head = partial(roi_head, box_head=partial(TwoLayerHead, width=32), **parts)
    return Detector(
        num_classes, ResNet(depth, norm=norm, deformable=deformable), neck=partial(FPN, channels=16), roi_head=head
    )


@pytest.fixture(scope="session")
def make_detector() -> Callable[..., Detector]:
    """Makes small detectors."""
    return _make_detector


@pytest.fixture(scope="session")
def ours() -> dict[str, Tensor]:
    """The state dict of a small detector of three classes."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(value.shape, generator=generator) for name, value in _make_detector().state_dict().items()}
