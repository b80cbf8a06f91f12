"""Faster R-CNN with a Feature Pyramid Network, or one of its two stages alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from fpn_det.models.backbone import Backbone
from fpn_det.models.necks.base import Neck
from fpn_det.models.necks.fpn import FPN
from fpn_det.models.roi_align import LevelAssigner
from fpn_det.models.roi_head import ROIHead
from fpn_det.models.rpn import RPN
from fpn_det.models.views import Views
from fpn_det.schema import Positive
from fpn_det.structures import Batch, Candidates, Detections, Losses, Proposals, Pyramid


@dataclass(frozen=True)
class ImagePyramid:
    """Scales of the input at which a detector runs (FPN, Figure 1 a); [1.0] is the input itself."""

    train: tuple[Positive, ...] = (1.0,)  # losses are means over these scales
    test: tuple[Positive, ...] = (1.0,)  # candidates of all these scales are merged


class Detector(nn.Module):
    """Maps images to losses (`forward`) or to detections (`detect`), independent of the training mode.

    Args:
        num_classes: K, foreground only; None leaves the last layers to `reset_classifier`.
        backbone: makes the feature maps.
        neck, rpn, roi_head: factories, called with the attributes that the preceding part declares. Without an ROI head (None) the RPN alone is
            trained, and its proposals are the detections, all of label 0. Without an RPN the ROI head is trained on the
            proposals of the batch (Fast R-CNN).
        pixel_mean, pixel_std: by channel, in `channel_order`, in units of the pixels; None = those of the backbone for three
            channels, else measured on the training images (`set_normalization`).
        channel_order: of the backbone's weights, `rgb` or `bgr`; batches of three channels are always RGB.
        channels_last: memory format of the maps; None = channels last for detection on the CPU, where training was
            measured to be slower with it, and for half precision on a GPU.
        image_pyramid: scales of the input.

    Attributes:
        stride: what the sides of a batch must divide by.
        assigner: gives the level of a box by its size.
    """

    def __init__(
        self,
        num_classes: int | None,
        backbone: Backbone,
        neck: Callable[..., Neck] = FPN,
        rpn: Callable[..., RPN] | None = RPN,
        roi_head: Callable[..., ROIHead] | None = ROIHead,
        pixel_mean: tuple[float, ...] | None = None,
        pixel_std: tuple[Positive, ...] | None = None,
        channel_order: Literal["rgb", "bgr"] = "rgb",
        channels_last: bool | None = None,
        image_pyramid: ImagePyramid = ImagePyramid(),
    ) -> None:
        super().__init__()
        if channel_order not in ("rgb", "bgr"):
            raise ValueError(f"model.channel_order: expected rgb or bgr, got '{channel_order}'.")
        if rpn is None and roi_head is None:
            raise ValueError("model: expected an RPN, an ROI head or both, got neither.")
        self.backbone = backbone
        self.neck = neck(in_channels=backbone.channels, in_strides=backbone.strides)
        backbone.truncate(self.neck.num_inputs or len(backbone.channels))
        self.stride = backbone.divisor
        self.rpn = None if rpn is None else rpn(channels=self.neck.channels, strides=self.neck.strides)
        self.roi_head = (
            None if roi_head is None else roi_head(channels=self.neck.channels, strides=self.neck.roi_strides)
        )
        self.assigner = self.roi_head.pooler.assigner if self.roi_head else LevelAssigner(self.neck.roi_strides)
        self.num_classes = num_classes
        self.flips_channels = channel_order == "bgr"
        self.views = Views(tuple(image_pyramid.test))
        self.train_views = Views(tuple(image_pyramid.train))
        self.channels_last = channels_last
        if self.flips_channels and backbone.in_channels != 3:
            raise ValueError(f"model.channel_order: expected rgb for {backbone.in_channels} channels, got bgr.")
        self.register_buffer("pixel_mean", None, persistent=False)
        self.register_buffer("pixel_std", None, persistent=False)
        self.pixel_mean: Tensor | None
        self.pixel_std: Tensor | None
        if backbone.in_channels == 3:
            order = -1 if self.flips_channels else 1
            pixel_mean = backbone.pixel_mean[::order] if pixel_mean is None else pixel_mean
            pixel_std = backbone.pixel_std[::order] if pixel_std is None else pixel_std
        if (pixel_mean is None) != (pixel_std is None):
            raise ValueError("model.pixel_mean: expected with model.pixel_std, got one of them.")
        if pixel_mean is not None and pixel_std is not None:
            self.set_normalization(pixel_mean, pixel_std)
        if num_classes is not None:
            self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Make new last layers with random weights for `num_classes` foreground classes."""
        if num_classes < 1:
            raise ValueError(f"Detector: expected at least one class, got num_classes={num_classes}.")
        self.num_classes = num_classes
        if self.roi_head is not None:
            self.roi_head.reset_classifier(num_classes)
        if self.channels_last:
            self.to(memory_format=torch.channels_last)

    def set_normalization(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Set mean and standard deviation of the channels.

        Raises:
            ValueError: their number is not that of the channels.
        """
        for name, values in (("pixel_mean", mean), ("pixel_std", std)):
            if len(values) != self.backbone.in_channels:
                raise ValueError(
                    f"model.{name}: expected {self.backbone.in_channels} values, one for each channel, got {len(values)}."
                )
            setattr(self, name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, batch: Batch, step: int | Tensor) -> Losses:
        """Compute all losses at an optimizer step, which determines the anchors and boxes that are sampled.

        Args:
            step: a number, or an i64 scalar on the device, with which a compiled graph serves all steps.
        """
        return Losses.mean([self._losses(view, step) for view, _ in self.train_views.of(batch, self.stride)])

    def _losses(self, batch: Batch, step: int | Tensor) -> Losses:
        pyramid, losses = self.pyramid(batch), Losses()
        if self.rpn:
            output = self.rpn(pyramid)
            losses = self.rpn.losses(output, pyramid, batch, step)
        if self.roi_head:
            proposals = self.rpn.propose(output, batch, self.rpn.train_filter) if self.rpn else _given(batch)
            losses = losses | self.roi_head.losses(pyramid, proposals, batch, step)
        return losses

    @torch.no_grad()
    def detect(self, batch: Batch, views: Views | None = None) -> Detections:
        """Detections in the input frame; with test-time augmentation, those of all its `views`."""
        return self.select(self.candidates(batch, views), batch)

    @torch.no_grad()
    def candidates(self, batch: Batch, views: Views | None = None) -> Candidates:
        """Scores and boxes before the final selection, with those of all test-time `views`."""
        return self.raw(batch) if views is None else views.merge(self.raw, batch, self.stride)

    def select(self, candidates: Candidates, batch: Batch) -> Detections:
        """The detections among the candidates of a batch."""
        if self.roi_head:
            return self.roi_head.select(candidates, batch)
        assert self.rpn is not None
        return self.rpn.select(candidates)

    @torch.no_grad()
    def raw(self, batch: Batch) -> Candidates:
        """Scores and boxes of every proposal before the final selection, for merging and analysis."""
        return self.views.merge(self._raw, batch, self.stride)

    def _raw(self, batch: Batch) -> Candidates:
        pyramid = self.pyramid(batch)
        proposals = self._proposals(pyramid, batch)
        found = self.roi_head.raw(pyramid, proposals, batch) if self.roi_head else proposals.as_candidates()
        if self.rpn is None or proposals.anchor_idxs is None:
            return found
        return replace(found, anchor_levels=self.rpn.levels_of(proposals.anchor_idxs, pyramid))

    @torch.no_grad()
    def propose(self, batch: Batch) -> Proposals:
        """Proposals of the RPN, selected by its test filter; without an RPN those of the batch."""
        return self._proposals(self.pyramid(batch), batch)

    def _proposals(self, pyramid: Pyramid, batch: Batch) -> Proposals:
        return self.rpn.propose(self.rpn(pyramid), batch, self.rpn.test_filter) if self.rpn else _given(batch)

    def pyramid(self, batch: Batch) -> Pyramid:
        """Normalize, set the padding to zero, and run backbone and neck."""
        levels = self.neck(self.backbone(self.normalize(batch)))
        return Pyramid(levels, self.neck.strides, batch.sizes, self.stride)

    def normalize(self, batch: Batch) -> Tensor:
        """Normalize pixels [B, C, H, W] to mean 0 and deviation 1, and set the padding of each image to 0."""
        if self.pixel_mean is None or self.pixel_std is None:
            raise ValueError(
                f"model.pixel_mean: expected mean and deviation of {self.backbone.in_channels} channels, got none. Set "
                "model.pixel_mean and model.pixel_std, or let a training measure them."
            )
        channels, height, width = batch.pixels.shape[1:]
        if channels != self.backbone.in_channels:
            raise ValueError(
                f"expected images of {self.backbone.in_channels} channels, got {channels}. Set data.channels."
            )
        assert height % self.stride == 0 and width % self.stride == 0, "the canvas must divide by the stride"
        pixels = batch.pixels
        if self.flips_channels:
            pixels = torch.cat(pixels.split(1, dim=1)[::-1], dim=1)  # torch 2.10 has no `flip` of 16 bits
        channels_last = self.channels_last
        if channels_last is None:
            device = pixels.device.type
            is_half_on_gpu = device == "cuda" and torch.is_autocast_enabled(device)
            channels_last = is_half_on_gpu or (device == "cpu" and not torch.is_grad_enabled())
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        pixels = pixels.to(torch.float32, memory_format=memory_format)
        pixels = (pixels - self.pixel_mean) / self.pixel_std
        y = torch.arange(height, device=pixels.device)[:, None] < batch.sizes[:, 0, None, None]  # [B, H, 1]
        x = torch.arange(width, device=pixels.device) < batch.sizes[:, 1, None, None]  # [B, 1, W]
        return torch.where((y & x)[:, None], pixels, 0.0)

    @property
    def max_detections(self) -> int:
        """D, per image."""
        if self.roi_head:
            return self.roi_head.test_filter.max_detections
        assert self.rpn is not None
        return self.rpn.test_filter.post_nms

    @property
    def score_threshold(self) -> float:
        """Score that a candidate must exceed to be selected."""
        return self.roi_head.test_filter.score_threshold if self.roi_head else 0.0

    @property
    def has_unused_parameters(self) -> bool:
        """True if parameters may get no gradient: without an RPN, those of levels that no box is pooled from."""
        return self.rpn is None and len(self.neck.strides) > len(self.neck.roi_strides)

    def without_roi_head(self) -> Detector:
        """Copy of the detector, sharing its weights, whose detections are its proposals."""
        proposer = copy.copy(self)
        proposer._modules = {**self._modules, "roi_head": None}
        return proposer

    def check_accumulation(self, accumulate: int) -> None:
        """Refuse losses that are divided by the number of samples, if a batch is divided into `accumulate` parts."""
        for name in ("rpn", "roi_head"):
            stage = getattr(self, name)
            if accumulate > 1 and stage is not None and stage.divides_by_num_sampled:
                raise ValueError(
                    f"model.{name}: expected losses divided by a constant with trainer.accumulate={accumulate}, got "
                    f"{type(stage).__name__}, which divides by the number of samples of each part. "
                    "Set trainer.accumulate=1."
                )

    def check_pretrained(self) -> None:
        """Refuse pretrained weights that cannot be loaded, before anything is read.

        Raises:
            ValueError: there are none, or they expect pixels of another mean and deviation, which the settings leave open.
                They have to be in the settings, so that a run means the same where the source of its weights is not known.
        """
        self.backbone.check_pretrained()
        if self.pixel_mean is None or self.pixel_std is None or self.backbone.in_channels != 3:
            return
        order = -1 if self.flips_channels else 1
        used = torch.stack([self.pixel_mean, self.pixel_std]).flatten(1)  # [2, 3]
        default, expected = (
            torch.tensor([values[::order] for values in pair])
            for pair in ((self.backbone.pixel_mean, self.backbone.pixel_std), self.backbone.expected_pixels())
        )
        if torch.equal(used, default) and not torch.allclose(expected, default):
            mean, std = (",".join(f"{value:g}" for value in row) for row in expected.tolist())
            raise ValueError(
                "model.pixel_mean: expected what the backbone's weights expect, got ImageNet's. Set "
                f"model.pixel_mean=[{mean}] model.pixel_std=[{std}]."
            )

    def load_pretrained(self) -> None:
        """Load the pretrained weights that the settings of backbone and box head name."""
        self.backbone.load_pretrained()
        if self.roi_head is not None:
            self.roi_head.load_pretrained()


def _given(batch: Batch) -> Proposals:
    if batch.proposals is None:
        raise ValueError(
            "model.rpn: expected proposals in the batch for a model without an RPN, got none. Set data.proposals."
        )
    return batch.proposals
