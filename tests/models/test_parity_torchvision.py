"""The compat experiments against torchvision's own detectors: same weights, same images, same numbers.

The weights are random, with norms that fit them (so that activations stay of order one) and last layers scaled up until
hundreds of detections pass.
"""

from __future__ import annotations

import copy
import dataclasses
from functools import cache
from pathlib import Path

import pytest
import torch
import torchvision
from compare import assert_close
from torch import Tensor, nn

from fpn_det import api
from fpn_det.api import build_model
from fpn_det.composition import compose
from fpn_det.data.transforms import Normalize, ResizeShortestSide
from fpn_det.interop.conversion import convert
from fpn_det.models.detector import Detector
from fpn_det.structures import Batch, Detections, Targets

NUM_CLASSES = 90
NORMALIZE = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
BUILDERS = {
    "torchvision_r50_fpn": torchvision.models.detection.fasterrcnn_resnet50_fpn,
    "torchvision_r50_fpn_v2": torchvision.models.detection.fasterrcnn_resnet50_fpn_v2,
}


def images_of(*sizes: tuple[int, int], seed: int = 0) -> list[Tensor]:
    """Smooth noise u8 [3, h, w], like a picture more than white noise is."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for height, width in sizes:
        coarse = torch.rand(1, 3, height // 8, width // 8, generator=generator)
        fine = torch.rand(1, 3, height, width, generator=generator)
        smooth = nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
        images.append(((0.8 * smooth + 0.2 * fine)[0] * 255).to(torch.uint8))
    return images


@cache
def torchvision_model(name: str) -> nn.Module:
    """In evaluation mode; `_skip_resize` leaves the images of the training mode at their size."""
    torch.manual_seed(0)
    model = BUILDERS[name](weights=None, weights_backbone=None, num_classes=NUM_CLASSES + 1, _skip_resize=True)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.0)
        nn.init.normal_(norm.bias, std=0.1)
        norm.momentum = 1.0
    predictor = model.roi_heads.box_predictor
    with torch.no_grad():
        targets = [{"boxes": torch.tensor([[10.0, 10, 60, 50]]), "labels": torch.tensor([1])}] * 2
        model(
            [image / 255 for image in images_of((160, 192), (160, 192), seed=1)], targets
        )  # norms learn their statistics
        for layer, scale in (
            (model.rpn.head.cls_logits, 30),
            (model.rpn.head.bbox_pred, 3),
            (predictor.cls_score, 12),
            (predictor.bbox_pred, 3),
        ):
            layer.weight *= scale
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


@cache
def our_model(name: str) -> Detector:
    settings = compose([f"experiment=compat/{name}", "model.backbone.weights=null"])
    model = build_model(settings, NUM_CLASSES)
    conversion = convert(torchvision_model(name).state_dict(), "torchvision", "fpn_det")
    model.load_state_dict(conversion.state)
    return model.eval()


def make_batch(images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Batch:
    sizes = torch.tensor([image.shape[1:] for image in images])
    height, width = (-(-side // 32) * 32 for side in sizes.amax(dim=0).tolist())
    pixels = torch.zeros(len(images), 3, height, width)
    for canvas, image in zip(pixels, images, strict=True):
        normalized = NORMALIZE.apply(image.permute(1, 2, 0).numpy())
        canvas[:, : image.shape[1], : image.shape[2]] = torch.from_numpy(normalized).permute(2, 0, 1)
    targets = targets or [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}] * len(images)
    drawn = Targets.pad([target["boxes"] for target in targets], [target["labels"] - 1 for target in targets])
    return Batch(pixels, sizes, sizes, drawn, torch.arange(len(images)))


def assert_same_detections(ours: Detections, theirs: list[dict[str, Tensor]], least: int) -> None:
    for (boxes, scores, labels), expected in zip(ours.images(), theirs, strict=True):
        assert len(boxes) == len(expected["boxes"]) >= least
        assert torch.equal(labels + 1, expected["labels"])
        assert_close(boxes, expected["boxes"], 5e-6)
        assert_close(scores, expected["scores"], 1e-5)


def detect_both(name: str, images: list[Tensor]) -> tuple[Detections, list[dict[str, Tensor]]]:
    theirs = torchvision_model(name)
    theirs.transform.min_size, theirs.transform.max_size = (
        (min(map(min, (image.shape[1:] for image in images))),),
        10_000,
    )
    batch = make_batch(images)
    with torch.no_grad():
        return our_model(name).detect(batch), theirs([image / 255 for image in images])


@pytest.mark.parametrize(("name", "size"), [("torchvision_r50_fpn", (160, 200)), ("torchvision_r50_fpn_v2", (96, 112))])
def test_detections_equal_those_of_torchvision(name: str, size: tuple[int, int]):
    ours, theirs = detect_both(name, images_of(size))
    assert_same_detections(ours, theirs, least=100)


def test_detections_of_unequal_images_in_a_batch_equal_those_of_torchvision():
    ours, theirs = detect_both("torchvision_r50_fpn", images_of((96, 132), (96, 96), (96, 167), seed=2))
    assert_same_detections(ours, theirs, least=50)


def test_predictions_from_files_equal_those_of_torchvision(tmp_path: Path):
    """All the way: a file of weights, images of any size, torchvision's own resizing."""
    theirs = torchvision_model("torchvision_r50_fpn")
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    predictor = api.load(tmp_path / "weights.pth", device="cpu")
    (resize,) = (step for step in predictor.preprocessing.transform.deferred if isinstance(step, ResizeShortestSide))
    resize.sides, resize.max_side = [109], 160
    theirs.transform.min_size, theirs.transform.max_size = (109,), 160
    for image in images_of((120, 200), (167, 133), seed=5):
        (found,) = predictor.predict([image.permute(1, 2, 0).numpy()])
        with torch.no_grad():
            (expected,) = theirs([image / 255])
        assert len(found.boxes) == len(expected["boxes"]) >= 50
        assert torch.equal(found.labels + 1, expected["labels"])
        assert_close(found.boxes, expected["boxes"], 5e-6)
        assert_close(found.scores, expected["scores"], 1e-5)


def drawn(*counts: int) -> list[dict[str, Tensor]]:
    """Targets as torchvision wants them, labels from 1, one image for each count of objects."""
    generator = torch.Generator().manual_seed(3)
    targets = []
    for count in counts:
        corners = torch.rand(count, 2, generator=generator) * 50
        sides = 8 + 40 * torch.rand(count, 2, generator=generator)
        labels = torch.randint(1, NUM_CLASSES + 1, (count,), generator=generator)
        targets.append({"boxes": torch.cat([corners, corners + sides], dim=1), "labels": labels})
    return targets


@pytest.mark.parametrize(
    "name", ["torchvision_r50_fpn", pytest.param("torchvision_r50_fpn_v2", marks=pytest.mark.slow)]
)
def test_losses_and_gradients_equal_those_of_torchvision(name: str):
    """With samplers that take all there is, images with many objects, one and none; norms in training."""
    theirs, ours = copy.deepcopy(torchvision_model(name)).train(), copy.deepcopy(our_model(name)).train()
    theirs.rpn._post_nms_top_n = {"training": 100, "testing": 100}
    ours.rpn.train_filter = dataclasses.replace(ours.rpn.train_filter, post_nms=100)
    for part in (theirs.rpn, theirs.roi_heads):
        part.fg_bg_sampler.batch_size_per_image = 100_000
    for part in (ours.rpn, ours.roi_head):
        part.sampler = dataclasses.replace(part.sampler, num_samples=100_000)
    images, targets = images_of((96, 128), (112, 96), (96, 96), seed=4), drawn(9, 1, 0)

    expected = theirs([image / 255 for image in images], targets)
    sum(expected.values()).backward()
    losses = ours(make_batch(images, targets), step=0)
    losses.total().backward()

    pairs = {
        "loss_objectness": "rpn_objectness",
        "loss_rpn_box_reg": "rpn_box",
        "loss_classifier": "roi_class",
        "loss_box_reg": "roi_box",
    }
    for theirs_name, name in pairs.items():
        assert losses.terms[name].item() == pytest.approx(expected[theirs_name].item(), rel=1e-4), name
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    converted = convert(theirs.state_dict() | gradients, "torchvision", "fpn_det").state
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, converted[name], 1e-4, name)
