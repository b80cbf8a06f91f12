"""Commands that follow a training run."""

from __future__ import annotations

import shlex
from pathlib import Path

from fpn_det.data.config import DataConfig
from fpn_det.image_io import RGB
from fpn_det.schema import Node
from fpn_det.terminal import shown_path


def next_steps(run: Path, data: DataConfig, model: Node) -> list[str]:
    """Commands for the finished run in the folder `run`, to be pasted into a shell, in the order in which they are needed.

    Evaluation and report are of the test split if the data has one with annotations. What a detector without an RPN, without
    an ROI head or of other images than RGB of 8 bits cannot do is left out.
    """
    word = shlex.quote(f"run={shown_path(run)}")
    split = "split=test" if data.has_annotations("test") else ""
    rest = {"eval": split, "report": split, "predict": "source=<images>", "export": ""}
    if model.get("roi_head", "") is None:
        del rest["report"]
    if model.get("rpn", "") is None:
        del rest["predict"], rest["export"]
    if data.pixel_format != RGB:
        rest.pop("export", None)
    return [f"fpn-det {command} {word} {rest[command]}".rstrip() for command in rest]
