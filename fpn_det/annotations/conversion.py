"""Convert annotations between COCO JSON, Pascal VOC, YOLO text files and CSV.

The source is read and checked as for training, and stays as it is. Images stay where they are: their names are relative
to the folder that holds them, and every file is written below the output folder.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import yaml  # type: ignore[import-untyped]

from fpn_det.annotations.files import existing_path, read_text
from fpn_det.annotations.findings import Finding, OnError, describe_findings, one_line, raise_for_faults
from fpn_det.annotations.formats import coco, csv_table, voc, yolo
from fpn_det.annotations.image_inspection import inspect_images
from fpn_det.annotations.raw import RawDataset
from fpn_det.annotations.reading import Format, check_raw
from fpn_det.safe_yaml import load_yaml
from fpn_det.structures import Annotations

CSV_COLUMNS = ("file", "width", "height", "x1", "y1", "x2", "y2", "class")
NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, section 2.2

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class ConversionConfig:
    """Settings of one conversion."""

    source: Format  # format to read
    target: Format  # format to write
    input: str  # file (coco, csv), folder (voc, yolo), list (voc) or data.yaml (yolo)
    output: str  # file (coco, csv) or folder (voc, yolo)
    split: str = "train"  # part to read (voc, yolo), and its name in the output
    images: str | None = None  # folder of the images; null = where the format has them; coco and csv need none
    classes: list[str] | None = None  # their order; null = by id (coco), number (yolo) or name (voc, csv)
    pixel_offset: Literal[0, 1] = 1  # number of the first pixel in VOC; 1 is the standard
    on_error: OnError = "fail"  # faults of the source: refuse, repair in what is written, or leave out


@dataclass
class Conversion:
    """Result of a conversion: counts, what was found in the source, and what the target format cannot hold."""

    annotations: Annotations
    findings: list[Finding]
    losses: list[str] = field(default_factory=list)

    def describe(self, output: str) -> str:
        """The lines for the user, the counts last."""
        lines = [one_line(line) for line in self.losses]
        reported = [finding for finding in self.findings if finding.severity != "note"]
        if reported:
            lines.append(f"Found in the source:\n{describe_findings(reported)}")
        annotations = self.annotations
        empty = int((annotations.boxes_per_image == 0).sum())
        names = one_line(", ".join(annotations.class_names))
        counts = f"{len(annotations)} images ({empty} without objects), {len(annotations.boxes)} objects"
        return "\n".join([*lines, f"{output}: {counts}, classes {names}."])


def convert(config: ConversionConfig) -> Conversion:
    """Read annotations in one format and write them in another.

    Raises:
        ValueError: the source has faults that `on_error` does not allow, or the target format cannot hold a name.
    """
    raw = _load(config)
    checked = check_raw([raw], config.classes, on_error=config.on_error, inspect=inspect_images)
    raise_for_faults(checked.findings, str(raw.source), config.on_error)
    output = Path(config.output)
    if os.path.exists(output) and os.path.samefile(output, config.input) and config.target in ("coco", "csv"):
        raise ValueError(f"{output}: expected an output that is not the input. Choose another output.")
    result = Conversion(checked.annotations, checked.findings)
    writer = {"coco": _write_coco, "voc": _write_voc, "yolo": _write_yolo, "csv": _write_csv}[config.target]
    try:
        writer(_Source(checked.annotations, raw.folder, result), output, config)
    except UnicodeEncodeError as error:
        raise ValueError(f"{output}: expected names in Unicode, got {error.object!r}. Rename the file.") from None
    except OSError as error:
        raise ValueError(f"{error.filename or output}: expected a path to write to, got: {error.strerror}.") from None
    return result


def _load(config: ConversionConfig) -> RawDataset:
    path = existing_path(config.input, "input")
    images = None if config.images is None else existing_path(config.images, "images")
    if config.source == "coco":
        return coco.load(path, images)
    if config.source == "csv":
        return csv_table.load(path, images)
    if config.source == "voc":
        return voc.load(path, images, config.split, config.pixel_offset)
    return yolo.load(path, images, config.split)


@dataclass
class _Source:
    """Annotations as the writers need them."""

    annotations: Annotations
    folder: Path | None
    result: Conversion

    def file_name(self, row: int) -> str:
        """The name of an image relative to the folder of the images."""
        path = self.annotations.path(row)
        return (path if self.folder is None else Path(os.path.relpath(path, self.folder))).as_posix()

    def name_below(self, row: int, output: Path) -> PurePosixPath:
        """The name of an image, which must stay inside the folder of the images.

        Raises:
            ValueError: the name is absolute or climbs out of the folder.
        """
        name = PurePosixPath(self.file_name(row))
        if name.is_absolute() or ".." in name.parts:
            raise ValueError(
                f"{output}: expected names of images inside one folder, got {one_line(str(name))}, whose label file would be "
                "outside of the output. Set images to the folder of the images."
            )
        return name

    def stems(self, output: Path, target: str) -> list[str]:
        """Names of the images without their endings, each of which must be unique."""
        names = [self.name_below(row, output) for row in range(len(self.annotations))]
        owner: dict[str, PurePosixPath] = {}
        for name in names:
            stem = name.with_suffix("").as_posix()
            if stem in owner:
                raise ValueError(
                    f"{output}: expected a name of its own for each image, got '{stem}' more than once: "
                    f"{owner[stem]} and {name}. {target} ignores the ending: rename one."
                )
            owner[stem] = name
        return list(owner)

    def objects(self, row: int) -> Iterator[tuple[int, Box, bool]]:
        """(label, xyxy in px, is a crowd region) of each object of an image."""
        rows = self.annotations.rows(row)
        columns = self.annotations.labels[rows], self.annotations.boxes[rows], self.annotations.iscrowd[rows]
        for label, box, crowd in zip(*(column.tolist() for column in columns), strict=True):
            yield label, tuple(box), crowd

    def objects_without_crowd(self, row: int, target: str) -> list[tuple[int, Box]]:
        """(label, xyxy in px) of each object, for formats without crowd regions; the loss is recorded."""
        found = list(self.objects(row))
        kept = [(label, box) for label, box, crowd in found if not crowd]
        if lost := len(found) - len(kept):
            self.result.losses.append(
                f"{self.file_name(row)}: {lost} crowd region(s), which {target} cannot hold; left out."
            )
        return kept


def _write_coco(source: _Source, output: Path, config: ConversionConfig) -> None:
    """Write one JSON file; category and annotation ids count from 1."""
    annotations = source.annotations
    images: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    rows = zip(annotations.image_ids.tolist(), annotations.sizes.tolist(), strict=True)
    for row, (image_id, (height, width)) in enumerate(rows):
        images.append({"id": image_id, "file_name": source.file_name(row), "height": height, "width": width})
        areas = annotations.area[annotations.rows(row)].tolist()
        for (label, (x1, y1, x2, y2), crowd), area in zip(source.objects(row), areas, strict=True):
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
    _write_text(output, json.dumps({"images": images, "annotations": records, "categories": categories}))


def _write_voc(source: _Source, output: Path, config: ConversionConfig) -> None:
    """Write an XML file per image and the list of the split; fractions of a pixel are kept.

    Raises:
        ValueError: two images differ by their ending only, or a name cannot be written as XML.
    """
    annotations = source.annotations
    stems = source.stems(output, "VOC")
    for name in (*annotations.class_names, *stems):
        if found := NOT_IN_XML.search(name):
            raise ValueError(f"{output}: expected names that XML can hold, got {name!r} with {found[0]!r}. Rename it.")
    files: dict[Path, str] = {}
    for row, (stem, (height, width)) in enumerate(zip(stems, annotations.sizes.tolist(), strict=True)):
        root = ElementTree.Element("annotation")
        ElementTree.SubElement(root, "filename").text = PurePosixPath(source.file_name(row)).name
        size = ElementTree.SubElement(root, "size")
        for tag, value in zip(("width", "height", "depth"), (width, height, 3), strict=True):
            ElementTree.SubElement(size, tag).text = str(value)
        for label, (x1, y1, x2, y2), crowd in source.objects(row):
            element = ElementTree.SubElement(root, "object")
            ElementTree.SubElement(element, "name").text = annotations.class_names[label]
            ElementTree.SubElement(element, "difficult").text = str(int(crowd))
            corners = ElementTree.SubElement(element, "bndbox")
            sides = (x1 + config.pixel_offset, y1 + config.pixel_offset, x2, y2)
            for tag, side in zip(voc.SIDES, sides, strict=True):
                ElementTree.SubElement(corners, tag).text = f"{side:.12g}"
        ElementTree.indent(root)
        files[output / "Annotations" / f"{stem}.xml"] = ElementTree.tostring(root, encoding="unicode") + "\n"
    _write_new(files, output)
    _write_text(output / "ImageSets" / "Main" / f"{config.split}.txt", "".join(f"{stem}\n" for stem in stems))


def _write_yolo(source: _Source, output: Path, config: ConversionConfig) -> None:
    """Write a label file per image, and data.yaml, which a second split extends.

    Raises:
        ValueError: data.yaml exists and has other classes, or two images differ by their ending only.
    """
    annotations = source.annotations
    names = dict(enumerate(annotations.class_names))
    description = output / "data.yaml"
    content: dict[str, Any] = {"path": "."}
    if description.exists():
        content = load_yaml(read_text(description), str(description), as_strings=True)
        if not isinstance(content, dict) or content.get("names") != {str(key): name for key, name in names.items()}:
            raise ValueError(
                f"{description}: expected the classes {', '.join(annotations.class_names)}, got others. "
                "Set classes, or choose another output."
            )
    files: dict[Path, str] = {}
    for row, (stem, (height, width)) in enumerate(
        zip(source.stems(output, "YOLO"), annotations.sizes.tolist(), strict=True)
    ):
        lines = []
        for label, (x1, y1, x2, y2) in source.objects_without_crowd(row, "YOLO"):
            box = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
            lines.append(" ".join([str(label), *(f"{value:.12g}" for value in box)]) + "\n")
        files[output / "labels" / config.split / f"{stem}.txt"] = "".join(lines)
    _write_new(files, output)
    content |= {config.split: f"images/{config.split}", "names": names}
    _write_text(description, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def _write_csv(source: _Source, output: Path, config: ConversionConfig) -> None:
    """Write one table with a line of column names."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(CSV_COLUMNS)
    for row, (height, width) in enumerate(source.annotations.sizes.tolist()):
        start = (source.file_name(row), width, height)
        lines = [
            (*start, *box, source.annotations.class_names[label])
            for label, box in source.objects_without_crowd(row, "CSV")
        ]
        writer.writerows(lines or [(*start, *[""] * 5)])
    _write_text(output, text.getvalue())


def _write_new(files: dict[Path, str], output: Path) -> None:
    """Write files that may exist with the same content, but not with another: it belongs to another image or set.

    Raises:
        ValueError: a file exists with other content; nothing is written then.
    """
    for path, text in files.items():
        if path.exists() and (not path.is_file() or path.read_bytes() != text.encode()):
            raise ValueError(
                f"{path}: expected no such file, got one with other labels. Delete it, or choose another output than {output}."
            )
    for path, text in files.items():
        _write_text(path, text)


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())  # not in the line ends and encoding of the system
