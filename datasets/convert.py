"""Convert annotations from one format to another: COCO JSON, Pascal VOC, YOLO text files, CSV.

The source is read as training reads it, so the same faults are found, and named with file and place. They end the
conversion, or `--on-error fix` repairs them in what is written; the source stays as it is. Images stay where they are;
their names are relative to the folder that holds them. Only COCO has crowd regions: VOC keeps them as `difficult`, which
is nearest in meaning, YOLO and CSV leave them out.

    python datasets/convert.py voc coco --input VOC2007 --split train --output VOC2007/train.json
    python datasets/convert.py coco yolo --input instances_train.json --split train --output yolo
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import get_args

from fpn_det.annotations.conversion import ConversionConfig, convert
from fpn_det.annotations.reading import Format


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert as the command line says."""
    formats = get_args(Format)
    parser = argparse.ArgumentParser(
        description="Convert annotations between formats.", epilog="See datasets/README.md."
    )
    parser.add_argument("source", choices=formats)
    parser.add_argument("target", choices=formats)
    parser.add_argument("--input", required=True, help="file (coco, csv), folder (voc, yolo), list (voc) or data.yaml")
    parser.add_argument("--output", required=True, help="file (coco, csv) or folder (voc, yolo) to write")
    parser.add_argument("--split", help="part to read (voc, yolo; default train), and its name in the output")
    parser.add_argument(
        "--images", help="folder of the images, if not where the format has them; coco and csv need none"
    )
    parser.add_argument(
        "--classes", nargs="+", metavar="NAME", help="their order; else by id (coco), number (yolo), name (voc, csv)"
    )
    parser.add_argument(
        "--pixel-offset",
        type=int,
        choices=(0, 1),
        help="number of the first pixel in voc: 1 (default, the standard) or 0",
    )
    parser.add_argument(
        "--on-error", choices=("fail", "fix", "skip"), default="fail", help="what to do about faults, as data.on_error"
    )
    options = parser.parse_args(arguments)
    used = {options.source, options.target}
    if options.split is not None and not used & {"voc", "yolo"}:
        parser.error("--split: only voc and yolo have splits.")
    if options.pixel_offset is not None and "voc" not in used:
        parser.error("--pixel-offset: only voc counts pixels.")
    settings = {name: value for name, value in vars(options).items() if value is not None}
    try:
        print(convert(ConversionConfig(**settings)).describe(options.output))
    except ValueError as error:
        parser.exit(1, f"{str(error).replace('data.on_error=', '--on-error ')}\n")


if __name__ == "__main__":
    main()
