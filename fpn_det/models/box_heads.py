"""Box heads: the layers between the pooled bins of a box and the predictor of the ROI head."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from fpn_det.models.layers import ConvBlock, Norm
from fpn_det.models.resnet import ResNet, load_state, pretrained_state
from fpn_det.schema import Count, Decay


class BoxHead(nn.Module):
    """Interface of box heads. A head is made from the pyramid's `channels` and the number of `bins` per side.

    Attributes:
        width: of the output.
        mixes_boxes: the output of a box depends on the other boxes, as with batch norm in training.
    """

    width: int
    mixes_boxes: bool = False

    def forward(self, pooled: Tensor) -> Tensor:
        """Bins [P, C, bins, bins] to features [P, width]."""
        raise NotImplementedError

    def load_pretrained(self) -> None:
        """Load pretrained weights, if the head has some."""


class TwoLayerHead(BoxHead):
    """Two hidden layers on the flattened bins.

    Args:
        channels: of the pyramid.
        bins: per side.
        width: of both layers, and of the output.
    """

    def __init__(self, channels: int, bins: int, width: Count = 1024) -> None:
        super().__init__()
        self.width = width
        self.fc1 = nn.Linear(channels * bins * bins, width)
        self.fc2 = nn.Linear(width, width)
        for layer in (self.fc1, self.fc2):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """[P, C, bins, bins] to [P, width]."""
        return self.fc2(self.fc1(pooled.flatten(1)).relu_()).relu_()


class ConvHead(BoxHead):
    """3x3 convolutions on the bins, then one hidden layer (Group Normalization, 4.2).

    Args:
        channels: of the pyramid.
        bins: per side.
        num_convs, conv_channels: number and width of the convolutions.
        width: of the hidden layer, and of the output.
        norm: after each convolution; None = none, and a bias.
    """

    def __init__(
        self,
        channels: int,
        bins: int,
        num_convs: Count = 4,
        conv_channels: Count = 256,
        width: Count = 1024,
        norm: Norm | None = "batch",
    ) -> None:
        super().__init__()
        if num_convs < 1:
            raise ValueError(f"box_head.num_convs: expected at least 1, got {num_convs}.")
        self.width = width
        self.mixes_boxes = norm in ("batch", "sync")
        widths = [channels] + [conv_channels] * num_convs
        self.convs = nn.Sequential(*(ConvBlock(*pair, 3, norm, relu=True) for pair in pairwise(widths)))
        self.fc1 = nn.Linear(conv_channels * bins * bins, width)
        for conv in (module for module in self.convs.modules() if isinstance(module, nn.Conv2d)):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        nn.init.kaiming_uniform_(self.fc1.weight, a=1)
        nn.init.zeros_(self.fc1.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """[P, C, bins, bins] to [P, width]."""
        return self.fc1(self.convs(pooled).flatten(1)).relu_()


class Conv5Head(BoxHead):
    """The ResNet's last stage on the bins of each box, then their mean: the head of a detector on C4.

    It has the weights of the backbone's last stage, which the backbone then does without (He et al. 2016; the baseline
    of the FPN paper's Tables 2 a and 3 a).

    Args:
        channels: of C4, unchanged.
        bins: per side; the stage has stride 2, so 14 become 7.
        depth, weights, norm, stride_in_1x1, norm_eps, stochastic_depth: see `ResNet`; here each box draws for itself.

    Raises:
        ValueError: the pyramid is not C4.
    """

    def __init__(
        self,
        channels: int,
        bins: int,
        depth: int = 50,
        weights: str | None = None,
        norm: Norm | None = None,
        stride_in_1x1: bool = False,
        norm_eps: float = 1e-5,
        stochastic_depth: Decay = 0.0,
    ) -> None:
        super().__init__()
        resnet = ResNet(depth, weights, norm, 0, stride_in_1x1, norm_eps, stochastic_depth=stochastic_depth)
        if channels != resnet.channels[2]:
            raise ValueError(
                f"roi_head.box_head: expected C4 unchanged, {resnet.channels[2]} channels, got {channels}. "
                f"Set neck=single_map model.neck.level=C4 model.neck.channels=null."
            )
        self.layer4: nn.Module = resnet.layer4
        self.width = resnet.channels[3]
        self.mixes_boxes = resnet.norm in ("batch", "sync")
        self.depth = depth
        self.weights = weights

    def forward(self, pooled: Tensor) -> Tensor:
        """[P, C, bins, bins] to [P, width]."""
        return self.layer4(pooled).mean(dim=(2, 3))

    def load_pretrained(self) -> None:
        """Load the weights that `weights` names; None leaves the random ones."""
        if self.weights is not None:
            state = pretrained_state(self.depth, self.weights)
            stage = {name.removeprefix("layer4."): value for name, value in state.items() if name.startswith("layer4.")}
            load_state(self.layer4, stage, self.depth, self.weights)
