"""Settings of a detector and of its evaluation, as types.

A config states values, what they mean and which of them exclude each other, and builds the objects that they describe.
Values come from `composition` (YAML files and the command line) or from Python.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeGuard

import torch
import yaml  # type: ignore[import-untyped]

from fpn_det.data.bad_images import OnBadImage
from fpn_det.data.config import DataConfig, SplitName
from fpn_det.data.loaders import EvalLoader
from fpn_det.data.tiles import Tiling
from fpn_det.evaluation.config import EvaluationConfig
from fpn_det.image_io import RGB
from fpn_det.models.detector import Detector
from fpn_det.models.views import Views
from fpn_det.models.weights import limited_parameters
from fpn_det.runtime import Ranks, set_float32_precision
from fpn_det.schema import Count, CountOrZero, Node, Part, Positive, build
from fpn_det.structures import Annotations

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
# dtype of autocast; None computes in float32
PRECISIONS: dict[Precision, torch.dtype | None] = {
    "fp32": None,
    "tf32": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
# ends of the names of exported files, by format
EXPORTED = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}


@dataclass(frozen=True)
class TileConfig:
    """Tiles of large images on which a detector also detects. What it finds is merged with that of the whole image."""

    size: Count | Literal["auto"] | None = (
        "auto"  # side, px of the image; null = whole images only; auto = data.tile.size
    )
    overlap: Part | Literal["auto"] = (
        "auto"  # of two neighbours, at least; fraction of the side; auto = data.tile.overlap
    )


@dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    """A detector, the data it is for, and how it is evaluated."""

    model: Node  # class and arguments of the detector
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tile: TileConfig = field(default_factory=TileConfig)  # of evaluation and prediction
    seed: CountOrZero = 0  # of all random draws
    device: str = "auto"  # cpu, cuda, cuda:<number>, mps; auto = the best one available
    precision: Precision = "fp32"  # fp32 in full; tf32 for convolutions and matmuls of a GPU; bf16 and fp16 by autocast
    allow_targets: list[str] = field(
        default_factory=list
    )  # more packages whose classes a `_target_` may name; command line only

    def __post_init__(self) -> None:
        taken = (self.model.get("backbone") or {}).get("in_channels", 3)
        if taken != self.data.channels:
            raise ValueError(
                f"data.channels: expected {taken}, which model.backbone takes, got {self.data.channels}. "
                "A backbone of other channels has the argument in_channels, and is trained anew."
            )
        if self.model.get("roi_head", "") is None and self.evaluation.target == "detections":
            raise ValueError(
                "evaluation: expected proposals of a model without an ROI head, got detections. Set evaluation=proposals."
            )
        if self.model.get("rpn", "") is None and self.evaluation.target == "proposals":
            raise ValueError(
                "evaluation: expected detections of a model without an RPN, got proposals. Set evaluation=coco."
            )
        if (self.model.get("rpn", "") is None) != (self.data.proposals is not None):
            raise ValueError(
                "data.proposals: expected with model.rpn=null only, and then always. See experiment=fast_rcnn_r50_fpn."
            )

    @property
    def tiling(self) -> Tiling | None:
        """Tiles of evaluation and prediction; None for whole images only."""
        size = self.data.tile.size if self.tile.size == "auto" else self.tile.size
        overlap = self.data.tile.overlap if self.tile.overlap == "auto" else self.tile.overlap
        return None if size is None else Tiling(size, overlap)

    @property
    def needs_normalization(self) -> bool:
        """True if mean and deviation of the channels are to be measured: they are not set, and the images are not RGB of 8 bits."""
        return self.data.pixel_format != RGB and self.model.get("pixel_mean", "") is None

    def build_model(self, num_classes: int | None) -> Detector:
        """The detector with random weights; no file is read.

        Args:
            num_classes: foreground classes; None leaves the last layers to `Detector.reset_classifier`.
        """
        try:
            with limited_parameters():
                return build(self.model, "model")(num_classes=num_classes)
        except (RuntimeError, MemoryError, TypeError, OverflowError) as error:  # such as 10^12 channels
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise ValueError(
                f"model: expected settings of a detector, got ones that cannot be built: {reason}."
            ) from error

    def set_precision(self) -> None:
        """Choose the precision of float32 operators on CUDA; under autocast it concerns what stays in float32."""
        set_float32_precision(allow_tf32=self.precision != "fp32")

    def eval_loader(
        self,
        annotations: Annotations,
        stride: int,
        ranks: Ranks,
        device: torch.device,
        split: SplitName = "val",
        on_bad_image: OnBadImage | None = None,
        tiling: Tiling | None = None,
    ) -> EvalLoader:
        """This rank's images of a split.

        Args:
            stride: of the model, which the sides of a batch must divide by.
            on_bad_image: called for each image that cannot be used and is left out; None makes it an error.
            tiling: of each image; None for whole images only.
        """
        return self.data.eval_loader(
            annotations,
            seed=self.seed,
            stride=stride,
            ranks=ranks,
            device=device,
            on_bad_image=on_bad_image,
            split=split,
            tiling=tiling,
        )

    def single_images(
        self, annotations: Annotations, rows: Sequence[int], stride: int, device: torch.device
    ) -> EvalLoader:
        """The images of some rows as the model gets them, one by one; `Batch.indices` count within `rows`."""
        return self.data.single_images(annotations, rows, seed=self.seed, stride=stride, device=device)

    def to_yaml(self) -> str:
        """The complete settings as text, from which `composition.read_saved` makes them again."""
        return yaml.safe_dump(_plain(asdict(self)), sort_keys=False, allow_unicode=True)


@dataclass(frozen=True, kw_only=True)
class EvalConfig(DetectorConfig):
    """Evaluation of a trained detector. Model, data and preprocessing are those of its run."""

    run: str | None = None  # run folder, whose best checkpoint is evaluated; or
    checkpoint: str | None = None  # checkpoint file; for eval and predict also an exported file
    split: Literal["train", "val", "test"] = "val"
    weights: Literal["auto", "ema", "raw"] = "auto"  # auto = the moving average if the checkpoint has one
    tta: Views = field(default_factory=Views)  # test-time augmentation
    timeout_minutes: Positive = 30.0  # how long one rank waits for another


def is_exported(path: str | Path | None) -> TypeGuard[str | Path]:
    """True for the name of an exported file."""
    return path is not None and Path(path).suffix.lower() in EXPORTED.values()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
