"""Look at what a model is trained on: python tools/show_data.py experiment=<name> [steps=4] [setting=value ...].

Draws the batches of the first steps exactly as the model gets them, after all transforms and padding. `dog P4 x3` is a dog
that the second stage pools from P4 and for which three anchors stand; these are drawn beside it, in the colors of their
levels. Leaves PNG files in `output`, and the same for TensorBoard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fpn_det.cli.launch import launch
from fpn_det.runs.log import RunLog, shown_path
from fpn_det.runs.meters import Pace
from fpn_det.runtime import Ranks, pick_device
from fpn_det.schema import Count, CountOrZero
from fpn_det.training.config import TrainConfig
from fpn_det.visualization.data_panels import draw_data


@dataclass(frozen=True, kw_only=True)
class ShowSettings(TrainConfig):
    """Those of a training run, and what to show of it."""

    first_step: CountOrZero = 0
    steps: Count = 2
    output: str = "data_shown"  # folder


def show_data(settings: ShowSettings, words: Sequence[str]) -> None:
    """Some sheets for each step."""
    train = settings.data.read_train_and_val(settings.seed).train
    device = pick_device(settings.device)
    model = settings.build_model(train.num_classes).to(device)
    loader = settings.train_loader(train, model.stride, Ranks(), device)
    with RunLog(Path(settings.output), Ranks()) as log:
        log.begin(Pace(0, settings.steps, loader.batch_size, 0))
        for step in range(settings.first_step, settings.first_step + settings.steps):
            sheets = [sheet for batch in loader.rebuild(step) for sheet in draw_data(model, batch, train.class_names)]
            for number, sheet in enumerate(sheets):
                file = log.folder / f"step_{step:06}_{number}.png"
                Image.fromarray(sheet).save(file)
                log.picture(step, f"data/{number}", sheet)
                log.info(f"written: {shown_path(file)}")


if __name__ == "__main__":
    launch(show_data, ShowSettings, "show_data")
