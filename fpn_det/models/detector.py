"""Faster R-CNN on a Feature Pyramid Network, assembled; or one of its two stages alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fpn_det.models.backbone import ResNet
from fpn_det.models.conv5_head import Conv5Head
from fpn_det.models.layers import set_foldable
from fpn_det.models.necks.fpn import FPN, Neck
from fpn_det.models.roi_align import LevelAssigner
from fpn_det.models.roi_head import ROIHead
from fpn_det.models.rpn import RPN
from fpn_det.models.views import Views
from fpn_det.schema import Positive
from fpn_det.structures import Batch, Candidates, Detections, Losses, Proposals, Pyramid


class Detector(nn.Module):
    """From pixels to losses (`forward`) or to detections (`detect`); never one or the other by mode.

    Args:
        num_classes: K, foreground only.
        backbone: gives maps, and declares their channels and strides.
        neck, rpn, roi_head: make the parts, from what the part before declares. Without an ROI head (None) the RPN alone is
            trained, and its proposals are the detections, all of label 0. Without an RPN the ROI head is (Fast R-CNN), on the
            proposals that come with the batch.
        pixel_mean, pixel_std: of the three channels, in the order that `channel_order` names; on 0..255.
        pixel_divisor: by which pixels are divided before that; with 255, mean and deviation are those of 0..1.
        channel_order: what the backbone's weights expect, `rgb` or `bgr`; batches are always RGB.
        fold_norms: let convolutions take in norms that are fixed. Faster, and equal but for rounding; the peers do not.
        channels_last: memory format of all maps; None = channels last where a CPU records no gradient: on the CPUs it
            was measured on, that makes detection faster and training slower.
        image_scales: of a featurized image pyramid: what is found at every scale of the input frame is merged.
        train_image_scales: the losses are means over these scales.

    Attributes:
        stride: what the sides of a canvas must divide by.
        assigner: says which level has the size of a box.
    """

    def __init__(
        self,
        num_classes: int | None,
        backbone: ResNet,
        neck: Callable[..., Neck] = FPN,
        rpn: Callable[..., RPN] | None = RPN,
        roi_head: Callable[..., ROIHead] | None = ROIHead,
        pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53),
        pixel_std: tuple[Positive, Positive, Positive] = (58.395, 57.12, 57.375),
        pixel_divisor: Positive = 1.0,
        channel_order: str = "rgb",
        fold_norms: bool = True,
        channels_last: bool | None = None,
        image_scales: Sequence[float] = (1.0,),
        train_image_scales: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__()
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"Detector: expected at least one class, got num_classes={num_classes}.")
        if channel_order not in ("rgb", "bgr"):
            raise ValueError(f"model.channel_order: expected rgb or bgr, got '{channel_order}'.")
        if rpn is None and roi_head is None:
            raise ValueError("model: expected an RPN, an ROI head or both, got neither.")
        self.num_classes = num_classes
        self.backbone = backbone
        self.neck = neck(in_channels=backbone.channels, in_strides=backbone.strides)
        backbone.end_after(self.neck.num_inputs or len(backbone.channels))
        self.stride = max(backbone.strides)
        self.rpn = rpn and rpn(channels=self.neck.channels, strides=self.neck.strides, canvas_stride=self.stride)
        self.roi_head = roi_head and roi_head(
            channels=self.neck.channels, strides=self.neck.roi_strides, num_classes=num_classes
        )
        self.assigner = self.roi_head.pooler.assigner if self.roi_head else LevelAssigner(self.neck.roi_strides)
        self.pixel_divisor = pixel_divisor
        self.flips_channels = channel_order == "bgr"
        set_foldable(self, fold_norms)
        self.views = Views(tuple(image_scales))
        self.train_views = Views(tuple(train_image_scales))
        self.channels_last = channels_last
        if channels_last:
            self.to(memory_format=torch.channels_last)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(3, 1, 1), persistent=False)
        self.pixel_mean: Tensor
        self.pixel_std: Tensor

    def forward(self, batch: Batch, step: int) -> Losses:
        """All losses at this optimizer step; the step decides which anchors and boxes are sampled."""
        return Losses.mean([self._losses(view, step) for view, _ in self.train_views.of(batch, self.stride)])

    def _losses(self, batch: Batch, step: int) -> Losses:
        pyramid, losses = self.pyramid(batch), Losses()
        if self.rpn:
            output = self.rpn(pyramid)
            losses = self.rpn.losses(output, pyramid, batch, step)
        if self.roi_head:
            proposals = self.rpn.propose(output, batch, self.rpn.train_filter) if self.rpn else _given(batch)
            losses |= self.roi_head.losses(pyramid, proposals, batch, step)
        return losses

    @torch.no_grad()
    def detect(self, batch: Batch, views: Views | None = None) -> Detections:
        """Detections in the input frame; with test-time augmentation, those of all its `views`."""
        candidates = self.raw(batch) if views is None else views.merge(self.raw, batch, self.stride)
        if self.roi_head:
            return self.roi_head.select(candidates, batch)
        assert self.rpn is not None
        return self.rpn.select(candidates)

    @torch.no_grad()
    def raw(self, batch: Batch) -> Candidates:
        """Every proposal's scores and boxes, before the final selection: for export, merging and analysis."""
        return self.views.merge(self._raw, batch, self.stride)

    def _raw(self, batch: Batch) -> Candidates:
        pyramid = self.pyramid(batch)
        proposals = self._proposals(pyramid, batch)
        return self.roi_head.raw(pyramid, proposals, batch) if self.roi_head else proposals.as_candidates()

    @torch.no_grad()
    def propose(self, batch: Batch) -> Proposals:
        """The RPN's answer alone, with its test filter; without an RPN, what comes with the batch."""
        return self._proposals(self.pyramid(batch), batch)

    def _proposals(self, pyramid: Pyramid, batch: Batch) -> Proposals:
        return self.rpn.propose(self.rpn(pyramid), batch, self.rpn.test_filter) if self.rpn else _given(batch)

    def pyramid(self, batch: Batch) -> Pyramid:
        """Normalise, blank the padding, and run backbone and neck."""
        levels = self.neck(self.backbone(self.normalize(batch)))
        return Pyramid(levels, self.neck.strides, batch.sizes)

    def normalize(self, batch: Batch) -> Tensor:
        """Pixels [B, 3, H, W] with mean 0 and deviation 1; 0 outside each image, whatever bytes lie there."""
        height, width = batch.pixels.shape[2:]
        assert height % self.stride == 0 and width % self.stride == 0, "the canvas must divide by the stride"
        pixels = batch.pixels.flip(1) if self.flips_channels else batch.pixels
        channels_last = self.channels_last
        if channels_last is None:
            channels_last = pixels.device.type == "cpu" and not torch.is_grad_enabled()
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        pixels = pixels.to(torch.float32, memory_format=memory_format)
        pixels = pixels if self.pixel_divisor == 1 else pixels / self.pixel_divisor
        pixels = (pixels - self.pixel_mean) / self.pixel_std
        y = torch.arange(height, device=pixels.device)[:, None] < batch.sizes[:, 0, None, None]  # [B, H, 1]
        x = torch.arange(width, device=pixels.device) < batch.sizes[:, 1, None, None]  # [B, 1, W]
        return torch.where((y & x)[:, None], pixels, 0.0)

    @property
    def max_detections(self) -> int:
        """D, per image."""
        if self.roi_head:
            return self.roi_head.max_detections
        assert self.rpn is not None
        return self.rpn.test_filter.post_nms

    def without_roi_head(self) -> Detector:
        """The same detector, with the same weights, whose detections are its proposals."""
        proposer = copy.copy(self)
        proposer._modules = {**self._modules, "roi_head": None}
        return proposer

    def reset_classifier(self, num_classes: int) -> None:
        """Give the last layers of the ROI head new random weights for `num_classes` foreground classes."""
        self.num_classes = num_classes
        if self.roi_head is not None:
            self.roi_head.reset_classifier(num_classes)

    def check_accumulation(self, accumulate: int) -> None:
        """Refuse losses that depend on how a batch is divided, if it is."""
        for name in ("rpn", "roi_head"):
            normalizer = getattr(getattr(self, name), "normalizer", "constant")
            if accumulate > 1 and normalizer != "constant":
                raise ValueError(
                    f"model.{name}.normalizer: expected constant with trainer.accumulate={accumulate}, got {normalizer}, "
                    f"whose gradients would not be those of the whole batch. Set trainer.accumulate=1."
                )

    def check_pretrained(self) -> None:
        """Refuse pretrained weights that cannot be had, before anything is read."""
        self.backbone.check_pretrained()

    def load_pretrained(self) -> None:
        """Fetch or read the pretrained weights of the backbone, and of a box head that has some, if the settings name any."""
        self.backbone.load_pretrained()
        if self.roi_head and isinstance(self.roi_head.box_head, Conv5Head):
            self.roi_head.box_head.load_pretrained()


def _given(batch: Batch) -> Proposals:
    if batch.proposals is None:
        raise ValueError(
            "model.rpn: expected proposals in the batch for a model without an RPN, got none. Set data.proposals."
        )
    return batch.proposals
