"""Settings of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class EvaluationConfig:
    """Metrics to compute, and the library that computes them. The defaults are COCO's."""

    # limits of detections per image; AP is computed at the last one
    max_dets: tuple[int, ...] = (1, 10, 100)
    # suffix of the metric names (APs, ARs) -> smallest and largest area of an object in px^2, original frame
    area_ranges: Mapping[str, tuple[float, float]] = field(
        default_factory=lambda: {"s": (0.0, 32.0**2), "m": (32.0**2, 96.0**2), "l": (96.0**2, 1e10)}
    )
    # detections: AP and AR per class; proposals: class-agnostic AR
    target: Literal["detections", "proposals"] = "detections"
    # IoU from which a detection is a hit wherever detections are counted: best F1, confusion matrix, error types
    match_iou: float = 0.5
    # library that matches boxes; both give equal numbers. auto: hotcoco (extra `fast-eval`) if installed
    engine: Literal["auto", "pycocotools", "hotcoco"] = "auto"

    def __post_init__(self) -> None:
        limits = list(self.max_dets)
        if not limits or limits[0] < 1 or limits != sorted(set(limits)):
            raise ValueError(
                f"evaluation.max_dets: expected growing numbers from 1, got {limits}. COCO's are [1, 10, 100]."
            )
        if not 0 < self.match_iou < 1:
            raise ValueError(f"evaluation.match_iou: expected a number between 0 and 1, got {self.match_iou}. Try 0.5.")
        for name, bounds in self.area_ranges.items():
            if len(bounds) != 2 or not 0 <= bounds[0] < bounds[1]:
                raise ValueError(
                    f"evaluation.area_ranges.{name}: expected [smallest, largest] in px^2, got {list(bounds)}."
                )
        names = self.metric_names
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(
                f"evaluation.area_ranges: expected names that give metrics of their own, got two of the name {twice[0]}. "
                "Name the ranges otherwise, such as tiny."
            )

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the metrics, in order. For proposals, ARs1000 is the recall of small objects with 1000 proposals per image."""
        if self.target == "proposals":
            return tuple(f"AR{name}{limit}" for name in ("", *self.area_ranges) for limit in self.max_dets)
        precision, recall = [f"AP{name}" for name in self.area_ranges], [f"AR{name}" for name in self.area_ranges]
        return ("AP", "AP50", "AP75", *precision, *(f"AR{limit}" for limit in self.max_dets), *recall)
