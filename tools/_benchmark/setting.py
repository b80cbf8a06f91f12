"""What a benchmark is made with, from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from _words import split_words
from fpn_det.composition import compose
from fpn_det.schema import Range, fit
from fpn_det.training.config import TrainConfig

Count = Annotated[int, Range(1)]
Part = Literal["train", "inference", "memory", "reads", "roi_align", "rpn_loss", "loader"]


@dataclass(frozen=True)
class Setting:
    """The same for both contestants."""

    only: tuple[Part, ...] = (
        "train",
        "inference",
        "memory",
        "reads",
        "roi_align",
        "rpn_loss",
        "loader",
    )  # what to measure
    device: str = "auto"  # auto, cpu, cuda, cuda:<number>, mps
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of convolutions and matrix products
    channels_last: bool | None = None  # memory format of both; null = each one's own choice
    compile: bool = False  # backbone and neck
    nms: Literal["auto", "torchvision", "batched"] = "auto"  # ours; a GPU takes batched
    batch_size: Count = 2
    size: tuple[Count, Count] = (480, 640)  # of the images, (h, w) px; multiples of 32
    data: str | None = None  # folder in COCO's layout that the loaders read; null = generated images
    num_workers: Annotated[int, Range(0)] = 1  # of the loaders
    repeats: Count = 5  # alternations; medians are reported
    threads: Count | None = None  # of torch; null = its own choice
    output: str = "benchmark.json"
    overrides: tuple[str, ...] = ()  # of the settings of r50_fpn, such as model.rpn.sampled_loss=false

    def compose(self, *overrides: str) -> TrainConfig:
        """The settings of our contestant: those of r50_fpn, with random weights trained as pretrained ones are."""
        filters = ("rpn.train_filter", "rpn.test_filter", "roi_head")
        return compose(
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


def parse(words: Sequence[str]) -> Setting:
    """The setting that `name=value` words ask for; a dotted name is one of r50_fpn's.

    Raises:
        ValueError: a name is unknown, or a value has another type.
    """
    overrides, given = split_words(words)
    if isinstance(given.get("only"), str):
        given["only"] = given["only"].split(",")
    # tuples as YAML knows them
    defaults = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(Setting()).items()}
    setting = fit(defaults | {"overrides": overrides} | given, Setting, "", ())
    setting.compose()  # refuses what r50_fpn has no place for
    return setting
