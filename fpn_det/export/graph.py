"""The detector as one graph of standard operators, from the pixels of a batch to its detections.

The graph runs the detector's own parts. Two of them have another form here: RoIAlign is called level by level, because
runtimes have it as an operator, and suppression is one operator that each format replaces by its own.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fpn_det.models.detector import Detector
from fpn_det.structures import Batch, Targets

INPUTS = ("images", "sizes")
OUTPUTS = ("boxes", "scores", "labels", "valid", "count")
LEAST_SIDE, MOST_SIDE = 97, 8192  # px of a canvas while the graph is traced; smaller ones are padded
MOST_IMAGES = 1024
EXAMPLE = (3, 229, 325)  # images and sides while the graph is traced; any values that are not special


class Graph(nn.Module):
    """A detector whose input is a batch as images are decoded.

    Args:
        detector: copied; test-time augmentation is off.
        half: compute backbone, neck and heads in float16; boxes and scores stay in float32.
    """

    def __init__(self, detector: Detector, half: bool = False) -> None:
        super().__init__()
        self.detector = copy.deepcopy(detector).cpu().eval()
        self.detector.channels_last = False  # a matter of the runtime
        self.stride = detector.stride
        # maps of other strides in memory, as ConvNeXt's, would be compared by them, which restricts the sides of the canvas
        self.detector.backbone.register_forward_hook(lambda module, inputs, maps: [item.contiguous() for item in maps])
        head = self.detector.roi_head
        if head is not None:
            head.pooler.method = "torchvision"
        if half:
            self._halve()

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Detect objects.

        Args:
            images: u8 [B, H, W, 3] RGB, padded at the right and bottom to a common size; or f32 where the
                preprocessing of the detector gives that.
            sizes: i64 [B, 2], the (h, w) of each image before padding.

        Returns:
            Boxes f32 [B, D, 4] xyxy in px of the images, by descending score; scores f32 [B, D]; labels i64 [B, D];
            valid bool [B, D]; count i64 [B], the number of valid ones, which are the first.
        """
        height, width = images.shape[1:3]
        pixels = images.permute(0, 3, 1, 2).contiguous()  # [B, H, W, 3] -> [B, 3, H, W]
        # symbolic shapes simplify a multiple of the stride but not a remainder, and the trace takes a third of the time
        bottom, right = ((side + self.stride - 1) // self.stride * self.stride - side for side in (height, width))
        pixels = F.pad(pixels, (0, right, 0, bottom))
        found = self.detector.detect(Batch(pixels, sizes, sizes, _no_targets(sizes), sizes[:, 0]))
        return found.boxes, found.scores, found.labels, found.valid, found.valid.sum(dim=1)

    def _halve(self) -> None:
        detector = self.detector
        halved: list[nn.Module] = [detector.backbone, detector.neck]
        if detector.rpn is not None:
            halved.append(detector.rpn.head)
        if detector.roi_head is not None:
            halved.append(detector.roi_head.box_head)
            detector.roi_head.predictor.register_forward_pre_hook(_cast_to(torch.float32))
        for part in halved:
            part.half().register_forward_pre_hook(_cast_to(torch.float16))

    @torch.no_grad()
    def trace(self, size: tuple[int, int] | None, dtype: torch.dtype) -> ExportedProgram:
        """Trace the graph for any batch size.

        Args:
            size: (H, W) of all batches; None = any.
            dtype: of the images.

        Raises:
            ValueError: a part of the detector cannot be traced.
        """
        count, height, width = EXAMPLE[0], *(size or EXAMPLE[1:])
        images = torch.zeros(count, height, width, 3, dtype=dtype)
        sizes = torch.tensor([[height, width]]).repeat(count, 1)
        batch = Dim("batch", min=1, max=MOST_IMAGES)
        sides = {} if size else {
            1: Dim("height", min=LEAST_SIDE, max=MOST_SIDE),
            2: Dim("width", min=LEAST_SIDE, max=MOST_SIDE),
        }  # fmt: skip
        try:
            program = torch.export.export(
                self, (images, sizes), dynamic_shapes=({0: batch, **sides}, {0: batch}), strict=False
            )
        except Exception as error:  # of any kind: the tracer's errors have no common class
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise ValueError(
                f"export: expected a detector of which every part has fixed shapes, got one that cannot be traced "
                f"({reason}). Parts of your own must avoid values that are read on the host, such as len() and .item()."
                + ("" if size else " With one size of all batches, size=[H,W], more models can be traced.")
            ) from error
        for node in program.graph.nodes:  # files would contain the paths of this machine
            node.meta.pop("stack_trace", None)
        return program


def canvas_of(size: tuple[int, int] | None, height: int, width: int) -> tuple[int, int]:
    """(H, W) to which images of a height and width are padded before a graph of `size` gets them."""
    return size or (max(height, LEAST_SIDE), max(width, LEAST_SIDE))


def on_canvas(images: Tensor, sizes: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Images [B, H, W, 3] on the canvas of a graph of `size`: padded at the right and bottom, or with less padding than they have.

    Args:
        sizes: i64 [B, 2], the (h, w) of each image before padding.

    Raises:
        ValueError: an image is larger than the canvas.
    """
    height, width = canvas_of(size, images.shape[1], images.shape[2])
    largest = tuple(sizes.amax(dim=0).tolist())
    if largest[0] > height or largest[1] > width:
        raise ValueError(
            f"expected images of at most {height} x {width} px (h x w), got {largest[0]} x {largest[1]}. "
            "Export with a larger size, or with size=batch."
        )
    return F.pad(images, (0, 0, 0, width - images.shape[2], 0, height - images.shape[1])).contiguous()


def _no_targets(sizes: Tensor) -> Targets:
    return Targets(sizes.new_zeros(1, 1, 4).float(), sizes.new_zeros(1, 1), sizes.new_zeros(1, 1).bool())


def _cast_to(dtype: torch.dtype) -> Any:
    def cast(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        return [cast(item) for item in value] if isinstance(value, list | tuple) else value

    return lambda module, inputs: tuple(cast(value) for value in inputs)
