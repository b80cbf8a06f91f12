"""Convert a data set between COCO JSON, Pascal VOC, YOLO text files and CSV.

Makes a new folder with annotations and images (links to those of the source) that can be trained on at once. The source
is read and checked as for training, and stays as it is. Splits stay as they are, or `val` and `test` take a share or a list
of the training images; equal files never come into two splits. Only COCO has crowd regions: VOC keeps them as `difficult`,
YOLO and CSV leave them out.

Examples:
  fpn-det convert-data source=voc target=yolo input=VOC2007 output=voc_yolo
  fpn-det convert-data source=coco target=yolo input=a.json output=b val=0.1
  fpn-det convert-data source=csv target=coco input=a.csv output=b val=val.txt
"""

from __future__ import annotations

import shlex
from pathlib import Path

from fpn_det.annotations.conversion import ConversionConfig, convert
from fpn_det.cli.arguments import run_command
from fpn_det.terminal import say, shown_path, standard_console


def main() -> None:
    """Convert as the command line describes."""
    run_command(convert_data, ConversionConfig)


def convert_data(config: ConversionConfig) -> None:
    """Convert, and print the counts and the command that trains on the result.

    Raises:
        ValueError: an option has no effect on these formats.
    """
    if config.pixel_offset != 1 and "voc" not in (config.source, config.target):
        raise ValueError("pixel_offset: has no effect here: only voc counts pixels. Leave it out.")
    try:
        result = convert(config)
    except ValueError as error:
        raise ValueError(str(error).replace("data.on_error=", "on_error=")) from None
    console, folder = standard_console(), shown_path(Path(config.output).expanduser())
    say(console, result.describe())
    if config.pictures == "none":
        say(console, f"Written: {folder}, without images.")
        return
    words = [f"data.root={folder}"] if config.target == "coco" else [f"data={config.target}", f"data.root={folder}"]
    words += [] if "val" in result.splits else ["data.val_fraction=0.1"]
    say(console, f"Written: {folder}. To train on it:\n  fpn-det train experiment=small {shlex.join(words)}")
