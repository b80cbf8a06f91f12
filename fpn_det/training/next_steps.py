"""Commands that follow a training run."""

from __future__ import annotations

import shlex
from pathlib import Path

from fpn_det.data.config import DataConfig
from fpn_det.locations import PACKAGE
from fpn_det.terminal import shown_path

# Commands and the words that follow `run=<folder>`, in the order in which they are needed.
COMMANDS = {"eval": "", "predict": "source=<images>", "report": "", "export": ""}


def next_steps(run: Path, data: DataConfig) -> list[str]:
    """Commands for the finished run in the folder `run`, to be pasted into a shell.

    Evaluation is of the test split if the data has one with annotations.
    """
    word = shlex.quote(f"run={shown_path(run)}")
    rest = COMMANDS | {"eval": "split=test" if data.has_annotations("test") else ""}
    return [f"fpn-det {command} {word} {rest[command]}".rstrip() for command in COMMANDS if _exists(command)]


def _exists(command: str) -> bool:
    return (PACKAGE / "cli" / f"{command}.py").is_file()
