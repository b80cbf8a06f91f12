"""The ResNet's last stage as box head: He et al. (2016) on C4, the FPN paper's baseline (Tables 2 a and 3 a)."""

from __future__ import annotations

from torch import Tensor, nn

from fpn_det.models.backbone import ResNet, fill, pretrained_weights
from fpn_det.models.layers import Norm


class Conv5Head(nn.Module):
    """The stage that makes C5 of C4, on the bins of each box; then their mean.

    It starts from the same weights as the backbone, of which it is the end: that has to stop at C4.

    Args:
        channels: of the pyramid: those of C4, as it is.
        bins: per side; the stage has stride 2, so 14 become 7.
        depth, weights, norm, stride_in_1x1, norm_eps: see `ResNet`.

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
    ) -> None:
        super().__init__()
        resnet = ResNet(depth, weights, norm, 0, stride_in_1x1, norm_eps)
        if channels != resnet.channels[2]:
            raise ValueError(
                f"roi_head.box_head: expected C4 as it is, {resnet.channels[2]} channels, got {channels}. "
                f"Say neck=single_map model.neck.level=C4 model.neck.channels=null."
            )
        self.layer4 = resnet.layer4
        self.width = resnet.channels[3]
        self.mixes_boxes = resnet.norm in ("batch", "sync")
        self.depth = depth
        self.weights = weights

    def forward(self, pooled: Tensor) -> Tensor:
        """[P, C, bins, bins] to [P, width]."""
        return self.layer4(pooled).mean(dim=(2, 3))

    def load_pretrained(self) -> None:
        """Fill in the weights that `weights` names; nothing to do for None."""
        if self.weights is not None:
            state = pretrained_weights(self.depth, self.weights)
            stage = {name.removeprefix("layer4."): value for name, value in state.items() if name.startswith("layer4.")}
            fill(self.layer4, stage, self.depth, self.weights)
