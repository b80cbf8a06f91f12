"""One case of `test_matrix` as a program: python tests/export/matrix_case.py <case> <folder>. Prints its results as JSON.

A case is a program because openvino keeps handlers on the streams of its process, and several detectors would fill the memory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.ops import FrozenBatchNorm2d

from fpn_det.benchmark.contestants import take_statistics
from fpn_det.composition import compose
from fpn_det.config import EXPORTED
from fpn_det.export.exported import ExportedDetector, ExportedFile
from fpn_det.export.graph import Graph
from fpn_det.export.libraries import is_installed
from fpn_det.export.metadata import Metadata
from fpn_det.export.program import write_program
from fpn_det.export.proof import cases, compare
from fpn_det.export.writing import write_onnx, write_openvino
from fpn_det.interop.conventions import UnfoldedDetector
from fpn_det.interop.conversion import convert
from fpn_det.models.detector import Detector
from fpn_det.models.layers import set_foldable
from fpn_det.models.resnet import BasicBlock, Bottleneck
from fpn_det.structures import Batch, Targets

# Narrow, because the widths change nothing but the time, except in the first and the last case.
NARROW = ("model.neck.channels=64", "model.roi_head.box_head.width=256")
R50 = ("experiment=r50_fpn", *NARROW)
R18 = (*R50, "model.backbone.depth=18")
AGNOSTIC = (
    "model.roi_head.predictor={_target_: fpn_det.models.roi_head.BoxPredictor, _partial_: true, class_agnostic: true}"
)
# The words of each case, and its number of classes.
CASES: dict[str, tuple[tuple[str, ...], int]] = {
    "r50_fpn": (("experiment=r50_fpn",), 80),
    "r18_fpn": (R18, 1),
    "r18_pafpn": ((*R18, "neck=pafpn"), 80),
    "r50_pafpn": ((*R50, "neck=pafpn"), 1),
    "r18_bifpn": ((*R18, "neck=bifpn"), 3),
    "r50_bifpn": ((*R50, "neck=bifpn"), 80),
    "r18_single_map": ((*R18, "neck=single_map"), 80),
    "r50_single_map": ((*R50, "neck=single_map"), 3),
    "efficientnet_lite0": (
        ("experiment=finetune_small", *NARROW, "model.backbone.weights=null", "model.backbone.frozen_stages=0"),
        3,
    ),
    "convnext": (
        (
            "experiment=convnext_tiny_fpn_strong",
            *NARROW,
            "model.backbone.name=convnext_atto",
            "model.backbone.weights=null",
        ),
        3,
    ),
    "cascade": (("experiment=small", *NARROW), 3),
    "class_agnostic": ((*R18, AGNOSTIC), 80),
    "torchvision": (("experiment=compat/torchvision_r50_fpn",), 80),
}
QUANTIZED = "r50_fpn"
SIZES = ((240, 320), (480, 640), (240, 320))


def make_batch(size: tuple[int, int], number: int, in_float: bool) -> Batch:
    """An image of smooth noise, padded to the stride."""
    height, width = size
    coarse = torch.rand(1, 3, height // 16, width // 16, generator=torch.Generator().manual_seed(number))
    pixels = F.interpolate(coarse, size, mode="bilinear")
    pixels = (pixels - 0.5) * 4 if in_float else (pixels * 255).to(torch.uint8)
    sizes, none = torch.tensor([size]), Targets.pad([torch.zeros(0, 4)], [torch.zeros(0).long()])
    return Batch(F.pad(pixels, (0, -width % 32, 0, -height % 32)), sizes, sizes, none, torch.tensor([number]))


def make(name: str) -> Detector:
    """The detector of a case, with random weights."""
    words, num_classes = CASES[name]
    torch.manual_seed(0)
    model = compose(words).build_model(num_classes).eval()
    if name == "torchvision":
        peer = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=num_classes + 1)
        model.load_state_dict(convert(peer.state_dict(), "torchvision", "fpn_det").state)
    return model


@torch.no_grad()
def spread_out(model: Detector, example: Batch, grey: Batch) -> None:
    """Give random weights the spreads of a trained detector, layer by layer: many detections on an example, none on grey.

    Norms take the statistics of the example, other layers are scaled at their next call, and the background gets a bias.
    """
    assert model.rpn is not None and model.roi_head is not None
    set_foldable(model, False)  # so that norms are called
    for block in model.modules():
        if isinstance(block, BasicBlock | Bottleneck):
            # Random residual branches as strong as their shortcuts amplify the rounding of 16 blocks thirtyfold.
            (block.bn3 if isinstance(block, Bottleneck) else block.bn2).weight.mul_(0.2)
    norms = [module for module in model.modules() if isinstance(module, FrozenBatchNorm2d | nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(take_statistics) for norm in norms]
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    for name, layer in layers:
        if layer.bias is not None and not name.startswith("rpn.head."):
            hooks.append(layer.register_forward_hook(_spreading(1.0)))
    hidden, head = model.pyramid(example).levels[0], model.rpn.head
    for layer, spread in [*((conv, 1.0) for conv in head.convs), (head.objectness, 2.0), (head.deltas, 0.3)]:
        output = _spreading(spread)(layer, (hidden,), layer(hidden))
        hidden = output.relu() if layer in head.convs else hidden
    model.raw(example)
    for hook in hooks:
        hook.remove()
    set_foldable(model, not isinstance(model, UnfoldedDetector))
    for name, layer in layers:
        if name.endswith("class_logits"):
            _teach(layer, _inputs_of(layer, model, example), _inputs_of(layer, model, grey))
    # the bias of the background with which the highest score on grey becomes half the threshold; a mean of stages needs several steps
    while (scores := model.raw(grey).scores).amax() > 0.51 * model.score_threshold:
        objects = scores.sum(dim=2)
        odds = (2 / model.score_threshold * scores.amax(dim=2) - objects) / (1 - objects)
        for name, layer in layers:
            if name.endswith("class_logits"):
                layer.bias[-1] += odds.amax().log().clamp(min=0)


def _inputs_of(layer: nn.Module, model: Detector, batch: Batch) -> Tensor:
    found: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    model.raw(batch)
    hook.remove()
    return found[0]


def _teach(layer: nn.Module, objects: Tensor, background: Tensor) -> None:
    """Fit a classifier, by ridge regression, to random logits for some features and to background for others."""
    inputs, classes = torch.cat([objects, background]), layer.weight.shape[0]
    wanted = torch.cat([10.0 * torch.randn(len(objects), classes), torch.zeros(len(background), classes)])
    wanted[len(objects) :, -1] = 5.0
    inputs, wanted = inputs.double(), wanted.double()
    inputs = F.pad(inputs, (0, 1), value=1.0)
    square = inputs.T @ inputs
    solution = torch.linalg.solve(square + square.diagonal().mean() * torch.eye(len(square)), inputs.T @ wanted)
    layer.weight.copy_(solution[:-1].T)
    layer.bias.copy_(solution[-1])


def _spreading(spread: float) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
    """A hook that scales the weights of a layer so that its outputs are of the order of `spread`."""

    def rescale(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        factor = spread / output.square().mean().sqrt()
        layer.weight.mul_(factor)
        layer.bias.mul_(factor)
        return output * factor

    return rescale


def main(name: str, folder: Path) -> None:
    """Export the detector of a case in all formats and compare."""
    model = make(name)
    in_float = isinstance(model, UnfoldedDetector)
    batches = [make_batch(size, number, in_float) for number, size in enumerate(SIZES)]
    example = batches[1]
    grey = replace(batches[0], pixels=torch.full_like(batches[0].pixels, 0.0 if in_float else 114))
    *images, _, mixed = cases(batches)
    compared = [*images, grey, mixed]  # random weights have detections on the proof's image without objects
    spread_out(model, example, grey)
    labels = [str(label) for label in range(CASES[name][1])]
    metadata = Metadata(
        class_names=labels, category_ids=list(range(len(labels))), dtype="float32" if in_float else "uint8"
    )
    program = Graph(model).trace(None, example.pixels.dtype)
    files = {format: folder / f"model{suffix}" for format, suffix in EXPORTED.items()}
    write_program(program, files["torch"], asdict(metadata))
    write_onnx(program, files["onnx"], metadata)
    if is_installed("openvino"):
        write_openvino(files["onnx"], files["openvino"], metadata)
    if is_installed("nncf") and name == QUANTIZED:
        inputs = [(batch.pixels.permute(0, 2, 3, 1).contiguous(), batch.sizes) for batch in batches[:2]]
        files["int8"] = folder / "int8.xml"
        write_openvino(files["onnx"], files["int8"], replace(metadata, precision="int8"), inputs)
    results: dict[str, Any] = {"most": int(model.detect(example).valid.sum())}
    exported = {format: ExportedDetector(ExportedFile(file), model) for format, file in files.items() if file.exists()}
    for format, detector in exported.items():
        found = compare(model, detector, compared)
        results[format] = asdict(found) | {"ok": found.is_within_tolerance}
    with torch.no_grad():
        model.roi_head.predictor.class_logits.weight.mul_(1.01)
    results["other weights are noticed"] = not compare(model, exported["onnx"], [example]).is_within_tolerance
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
