"""The description of an exported file within the file: JSON texts by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from fpn_det.schema import Count, fit

Precision = Literal["fp32", "fp16", "int8"]
OPSET = 19  # of ONNX, the first with deformable convolutions
READ = ("class_names", "category_ids", "config", "step", "dtype", "size", "precision", "score_thresholds")


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """The description of an exported file.

    Raises:
        ValueError: classes without names, or a number of category ids that is not theirs.
    """

    class_names: list[str]
    category_ids: list[int]
    config: str = ""  # settings of the run, as YAML
    step: int = 0  # of the training
    dtype: Literal["uint8", "float32"] = "uint8"  # of the images
    size: tuple[Count, Count] | None = None  # (H, W) px of all batches; None = any
    precision: Precision = "fp32"
    score_thresholds: dict[str, Any] | None = None  # see `ScoreThresholds`
    preprocessing: dict[str, Any] = field(default_factory=dict)  # the transforms of evaluation
    checkpoint: str = ""  # name of its file
    sha256: str = ""  # of that file
    versions: dict[str, Any] = field(default_factory=dict)
    opset: int = OPSET

    def __post_init__(self) -> None:
        if not 0 < len(self.class_names) == len(self.category_ids):
            raise ValueError(
                "metadata: expected as many class_names as category_ids, got "
                f"{len(self.class_names)} and {len(self.category_ids)}"
            )

    def texts(self) -> dict[str, str]:
        """JSON texts by name."""
        return {name: json.dumps(value) for name, value in asdict(self).items()}

    @classmethod
    def read(cls, texts: Mapping[str, str]) -> Metadata:
        """Read the texts of a file, except for those that are there for other software.

        Raises:
            ValueError: one is missing, or of another type.
        """
        if missing := [name for name in READ if name not in texts]:
            raise ValueError(f"metadata: expected {', '.join(missing)}, got none")
        return fit({name: json.loads(texts[name]) for name in READ}, cls, "metadata", packages=())
