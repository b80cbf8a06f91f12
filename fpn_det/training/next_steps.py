"""Commands that follow a training run."""

from __future__ import annotations

import shlex
from pathlib import Path

from fpn_det.data.config import DataConfig
from fpn_det.terminal import shown_path


def next_steps(run: Path, data: DataConfig) -> list[str]:
    """Commands for the finished run in the folder `run`, to be pasted into a shell, in the order in which they are needed.

    Evaluation and report are of the test split if the data has one with annotations.
    """
    word = shlex.quote(f"run={shown_path(run)}")
    split = "split=test" if data.has_annotations("test") else ""
    rest = {"eval": split, "report": split, "predict": "source=<images>", "export": ""}
    return [f"fpn-det {command} {word} {rest[command]}".rstrip() for command in rest]
