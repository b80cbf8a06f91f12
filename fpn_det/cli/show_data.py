"""Draw the batches that a model is trained on.

Draws the batches of the first steps exactly as the model gets them, after all transforms and padding. The label
`dog P4 x3` is a dog whose RoI is pooled from P4 and that is assigned to three anchors; these are drawn beside the image
in the colors of their levels, which the title names. Writes PNG files to the folder `output`, and the same for TensorBoard.

Examples:
  fpn-det show-data experiment=small data=yolo data.root=datasets/my_data
  fpn-det show-data experiment=demo steps=4 trainer.batch_size=8
  fpn-det show-data experiment=demo first_step=100 output=shown
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fpn_det.cli.launch import launch
from fpn_det.runs.log import RunLog
from fpn_det.runs.meters import Pace
from fpn_det.runtime import Ranks, pick_device
from fpn_det.schema import Count, CountOrZero
from fpn_det.terminal import shown_path
from fpn_det.training.config import TrainConfig
from fpn_det.visualization.data_panels import draw_anchors_and_objects


@dataclass(frozen=True, kw_only=True)
class ShowDataConfig(TrainConfig):
    """Settings of the training, and which of its steps to draw."""

    first_step: CountOrZero = 0  # to draw
    steps: Count = 2  # number of steps to draw
    output: str = "data_shown"  # folder of the images


def main() -> None:
    """Draw the batches of the settings on the command line."""
    launch(show_data, ShowDataConfig, "show_data")


def show_data(config: ShowDataConfig, words: Sequence[str]) -> None:
    """Write the images of each step."""
    train = config.data.read_train_and_val(config.seed).train
    device = pick_device(config.device)
    if config.needs_normalization:
        measured = config.measure_channels(train)
        config = config.with_normalization(measured.mean, measured.std)
    model = config.build_model(train.num_classes).to(device)
    loader = config.train_loader(train, model.stride, Ranks(), device)
    with RunLog(Path(config.output), Ranks()) as log:
        log.begin(Pace(0, config.steps, loader.batch_size, 0), trains=False)
        for step in log.track(range(config.first_step, config.first_step + config.steps), "drawing"):
            sheets = [
                sheet
                for batch in loader.rebuild(step)
                for sheet in draw_anchors_and_objects(model, batch, train.class_names)
            ]
            for number, sheet in enumerate(sheets):
                file = log.folder / f"step_{step:06}_{number}.png"
                Image.fromarray(sheet).save(file)
                log.image(step, f"batch_{number}", sheet)
                log.info(f"written: {shown_path(file)}")
