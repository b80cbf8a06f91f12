"""Write data sets as COCO JSON, Pascal VOC, YOLO text files or CSV. The functions return or write plain files; no image is read.

| target | images | annotations |
|---|---|---|
| coco | `<split>2017/<name>` | `annotations/instances_<split>2017.json` |
| voc | `JPEGImages/<name>` | `Annotations/<stem>.xml`, `ImageSets/Main/<split>.txt` |
| yolo | `images/<split>/<name>` | `labels/<split>/<stem>.txt`, `data.yaml` |
| csv | `images/<split>/<name>` | `<split>.csv` |
"""

from __future__ import annotations

import csv
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml  # type: ignore[import-untyped]

from fpn_det.annotations.formats import voc, yolo
from fpn_det.annotations.reading import Format
from fpn_det.structures import Annotations

CSV_COLUMNS = ("file", "width", "height", "x1", "y1", "x2", "y2", "class")
NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, section 2.2
IMAGE_FOLDERS: dict[Format, str] = {
    "coco": "{split}2017",
    "voc": "JPEGImages",
    "yolo": "images/{split}",
    "csv": "images/{split}",
}

Box = tuple[float, float, float, float]
Files = dict[str, str]  # path relative to the data set: content


@dataclass(frozen=True)
class Part:
    """A split to write: its annotations, and the names of its images relative to the folder of the images."""

    annotations: Annotations
    names: Sequence[str]

    def objects(self, row: int) -> Iterator[tuple[int, Box, bool]]:
        """(label, xyxy in px, is a crowd region) of each object of an image."""
        rows = self.annotations.rows(row)
        columns = self.annotations.labels[rows], self.annotations.boxes[rows], self.annotations.iscrowd[rows]
        for label, box, crowd in zip(*(column.tolist() for column in columns), strict=True):
            yield label, tuple(box), crowd

    def sizes(self) -> list[tuple[int, int]]:
        """(h, w) of each image, px."""
        return [(height, width) for height, width in self.annotations.sizes.tolist()]


def image_folder(target: Format, split: str) -> PurePosixPath:
    """The folder of the images of a split, relative to the data set."""
    return PurePosixPath(IMAGE_FOLDERS[target].format(split=split))


def as_coco(parts: Mapping[str, Part]) -> Files:
    """One JSON file for each split; category and annotation ids count from 1."""
    return {f"annotations/instances_{split}2017.json": _coco_json(part) for split, part in parts.items()}


def _coco_json(part: Part) -> str:
    annotations = part.annotations
    images: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    rows = zip(annotations.image_ids.tolist(), part.names, part.sizes(), strict=True)
    for row, (image_id, name, (height, width)) in enumerate(rows):
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        areas = annotations.area[annotations.rows(row)].tolist()
        for (label, (x1, y1, x2, y2), crowd), area in zip(part.objects(row), areas, strict=True):
            records.append(
                {
                    "id": len(records) + 1,
                    "image_id": image_id,
                    "category_id": label + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": area,
                    "iscrowd": int(crowd),
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(annotations.class_names, start=1)]
    return json.dumps({"images": images, "annotations": records, "categories": categories})


def as_voc(parts: Mapping[str, Part], pixel_offset: int) -> Files:
    """An XML file for each image and a list for each split; fractions of a pixel are kept, crowd regions are `difficult`.

    Args:
        parts: splits, whose images have stems of their own.
        pixel_offset: number of the first pixel.

    Raises:
        ValueError: a name cannot be written as XML.
    """
    files: Files = {}
    for split, part in parts.items():
        stems = [PurePosixPath(name).with_suffix("").as_posix() for name in part.names]
        for name in (*part.annotations.class_names, *part.names):
            if found := NOT_IN_XML.search(name):
                raise ValueError(f"voc: expected names that XML can hold, got {name!r} with {found[0]!r}. Rename it.")
        for row, (stem, size) in enumerate(zip(stems, part.sizes(), strict=True)):
            files[f"Annotations/{stem}.xml"] = _voc_xml(part, row, size, pixel_offset)
        files[f"ImageSets/Main/{split}.txt"] = "".join(f"{stem}\n" for stem in stems)
    return files


def _voc_xml(part: Part, row: int, size: tuple[int, int], pixel_offset: int) -> str:
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = PurePosixPath(part.names[row]).name
    element = ElementTree.SubElement(root, "size")
    for tag, value in zip(("height", "width", "depth"), (*size, 3), strict=True):
        ElementTree.SubElement(element, tag).text = str(value)
    for label, (x1, y1, x2, y2), crowd in part.objects(row):
        element = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(element, "name").text = part.annotations.class_names[label]
        ElementTree.SubElement(element, "difficult").text = str(int(crowd))
        corners = ElementTree.SubElement(element, "bndbox")
        for tag, side in zip(voc.SIDES, (x1 + pixel_offset, y1 + pixel_offset, x2, y2), strict=True):
            ElementTree.SubElement(corners, tag).text = f"{side:.12g}"
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def as_yolo(parts: Mapping[str, Part]) -> Files:
    """A label file for each image, without crowd regions, and data.yaml.

    Args:
        parts: splits, each with images that have stems of their own, and all with the same classes.
    """
    files: Files = {}
    folders = {split: str(image_folder("yolo", split)) for split in parts}
    for split, part in parts.items():
        images = image_folder("yolo", split)
        for row, (name, (height, width)) in enumerate(zip(part.names, part.sizes(), strict=True)):
            lines = []
            for label, (x1, y1, x2, y2), crowd in part.objects(row):
                box = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
                if not crowd:
                    lines.append(" ".join([str(label), *(f"{value:.12g}" for value in box)]) + "\n")
            image = images / name
            files[str(yolo.label_folder(image.parent) / f"{image.stem}.txt")] = "".join(lines)
    names = dict(enumerate(next(iter(parts.values())).annotations.class_names))
    # Without `path`, which other readers resolve from other places.
    files["data.yaml"] = yaml.safe_dump({**folders, "names": names}, sort_keys=False, allow_unicode=True)
    return files


def as_csv(parts: Mapping[str, Part], with_folder: bool) -> Files:
    """A table for each split, with a line of column names, without crowd regions.

    Args:
        parts: splits.
        with_folder: file names begin with the folder of the images in the output.
    """
    files: Files = {}
    for split, part in parts.items():
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(CSV_COLUMNS)
        for row, (name, (height, width)) in enumerate(zip(part.names, part.sizes(), strict=True)):
            start = (str(image_folder("csv", split) / name) if with_folder else name, width, height)
            lines = [
                (*start, *box, part.annotations.class_names[label])
                for label, box, crowd in part.objects(row)
                if not crowd
            ]
            writer.writerows(lines or [(*start, *[""] * 5)])
        files[f"{split}.csv"] = text.getvalue()
    return files
