"""Interface of backbones."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Backbone(nn.Module, ABC):
    """The bottom-up pathway: images to feature maps of growing stride.

    Building a backbone reads no file. A new run loads pretrained weights with `load_pretrained`; a resumed run does not.

    Attributes:
        channels: of each map, fine to coarse.
        strides: of each map, input px per cell.
        divisor: what the sides of a batch must divide by: a multiple of every stride.
        in_channels: of the images.
        pixel_mean, pixel_std: of the RGB pixels, on 0..255, where the settings do not say. The default is ImageNet's.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    in_channels: int = 3
    pixel_mean: tuple[float, ...] = (123.675, 116.28, 103.53)
    pixel_std: tuple[float, ...] = (58.395, 57.12, 57.375)

    @property
    def divisor(self) -> int:
        return max(self.strides)

    @abstractmethod
    def forward(self, x: Tensor) -> list[Tensor]:
        """Normalized images [B, C, H, W] to maps [B, C_k, H / stride_k, W / stride_k], fine to coarse."""

    def truncate(self, num_maps: int) -> None:
        """Remove what follows the first `num_maps` maps. The neck does not read it.

        Raises:
            ValueError: this backbone cannot leave out maps.
        """
        if num_maps != len(self.channels):
            raise ValueError(
                f"model.backbone: expected {type(self).__name__} to give {num_maps} maps, got {len(self.channels)}. "
                "Choose a neck that reads all maps, or implement Backbone.truncate."
            )

    def parameters_by_stage(self) -> list[list[nn.Parameter]]:
        """The parameters of each stage from the input on, for learning rates that decay with the depth.

        Raises:
            ValueError: this backbone does not tell.
        """
        raise ValueError(
            f"optimizer.layer_decay: expected 1 with {type(self).__name__}, which does not divide its parameters into stages. "
            "Implement Backbone.parameters_by_stage."
        )

    def expected_pixels(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation of the RGB pixels, on 0..255, that the pretrained weights expect."""
        return self.pixel_mean, self.pixel_std

    def check_pretrained(self) -> None:
        """Refuse pretrained weights that cannot be loaded, before data are read.

        Raises:
            ValueError: there are none under the name that is set.
        """

    def load_pretrained(self) -> None:
        """Load pretrained weights, if the settings name any.

        Raises:
            ValueError: they cannot be loaded.
        """
