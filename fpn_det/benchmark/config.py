"""Options of the benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from fpn_det.composition import compose
from fpn_det.config import Precision
from fpn_det.image_io import RGB
from fpn_det.schema import Count, CountOrZero
from fpn_det.training.config import TrainConfig

Part = Literal[
    "train", "inference", "memory", "reads", "roi_align", "rpn_loss", "nms", "loader", "gpu_counts", "export"
]
ALL_PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True)
class BenchmarkConfig:
    """Options that hold for both detectors."""

    only: tuple[Part, ...] = ALL_PARTS  # what to measure
    device: str = "auto"  # auto, cpu, cuda, cuda:<number>, mps
    precision: Precision = "fp32"  # of convolutions and matrix products
    channels_last: bool | None = None  # memory format of both; null = the default of each
    compile: bool = False  # compile backbone and neck
    capture: bool = False  # replay fpn_det's training step as a CUDA graph, where there is a GPU
    nms: Literal["auto", "torchvision", "batched"] = "auto"  # of fpn_det; auto takes batched on a GPU
    batch_size: Count = 2  # images
    size: tuple[Count, Count] = (480, 640)  # of the images, (h, w) px; multiples of 32
    data: str | None = None  # folder in the layout of COCO that the loaders read; null = generated images
    num_workers: CountOrZero = 1  # of the loaders
    repeats: Count = 5  # alternations; medians are reported
    threads: Count | None = None  # of torch; null = its default
    output: str = "benchmark.json"  # file of the results
    overrides: tuple[str, ...] = ()  # settings of r50_fpn, such as model.rpn.head.sampled_loss=false

    def compose(self, *overrides: str) -> TrainConfig:
        """The settings of fpn_det's detector: those of r50_fpn with random weights, trained as pretrained ones are.

        Raises:
            ValueError: r50_fpn has no such setting, or the images are no RGB pictures.
        """
        filters = ("rpn.train_filter", "rpn.test_filter", "roi_head.test_filter")
        config = compose(
            [
                "experiment=r50_fpn",
                "model.backbone.weights=null",
                "model.backbone.norm=frozen",
                "model.backbone.frozen_stages=2",
                f"model.channels_last={'null' if self.channels_last is None else self.channels_last}",
                *[f"model.{part}.nms_method={self.nms}" for part in filters],
                *self.overrides,
                *overrides,
            ]
        )
        if config.data.pixel_format != RGB:
            raise ValueError(
                f"data.channels: expected RGB pictures, which torchvision's detector takes, got {config.data.pixel_format}."
            )
        return config
