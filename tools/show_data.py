"""Look at what a model is trained on: python tools/show_data.py experiment=<name> [steps=4] [setting=value ...].

Draws the batches of the first steps exactly as the model gets them, after all transforms and padding. `dog P4 x3` is a dog
that the second stage pools from P4 and for which three anchors stand; these are drawn beside it, in the colors of their
levels. Leaves PNG files in `output`, and the same for TensorBoard.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fpn_det import api
from fpn_det.config import Settings, launch
from fpn_det.runs.log import RunLog, shown_path
from fpn_det.runs.meters import Pace
from fpn_det.runtime import Ranks, pick_device
from fpn_det.schema import Count, CountOrZero
from fpn_det.visualization.data_panels import draw_data


@dataclass(frozen=True)
class ShowSettings(Settings):
    """Those of a training run, and what to show of it."""

    first_step: CountOrZero
    steps: Count
    output: str  # folder


def show_data(settings: ShowSettings) -> None:
    """Some sheets for each step."""
    train, _ = api.read_training_data(settings.data, settings.seed)
    device = pick_device(settings.device)
    model = api.build_model(settings, train.num_classes).to(device)
    loader = api.build_train_loader(settings, train, model.stride, Ranks(), device)
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
