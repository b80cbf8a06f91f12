"""Train a detector.

Everything about a run is in its folder, runs/<experiment>/<date>_<time>. `resume=auto` continues an interrupted run,
`run=<folder>` starts a new one with the settings of an earlier one, -m tries several values in turn. On several GPUs:
torchrun --nproc_per_node=8 -m fpn_det.cli.main train ...

Examples:
  fpn-det train experiment=small data=yolo data.root=datasets/my_data
  fpn-det train experiment=r50_fpn data.root=datasets/coco precision=bf16 trainer.batch_size=8
  fpn-det train experiment=demo run_dir=runs/demo resume=auto
"""

from __future__ import annotations

from pathlib import Path

from fpn_det import api
from fpn_det.cli.launch import argument, launch
from fpn_det.training.config import TrainConfig


def main() -> None:
    """Train with the settings of the command line."""
    if argument("run") is None:
        launch(api.train, TrainConfig, "train")
    else:
        launch(api.train, TrainConfig, "train_from_run", saved_settings)


def saved_settings() -> str:
    """The settings of the run that the command line names."""
    file = Path(argument("run") or "") / "config.yaml"
    if not file.is_file():
        raise ValueError(f"run: expected the folder of a run, got {file.parent}, which has no {file.name}.")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected settings as UTF-8 text, got other bytes ({error.reason}).") from None
