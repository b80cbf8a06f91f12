"""Train a detector.

Everything about a run is in its folder, runs/<experiment>/<date>_<time>. `resume=<run>` continues an interrupted run
with its settings, `resume=auto` the newest one. `run=<folder>` starts a new one with the settings of an earlier one, -m
tries several values in turn. On several GPUs:
torchrun --nproc_per_node=8 -m fpn_det.cli.main train ...

Examples:
  fpn-det train experiment=small data=yolo data.root=datasets/my_data
  fpn-det train experiment=r50_fpn precision=bf16 trainer.batch_size=8
  fpn-det train resume=runs/demo
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from fpn_det import api
from fpn_det.cli.launch import argument, end_with, launch
from fpn_det.composition import is_selection, literal
from fpn_det.locations import CONFIGS
from fpn_det.runs.folder import newest_to_resume
from fpn_det.runs.settings_diff import setting_of
from fpn_det.training.config import TrainConfig


def main() -> None:
    """Train with the settings of the command line."""
    try:
        run, resumed = argument("run"), resumed_run()
    except ValueError as error:
        end_with(error)
    if run is not None:
        launch(api.train, TrainConfig, "train_from_run", partial(settings_of, Path(run)))
    elif resumed is not None:
        sys.argv = [literal("resume", str(resumed)) if word == "resume=auto" else word for word in sys.argv]
        launch(api.train, TrainConfig, "train_from_run", partial(settings_of, resumed))
    else:
        launch(api.train, TrainConfig, "train")


def resumed_run() -> Path | None:
    """The run folder whose settings `resume` takes; None if the command line states them itself.

    Words that select files, such as `experiment=demo`, state the settings of the run anew.
    """
    resume, run_dir = argument("resume"), argument("run_dir")
    if resume in (None, "null") or any(is_selection(setting_of(word), [CONFIGS]) for word in sys.argv[1:]):
        return None
    if resume == "auto":
        folder = Path(run_dir) if run_dir else newest_to_resume(Path("runs"))
    else:
        folder = Path(str(resume))
        folder = folder if folder.is_dir() else folder.parent.parent
    return folder if folder is not None and (folder / "config.yaml").is_file() else None


def settings_of(run: Path) -> str:
    """The settings of a run folder."""
    file = run / "config.yaml"
    if not file.is_file():
        raise ValueError(f"run: expected the folder of a run, got {file.parent}, which has no {file.name}.")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected settings as UTF-8 text, got other bytes ({error.reason}).") from None
