"""Convert annotations between COCO JSON, Pascal VOC, YOLO text files and CSV.

The source is read and checked as for training, and stays as it is. Images stay where they are: their names are relative
to the folder that holds them. Only COCO has crowd regions: VOC keeps them as `difficult`, YOLO and CSV leave them out.

Examples:
  fpn-det convert-data source=voc target=coco input=VOC2007 split=train output=VOC2007/train.json
  fpn-det convert-data source=coco target=yolo input=instances_train.json split=train output=yolo
  fpn-det convert-data source=csv target=coco input=boxes.csv output=boxes.json on_error=fix
"""

from __future__ import annotations

from fpn_det.annotations.conversion import ConversionConfig, convert
from fpn_det.cli.arguments import run_command
from fpn_det.terminal import printable


def main() -> None:
    """Convert as the command line describes."""
    run_command(convert_data, ConversionConfig)


def convert_data(config: ConversionConfig) -> None:
    """Convert, and print the counts.

    Raises:
        ValueError: an option has no effect on these formats.
    """
    formats = {config.source, config.target}
    if config.split != "train" and not formats & {"voc", "yolo"}:
        raise ValueError("split: has no effect here: only voc and yolo have splits. Leave it out.")
    if config.pixel_offset != 1 and "voc" not in formats:
        raise ValueError("pixel_offset: has no effect here: only voc counts pixels. Leave it out.")
    try:
        print(printable(convert(config).describe(config.output)))
    except ValueError as error:
        raise ValueError(str(error).replace("data.on_error=", "on_error=")) from None
