"""The training step and detection on CUDA tensors without data, which need no GPU.

Every operator computes shapes, dtypes and devices only. An operator that needs a value, such as `.item()`, raises; an
operator between devices is recorded. Autograd needs a CUDA context, so the backward pass runs on CPU tensors without data.
"""

from __future__ import annotations

import types
from dataclasses import replace

import pytest
import torch
from test_detector import make_batch
from tiny import INGREDIENTS, TINY
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from fpn_det.benchmark.config import BenchmarkConfig
from fpn_det.benchmark.gpu_counts import DeviceCounter, count_ours
from fpn_det.composition import compose
from fpn_det.data.flip_resize import FlipResize
from fpn_det.models import losses as losses_module
from fpn_det.models import rpn as rpn_module
from fpn_det.models.detector import Detector
from fpn_det.models.timm_backbone import TimmBackbone
from fpn_det.structures import Proposals, _map_tensors
from fpn_det.training import ema
from fpn_det.training.optimization import Optimization

CONV_HEAD = "model.roi_head.box_head._target_=fpn_det.models.box_heads.ConvHead"
MODELS = [
    "neck=fpn",
    "neck=bottom_up",
    "neck=top_down_only",
    "neck=finest_level",
    "neck=single_map",
    "neck=single_map model.neck.level=C4 model.neck.channels=null",
    "neck=feature_hierarchy",
    "neck=pafpn",
    "neck=bifpn",
    "neck=fpn model.neck.upsampling=bilinear model.neck.merge=average",
    "model.roi_head=null evaluation=proposals trainer.best_metric=AR1000",
    "model.rpn.head.num_convs=2",
    f"{CONV_HEAD} model.roi_head.box_head.norm=group",
    *INGREDIENTS,
]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(autouse=True)
def autocast_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep autocast for CUDA on, which torch turns off where it finds no GPU."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)


def build(words: str, precision: str = "fp32"):
    """(settings, model, batch) with all tensors on a CUDA device; call it under FakeTensorMode."""
    overrides = [*TINY, *words.split(), f"precision={precision}"]
    if "model.roi_head=null" in overrides:
        overrides = [word for word in overrides if "roi_head." not in word]
    config = compose(overrides)
    with torch.device("cuda"):
        model = config.build_model(3).train()
    return config, model, make_batch((2, 0)).to("cuda")


@pytest.mark.parametrize("words", MODELS)
def test_losses_and_detections_stay_on_the_device(words: str):
    with FakeTensorMode():
        _, model, batch = build(words)
        for dtype in PRECISIONS.values():
            with DeviceCounter() as watch, torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                losses = model.train()(batch, 0)
                detections = model.eval().detect(batch)
            assert not watch.between_devices
            assert watch.matrix_dtypes == {dtype} and watch.upsampling_dtypes <= {dtype}
            assert watch.channels_last == (dtype != torch.float32)
            for value in losses.terms.values():
                assert value.device.type == "cuda" and value.dtype == torch.float32 and value.requires_grad
            assert detections.boxes.device.type == "cuda"
            assert detections.boxes.dtype == detections.scores.dtype == torch.float32


def test_detection_with_batch_norm_in_the_box_head_stays_on_the_device():
    with FakeTensorMode():
        _, model, batch = build(f"{CONV_HEAD} model.roi_head.box_head.norm=batch")
        with DeviceCounter() as watch:
            model.eval().detect(batch)
        assert not watch.between_devices
        with pytest.raises(DynamicOutputShapeException):  # statistics of the boxes in use are one host read in training
            model.train()(batch, 0)


def test_a_model_without_an_rpn_stays_on_the_device():
    with FakeTensorMode():
        _, model, batch = build("neck=fpn")
        model.rpn = None
        proposals = Proposals.stack([torch.rand(20, 4)] * len(batch.pixels))
        with_proposals = replace(batch, proposals=_map_tensors(proposals, lambda tensor: tensor.to("cuda")))
        with DeviceCounter() as watch:
            model(with_proposals, 0)
            model.detect(with_proposals)
        assert not watch.between_devices


def test_a_model_with_a_backbone_of_timm_stays_on_the_device(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("timm", reason="needs the extra timm")
    model = Detector(3, TimmBackbone("convnext_atto", drop_path=0.1)).train()  # timm reads values when it builds one
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    with FakeTensorMode() as mode:
        model._apply(lambda tensor: mode.from_tensor(tensor).to("cuda"))
        batch = make_batch((2, 0)).to("cuda")
        with DeviceCounter() as watch:
            losses = model(batch, 0)
            detections = model.eval().detect(batch)
        assert not watch.between_devices
        assert losses.total().device.type == detections.boxes.device.type == "cuda"


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("antialias", [False, True])
def test_resizing_stays_on_the_device(flip: bool, antialias: bool):
    with FakeTensorMode(), torch.device("cuda"):
        pixels, canvas = torch.zeros(60, 80, 3, dtype=torch.uint8), torch.zeros(96, 128, 3, dtype=torch.uint8)
        with DeviceCounter() as watch:
            FlipResize((45, 60), flip, "cv2", antialias).apply_on_device(pixels, canvas[:45, :60])
        assert not watch.between_devices


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_update_stays_on_the_device(precision: str, monkeypatch: pytest.MonkeyPatch):
    with FakeTensorMode():
        config, model, batch = build("trainer.ema=0.99 trainer.clip_norm=1.0", precision)
        with torch.device("cuda"):
            average = config.build_model(3)
        monkeypatch.setattr(ema, "copy", types.SimpleNamespace(deepcopy=lambda _: average))  # fails on fake tensors
        schedule = config.build_schedule()(steps=10)
        optimizer = config.build_recipe().build(model, len(batch))
        optimization = Optimization(model, optimizer, schedule, precision, config.trainer.clip_norm, config.trainer.ema)
        for parameter in optimization.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        with DeviceCounter() as watch:
            optimization.set_step(0)
            optimization._update(torch.ones((), dtype=torch.bool, device="cuda"))
            measures = optimization.measures()
        assert not watch.between_devices
        assert {value.device.type for value in measures.values()} == {"cuda"}


def read_value(values: Tensor, mask: Tensor) -> Tensor:
    return values.new_full((), values.sum().item())


def copy_constant(values: Tensor, mask: Tensor) -> Tensor:
    return (values * values.new_tensor([1.0])).sum()


def index_from_host(values: Tensor, mask: Tensor) -> Tensor:
    return values[torch.tensor([0])].sum()


def copy_to_host(values: Tensor, mask: Tensor) -> Tensor:
    return values.cpu().sum()


@pytest.mark.parametrize("fault", [read_value, copy_constant, index_from_host, copy_to_host])
def test_a_read_or_a_copy_in_the_step_is_found(fault, monkeypatch: pytest.MonkeyPatch):
    assert rpn_module.masked_sum is losses_module.masked_sum
    monkeypatch.setattr(rpn_module, "masked_sum", fault)
    with FakeTensorMode():
        _, model, batch = build("neck=fpn")
        try:
            with DeviceCounter() as watch:
                model(batch, 0)
        except DataDependentOutputException:
            assert fault is read_value
        else:
            assert watch.between_devices


@pytest.mark.parametrize("precision", PRECISIONS)
def test_counts_of_a_step_and_of_detection(precision: str):
    counters = count_ours(BenchmarkConfig(precision=precision))
    for counter in counters.values():
        assert not counter.between_devices and not counter.host_reads
    assert counters["backward"].matrix_dtypes == counters["forward"].matrix_dtypes == {PRECISIONS[precision]}
    kernels = {name: counter.kernels.total() for name, counter in counters.items()}
    casts = 0 if precision == "fp32" else 140  # of weights and activations, in each direction
    assert kernels["detection"] <= 290 + casts
    assert kernels["forward"] + kernels["backward"] + kernels["update"] <= 600 + 2 * casts


def test_counter_by_hand():
    values = torch.zeros(100)
    with DeviceCounter() as counter:
        values + values.view(10, 10).flatten()  # a view is no kernel
        values.mul_(2)
        torch._foreach_add_([torch.empty(70_000), torch.empty(1)], 1)
        torch.mm(torch.empty(2, 2), torch.empty(2, 2))
    assert dict(counter.kernels) == {"add": 1, "mul_": 1, "_foreach_add_": 1}
    assert counter.bytes == 1200 + 800 + 2 * 4 * 70_001
    with DeviceCounter() as counter:
        values.sum().item()
        torch.tensor([1.0])
    assert (counter.host_reads, counter.host_constants) == (1, 1)
