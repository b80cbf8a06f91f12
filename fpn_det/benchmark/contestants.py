"""The two detectors, with equal weights, on equal images.

Random weights are not representative: activations double from block to block, all proposals cover the image, nothing is
detected. So torchvision's model is calibrated on the images, layer by layer, until the spread of its outputs is that of
a trained model, and fpn_det's model gets the same weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d, batched_nms

from fpn_det.benchmark.config import BenchmarkConfig
from fpn_det.interop.conversion import convert
from fpn_det.models.detector import Detector
from fpn_det.models.nms import nms_keep
from fpn_det.schema import Node
from fpn_det.structures import Batch, Pyramid, Targets
from fpn_det.training.capture import make_step
from fpn_det.training.config import TrainConfig
from fpn_det.training.optimization import PRECISIONS, Optimization

NUM_CLASSES = 80
OBJECTS = 8  # per image, about as many as in COCO
LEARNING_RATE = 1e-6  # small enough to keep the calibrated weights
LEVELS, PROPOSALS = 5, 2000  # groups of an image and boxes of a group that suppression is measured with
NMS_IOU = 0.7
PEER_NORMS: dict[str, type[nn.Module]] = {
    "frozen": FrozenBatchNorm2d,
    "batch": nn.BatchNorm2d,
}  # for model.backbone.norm

Run = Callable[[], object]


class Contestant(ABC):
    """A detector with its optimizer and a batch. Each method prepares inputs and returns the function to be timed."""

    def __init__(self, model: nn.Module, config: BenchmarkConfig, device: torch.device) -> None:
        self.model: nn.Module = model.to(device)
        self.config = config
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE, momentum=0.9, weight_decay=1e-4)
        dtype = PRECISIONS[config.precision]
        self.autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype is not None)

    def train(self) -> Run:
        """One training step: zero_grad, forward, backward, optimizer step."""
        self.model.train()

        def step() -> None:
            self.optimizer.zero_grad()
            with self.autocast():
                loss = self.loss()
            loss.backward()
            self.optimizer.step()

        return step

    def inference(self) -> Run:
        """Detections of the batch."""
        self.model.eval()

        @torch.no_grad()
        def detect() -> None:
            with self.autocast():
                self.detect()

        return detect

    @abstractmethod
    def loss(self) -> Tensor:
        """The sum of the four losses."""

    @abstractmethod
    def detect(self) -> list[int]:
        """Detect; returns the number of detections of each image."""

    @abstractmethod
    def roi_align(self) -> Run:
        """RoIAlign of as many boxes as in a training step, forward and backward."""

    @abstractmethod
    def rpn_loss(self) -> Run:
        """RPN head and losses, forward and backward."""

    @abstractmethod
    def nms(self) -> Run:
        """Suppression within each level of each image, of as many boxes as in a training step."""


class Ours(Contestant):
    """fpn_det's detector."""

    model: Detector

    def __init__(
        self, model: Detector, batch: Batch, settings: TrainConfig, config: BenchmarkConfig, device: torch.device
    ) -> None:
        super().__init__(model, config, device)
        if config.compile:
            model.backbone.compile(dynamic=True)
            model.neck.compile(dynamic=True)
        self.batch = batch.to(device)
        self.settings = settings

    def train(self) -> Run:
        """One training step; with `capture` a replayed one, guard against steps that are not finite included."""
        if not self.config.capture:
            return super().train()
        optimizer = self.settings.build_recipe().build(self.model, len(self.batch))
        schedule = self.settings.build_schedule()(steps=1)
        optimization = Optimization(self.model.train(), optimizer, schedule, self.settings.precision)
        step = make_step(optimization, True, tell=print)
        step([self.batch], 0)  # an ordinary one; the next one is captured
        return lambda: step([self.batch], 0)

    def loss(self) -> Tensor:
        return self.model(self.batch, 0).total()

    def detect(self) -> list[int]:
        return self.model.detect(self.batch).valid.sum(dim=1).tolist()

    def roi_align(self) -> Run:
        head = self.model.roi_head
        assert head is not None, "the benchmark's settings have one"
        boxes = self.model.propose(self.batch).boxes[:, : head.sampler.num_samples]
        pyramid, pool = self._pyramid(), head.pooler
        gradient = torch.randn_like(pool(pyramid, boxes).flatten(1))
        return lambda: pool(self._leaves(pyramid), boxes).flatten(1).backward(gradient)

    def rpn_loss(self) -> Run:
        pyramid, rpn = self._pyramid(), self.model.rpn
        assert rpn is not None, "the benchmark's settings have one"

        def step() -> None:
            leaves = self._leaves(pyramid)
            with self.autocast():
                losses = rpn.losses(rpn(leaves), leaves, self.batch, 0)
            losses.total().backward()

        return step

    def nms(self) -> Run:
        boxes, scores = make_crowd(len(self.batch), self.batch.pixels.device)
        boxes, scores = boxes.flatten(0, 1), scores.flatten(0, 1)  # a level of an image is a group
        valid = torch.ones_like(scores, dtype=torch.bool)
        return lambda: nms_keep(boxes, scores, valid, NMS_IOU, method=self.config.nms)

    @torch.no_grad()
    def _pyramid(self) -> Pyramid:
        return self.model.pyramid(self.batch)

    @staticmethod
    def _leaves(pyramid: Pyramid) -> Pyramid:
        """Copies of the maps as leaves of the graph, without the table of cells that the pyramid may have cached."""
        levels = [level.detach().requires_grad_() for level in pyramid.levels]
        return Pyramid(levels, pyramid.strides, pyramid.sizes)


class Torchvision(Contestant):
    """torchvision's Faster R-CNN. It gets float images of the final size, so it neither converts nor resizes."""

    model: FasterRCNN

    def __init__(self, model: FasterRCNN, batch: Batch, config: BenchmarkConfig, device: torch.device) -> None:
        super().__init__(model, config, device)
        if config.channels_last:
            model.to(memory_format=torch.channels_last)
        if config.compile:
            model.backbone.compile(dynamic=True)
        self.images, self.targets = _to_torchvision(batch.to(device))

    def loss(self) -> Tensor:
        return torch.stack(list(self.model(self.images, self.targets).values())).sum()

    def detect(self) -> list[int]:
        return [len(detections["scores"]) for detections in self.model(self.images)]

    def roi_align(self) -> Run:
        self.model.eval()
        images, features = self._features()
        heads = self.model.roi_heads
        with torch.no_grad():
            proposals, _ = self.model.rpn(images, features)
        boxes = [image_boxes[: heads.fg_bg_sampler.batch_size_per_image] for image_boxes in proposals]
        pool = partial(heads.box_roi_pool, boxes=boxes, image_shapes=images.image_sizes)
        gradient = torch.randn_like(pool(features).flatten(1))
        return lambda: pool(self._leaves(features)).flatten(1).backward(gradient)

    def rpn_loss(self) -> Run:
        images, features = self._features()
        rpn = self.model.rpn

        def step() -> None:
            leaves = list(self._leaves(features).values())
            with self.autocast():
                logits, deltas = rpn.head(leaves)
                anchors = rpn.anchor_generator(images, leaves)
                logits, deltas = _flatten_levels(logits, 1), _flatten_levels(deltas, 4)
                labels, gt_boxes = rpn.assign_targets_to_anchors(anchors, self.targets)
                regression_targets = rpn.box_coder.encode(gt_boxes, anchors)
                losses = rpn.compute_loss(logits, deltas, labels, regression_targets)
            torch.stack(losses).sum().backward()

        return step

    def nms(self) -> Run:
        boxes, scores = make_crowd(len(self.images), self.images[0].device)
        levels = torch.arange(LEVELS, device=boxes.device).repeat_interleave(PROPOSALS)
        images = list(zip(boxes.flatten(1, 2), scores.flatten(1), strict=True))
        return lambda: [batched_nms(*image, levels, NMS_IOU) for image in images]

    @torch.no_grad()
    def _features(self) -> tuple[ImageList, dict[str, Tensor]]:
        images, _ = self.model.transform(self.images)
        return images, self.model.backbone(images.tensors)

    @staticmethod
    def _leaves(features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: level.detach().requires_grad_() for name, level in features.items()}


def make_contestants(config: BenchmarkConfig, device: torch.device) -> tuple[Ours, Torchvision]:
    """Both detectors with the same weights, on the same batch. Sets the precision of float32 operators on CUDA."""
    torch.manual_seed(0)
    settings = config.compose(
        f"precision={config.precision}", f"optimizer.lr={LEARNING_RATE}", "optimizer.base_batch_size=null"
    )
    settings.set_precision()
    batch = make_batch(config.batch_size, config.size)
    peer = _make_torchvision(settings.model)
    _calibrate(peer, batch)
    model = settings.build_model(NUM_CLASSES)
    model.load_state_dict(convert(peer.state_dict(), "torchvision", "fpn_det").state)
    return Ours(model, batch, settings, config, device), Torchvision(peer, batch, config, device)


def make_batch(batch_size: int, size: tuple[int, int]) -> Batch:
    """Smooth noise with uniform rectangles as objects."""
    height, width = size
    coarse = torch.rand(batch_size, 3, height // 16 + 1, width // 16 + 1)
    pixels = F.interpolate(coarse, size, mode="bilinear").mul_(255).to(torch.uint8)
    boxes = _scatter_boxes(batch_size * OBJECTS, height, width).view(batch_size, OBJECTS, 4)
    for image, image_boxes in zip(pixels, boxes.long().tolist(), strict=True):
        for x1, y1, x2, y2 in image_boxes:
            image[:, y1:y2, x1:x2] = torch.randint(256, (3, 1, 1))
    labels = torch.randint(NUM_CLASSES, (batch_size, OBJECTS))
    sizes = torch.tensor([size]).expand(batch_size, 2)
    return Batch(pixels, sizes, sizes, Targets.pad(list(boxes), list(labels)), torch.arange(batch_size))


def make_crowd(batch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Boxes [B, LEVELS, PROPOSALS, 4] that overlap, and their scores [B, LEVELS, PROPOSALS]; always the same ones."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, LEVELS, PROPOSALS)
    corners = 600 * torch.rand(*shape, 2, generator=generator)
    sides = 20 + 100 * torch.rand(*shape, 2, generator=generator)
    boxes, scores = torch.cat([corners, corners + sides], dim=3), torch.rand(shape, generator=generator)
    return boxes.to(device), scores.to(device)


def _scatter_boxes(count: int, height: int, width: int) -> Tensor:
    """Boxes [count, 4] inside an image, in whole px, with sides from 1/16 to 1/2 of the image's."""
    limits = torch.tensor([width, height])
    sides = (limits * 2.0 ** -(1 + 3 * torch.rand(count, 2))).ceil()
    corners = (torch.rand(count, 2) * (limits - sides)).floor()
    return torch.cat([corners, corners + sides], dim=1)


def _to_torchvision(batch: Batch) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images 0..1 and targets whose labels start at 1."""
    targets = batch.targets
    rows = zip(targets.boxes, targets.labels, targets.valid, strict=True)
    return list(batch.pixels.float() / 255), [{"boxes": b[valid], "labels": i[valid] + 1} for b, i, valid in rows]


def _make_torchvision(ours: Node) -> FasterRCNN:
    """torchvision's detector with the same numbers of proposals and RoIs."""
    backbone = resnet_fpn_backbone(
        backbone_name=f"resnet{ours['backbone']['depth']}",
        weights=None,
        norm_layer=PEER_NORMS[ours["backbone"]["norm"]],
        trainable_layers=5 - ours["backbone"]["frozen_stages"],
    )
    train, test = ours["rpn"]["train_filter"], ours["rpn"]["test_filter"]
    model = FasterRCNN(
        backbone,
        NUM_CLASSES + 1,
        rpn_pre_nms_top_n_train=train["pre_nms"],
        rpn_post_nms_top_n_train=train["post_nms"],
        rpn_pre_nms_top_n_test=test["pre_nms"],
        rpn_post_nms_top_n_test=test["post_nms"],
        rpn_batch_size_per_image=ours["rpn"]["sampler"]["num_samples"],
        box_batch_size_per_image=ours["roi_head"]["sampler"]["num_samples"],
    )
    model.transform.resize = lambda image, target: (image, target)
    return model


@torch.no_grad()
def _calibrate(model: FasterRCNN, batch: Batch) -> None:
    """Rescale every layer so that its outputs on these images have the spread of a trained model."""
    norms = [module for module in model.modules() if type(module) in PEER_NORMS.values()]
    hooks = [norm.register_forward_pre_hook(take_statistics) for norm in norms]
    head, box_head, predictor = model.rpn.head, model.roi_heads.box_head, model.roi_heads.box_predictor
    maps = [block[0] for block in model.backbone.fpn.layer_blocks]
    spreads = dict.fromkeys([*maps, head.conv[0][0], box_head.fc6, box_head.fc7], 1.0)
    spreads |= {head.cls_logits: 2.0, head.bbox_pred: 0.2, predictor.cls_score: 2.0, predictor.bbox_pred: 1.0}
    for layer, spread in spreads.items():
        _spread_outputs(layer, spread)
    model.eval()
    model(_to_torchvision(batch)[0])
    for hook in hooks:
        hook.remove()
    predictor.cls_score.bias[0] += 8.0  # most proposals are background


def take_statistics(norm: nn.Module, inputs: tuple[Tensor]) -> None:
    """Set mean and variance of a batch norm to those of its input; a forward pre-hook."""
    variance, mean = torch.var_mean(inputs[0], dim=(0, 2, 3))
    norm.running_mean, norm.running_var = mean, variance


def _spread_outputs(layer: nn.Conv2d | nn.Linear, spread: float) -> None:
    """At its next call, rescale a layer so that each output channel has mean 0 and standard deviation `spread`."""

    def rescale(layer: nn.Conv2d | nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        handle.remove()
        deviation, mean = torch.std_mean(output, dim=[axis for axis in range(output.dim()) if axis != 1])
        scale = spread / deviation
        # [C_out] -> [C_out, 1, 1, 1] or [C_out, 1]
        layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.dim() - 1)))
        assert layer.bias is not None
        layer.bias.sub_(mean).mul_(scale)
        return layer(*inputs)

    handle = layer.register_forward_hook(rescale)


def _flatten_levels(levels: list[Tensor], width: int) -> Tensor:
    # [B, A*width, H, W] per level -> [B*M, width]
    flat = [level.unflatten(1, (-1, width)).permute(0, 3, 4, 1, 2).flatten(1, 3) for level in levels]
    return torch.cat(flat, dim=1).flatten(0, 1)
