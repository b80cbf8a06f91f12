"""Carry annotations from one format to another: COCO JSON, Pascal VOC, YOLO text files, CSV.

Whatever the source, it is read as training reads it, by `fpn_det.data`; so the same faults are found, and named with file
and place. They end the conversion, or `--on-error fix` repairs them in what is written; the source stays as it is.
ImageTable stay where they are; their names are relative to the folder that holds them. Crowd regions are COCO's alone; VOC
keeps them as `difficult`, which is nearest in meaning, YOLO and CSV leave them out.

    python datasets/convert.py voc coco --input VOC2007 --split train --output VOC2007/train.json
    python datasets/convert.py coco yolo --input instances_train.json --split train --output yolo
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from fpn_det.annotations.findings import existing_path
from fpn_det.annotations.formats import coco, csv_table, voc, yolo
from fpn_det.annotations.image_inspection import inspect_images
from fpn_det.annotations.raw import RawDataset
from fpn_det.annotations.reading import check_raw, raise_for_faults
from fpn_det.structures import Annotations

FORMATS = ("coco", "voc", "yolo", "csv")
CSV_COLUMNS = ("file", "width", "height", "x1", "y1", "x2", "y2", "class")

Box = tuple[float, float, float, float]


def load(source: str, path: Path, split: str, images: Path | None, pixel_offset: int) -> RawDataset:
    """The tables of data in the format `source`; pictures that are not named are where the format has them."""
    path = existing_path(path, "--input")
    images = None if images is None else existing_path(images, "--images")
    if source == "coco":
        return coco.load(path, images)
    if source == "csv":
        return csv_table.load(path, images)
    return voc.load(path, images, split, pixel_offset) if source == "voc" else yolo.load(path, images, split)


def read(tables: RawDataset, class_names: Sequence[str] | None, on_error: Any) -> Annotations:
    """The data set, sound or repaired; pictures are looked at where their folder is known.

    Raises:
        ValueError: there are faults under `fail`.
    """
    examined = check_raw([tables], class_names, on_error=on_error, inspect=inspect_images)
    raise_for_faults(examined, str(tables.source), on_error)
    return examined.annotations


def file_name(annotations: Annotations, row: int, folder: Path | None) -> str:
    """The name of a picture, relative to its folder."""
    path = annotations.path(row)
    return (path if folder is None else Path(os.path.relpath(path, folder))).as_posix()


def objects(annotations: Annotations, row: int) -> Iterator[tuple[str, Box, bool]]:
    """(class, xyxy in px, is a crowd) of each object of an image."""
    rows = annotations.rows(row)
    columns = annotations.labels[rows], annotations.boxes[rows], annotations.iscrowd[rows]
    for label, box, crowd in zip(*(column.tolist() for column in columns), strict=True):
        yield annotations.class_names[label], tuple(box), crowd


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _without_crowd(annotations: Annotations, row: int, name: str, target: str) -> list[tuple[str, Box]]:
    found = list(objects(annotations, row))
    kept = [(class_name, box) for class_name, box, crowd in found if not crowd]
    if lost := len(found) - len(kept):
        print(f"{name}: {lost} crowd region(s), which {target} cannot say; left out.")
    return kept


def write_coco(annotations: Annotations, folder: Path | None, path: Path) -> None:
    """One JSON file; category and annotation ids count from 1."""
    images: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    for row, (image_id, (height, width)) in enumerate(
        zip(annotations.image_ids.tolist(), annotations.sizes.tolist(), strict=True)
    ):
        images.append(
            {"id": image_id, "file_name": file_name(annotations, row, folder), "height": height, "width": width}
        )
        areas = annotations.area[annotations.rows(row)].tolist()
        for (class_name, (x1, y1, x2, y2), crowd), area in zip(objects(annotations, row), areas, strict=True):
            records.append(
                {
                    "id": len(records) + 1,
                    "image_id": image_id,
                    "category_id": annotations.class_names.index(class_name) + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": area,
                    "iscrowd": int(crowd),
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(annotations.class_names, start=1)]
    _write_text(path, json.dumps({"images": images, "annotations": records, "categories": categories}))


def write_voc(annotations: Annotations, folder: Path | None, path: Path, split: str, pixel_offset: int = 1) -> None:
    """XML files and the list of a split; fractions of a pixel are kept.

    Raises:
        ValueError: two pictures differ in their folder or ending only, which VOC cannot say.
    """
    names = [file_name(annotations, row, folder) for row in range(len(annotations))]
    stems = [Path(name).stem for name in names]
    if len(set(stems)) < len(stems):
        twice = max(stems, key=stems.count)
        raise ValueError(
            f"{path}: expected a name of its own for each picture, got '{twice}' more than once. VOC knows no folders: rename some."
        )
    for row, (stem, name, (height, width)) in enumerate(zip(stems, names, annotations.sizes.tolist(), strict=True)):
        root = ElementTree.Element("annotation")
        ElementTree.SubElement(root, "filename").text = Path(name).name
        size = ElementTree.SubElement(root, "size")
        for tag, value in zip(("width", "height", "depth"), (width, height, 3), strict=True):
            ElementTree.SubElement(size, tag).text = str(value)
        for class_name, (x1, y1, x2, y2), crowd in objects(annotations, row):
            element = ElementTree.SubElement(root, "object")
            ElementTree.SubElement(element, "name").text = class_name
            ElementTree.SubElement(element, "difficult").text = str(int(crowd))
            corners = ElementTree.SubElement(element, "bndbox")
            for tag, side in zip(voc.SIDES, (x1 + pixel_offset, y1 + pixel_offset, x2, y2), strict=True):
                ElementTree.SubElement(corners, tag).text = f"{side:.12g}"
        ElementTree.indent(root)
        _write_text(path / "Annotations" / f"{stem}.xml", ElementTree.tostring(root, encoding="unicode") + "\n")
    _write_text(path / "ImageSets" / "Main" / f"{split}.txt", "".join(f"{stem}\n" for stem in stems))


def write_yolo(annotations: Annotations, folder: Path | None, path: Path, split: str) -> None:
    """A label file per picture, and data.yaml, which a second split extends.

    Raises:
        ValueError: data.yaml is there and has other classes.
    """
    described = path / "data.yaml"
    content: dict[str, Any] = {"path": "."}
    if described.exists():
        content = yaml.safe_load(described.read_text(encoding="utf-8"))
        if content.get("names") != dict(enumerate(annotations.class_names)):
            names = ", ".join(annotations.class_names)
            raise ValueError(
                f"{described}: expected the classes {names}, got others. Give --classes or another --output."
            )
    for row, (height, width) in enumerate(annotations.sizes.tolist()):
        name = file_name(annotations, row, folder)
        lines = []
        for class_name, (x1, y1, x2, y2) in _without_crowd(annotations, row, name, "YOLO"):
            center_and_sides = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
            lines.append(
                " ".join(
                    [str(annotations.class_names.index(class_name)), *(f"{value:.12g}" for value in center_and_sides)]
                )
                + "\n"
            )
        _write_text((path / "labels" / split / name).with_suffix(".txt"), "".join(lines))
    content |= {split: f"images/{split}", "names": dict(enumerate(annotations.class_names))}
    _write_text(described, yaml.safe_dump(content, sort_keys=False))


def write_csv(annotations: Annotations, folder: Path | None, path: Path) -> None:
    """One table, with a line of column names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        for row, (height, width) in enumerate(annotations.sizes.tolist()):
            start = (file_name(annotations, row, folder), width, height)
            lines = [
                (*start, *box, class_name) for class_name, box in _without_crowd(annotations, row, start[0], "CSV")
            ]
            writer.writerows(lines or [(*start, *[""] * 5)])


def write(
    target: str, annotations: Annotations, folder: Path | None, path: Path, split: str, pixel_offset: int
) -> None:
    """Write a data set, whose names start from `folder`, as the format `target`."""
    if target == "coco":
        write_coco(annotations, folder, path)
    elif target == "csv":
        write_csv(annotations, folder, path)
    elif target == "yolo":
        write_yolo(annotations, folder, path, split)
    else:
        write_voc(annotations, folder, path, split, pixel_offset)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Convert annotations between formats.", epilog="See datasets/README.md."
    )
    parser.add_argument("source", choices=FORMATS)
    parser.add_argument("target", choices=FORMATS)
    parser.add_argument(
        "--input", type=Path, required=True, help="file (coco, csv), folder (voc, yolo), list (voc) or data.yaml (yolo)"
    )
    parser.add_argument("--output", type=Path, required=True, help="file (coco, csv) or folder (voc, yolo) to write")
    parser.add_argument("--split", help="which part to read (voc, yolo; default train), and its name to write")
    parser.add_argument(
        "--images", type=Path, help="where the pictures are, if not where the format has them; coco and csv do without"
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
    formats = {options.source, options.target}
    if options.split is not None and not formats & {"voc", "yolo"}:
        parser.error("--split: only voc and yolo have splits.")
    if options.pixel_offset is not None and "voc" not in formats:
        parser.error("--pixel-offset: only voc counts pixels.")
    logging.basicConfig(format="%(message)s")
    pixel_offset = 1 if options.pixel_offset is None else options.pixel_offset
    split = options.split or "train"
    try:
        tables = load(options.source, options.input, split, options.images, pixel_offset)
        annotations = read(tables, options.classes, options.on_error)
        write(options.target, annotations, tables.folder, options.output, split, pixel_offset)
    except ValueError as error:
        parser.exit(1, f"{str(error).replace('data.on_error=', '--on-error ')}\n")
    empty = int((annotations.boxes_per_image == 0).sum())
    names = ", ".join(annotations.class_names)
    print(
        f"{options.output}: {len(annotations)} pictures ({empty} without objects), {len(annotations.boxes)} objects, classes {names}."
    )


if __name__ == "__main__":
    main()
