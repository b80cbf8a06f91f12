"""Read data sets in any format, from one file or several, into Annotations."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fpn_det.annotations.check_images import check_images
from fpn_det.annotations.check_objects import FlaggedObjects, check_objects
from fpn_det.annotations.classes import match_classes, merge_class_names
from fpn_det.annotations.files import existing_path
from fpn_det.annotations.findings import Finding, OnError, describe_findings, raise_for_faults
from fpn_det.annotations.formats import coco, csv_table, voc, yolo
from fpn_det.annotations.image_inspection import ImageInspector
from fpn_det.annotations.raw import RawDataset, no_collection
from fpn_det.annotations.subsets import concatenate
from fpn_det.structures import Annotations

Format = Literal["coco", "voc", "yolo", "csv"]
Paths = str | Path | Sequence[str | Path]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckedDataset:
    """A data set after repair, and everything that was found wrong with it."""

    annotations: Annotations
    findings: list[Finding]
    digests: list[str]  # of each image's bytes; "" for images that were not inspected
    image_lists: tuple[str | None, ...]  # per file: what lists the images; None = all images of a folder


def read_annotations(
    annotations: Paths,
    images: Paths | None = None,
    class_names: Sequence[str] | None = None,
    subset: bool = False,
    on_error: OnError = "fail",
    format: Format | None = None,
    split: str = "train",
    inspect: ImageInspector | None = None,
    flagged_objects: FlaggedObjects = "crowd",
) -> Annotations:
    """Read a data set. Faults are refused or repaired in memory; what was repaired is logged as a warning.

    Args:
        annotations: file or folder, see `detect_format`; several are concatenated.
        images: folder that file names start from, one for all or one for each; None is where the format has it.
        class_names: the classes and their order, from the training set; None takes them from the files.
        subset: the files may hold more classes than `class_names`; their objects are left out.
        on_error: `fail` raises with everything found. `fix` clips, fills and renumbers, and leaves out what cannot be
            repaired. `skip` also leaves out what `fix` would clip or look up.
        format: None detects it.
        split: part of a folder with several.
        inspect: inspects the image files; None trusts the annotations.
        flagged_objects: objects flagged as difficult or ignored become crowd regions, ordinary objects, or are left out.

    Raises:
        ValueError: a file is not of its format or has no usable image, or there are faults under `fail`.
    """
    raw = load_raw(annotations, images, format, split)
    checked = check_raw(raw, class_names, subset, on_error, inspect, flagged_objects)
    source = ", ".join(str(part.source) for part in raw)
    raise_for_faults(checked.findings, source, on_error)
    reported = [finding for finding in checked.findings if finding.severity != "note"]
    if reported:
        outcome = "warnings" if on_error == "fail" else "repaired in memory or left out"
        logger.warning("%s: %s:\n%s", source, outcome, describe_findings(reported))
    return checked.annotations


def load_raw(
    annotations: Paths, images: Paths | None, format: Format | None = None, split: str = "train"
) -> list[RawDataset]:
    """Load each file of a data set without checking its values.

    Args:
        annotations: see `read_annotations`.
        images: see `read_annotations`.
        format: None detects it.
        split: part of a folder with several.

    Raises:
        ValueError: a path does not exist or is not of its format, or the numbers of folders and files differ.
    """
    sources = [existing_path(path, f"data.{split}.annotations") for path in as_list(annotations)]
    folders = [None if path is None else existing_path(path, f"data.{split}.images") for path in as_list(images)]
    if len(folders) == 1:
        folders = folders * len(sources)
    if len(folders) != len(sources) or not sources:
        raise ValueError(
            f"data.{split}: expected a folder of images for each of {len(sources)} annotations, or one, got {len(folders)}."
        )
    return [
        _load(source, folder, format or detect_format(source), split)
        for source, folder in zip(sources, folders, strict=True)
    ]


@no_collection()
def check_raw(
    datasets: Sequence[RawDataset],
    class_names: Sequence[str] | None = None,
    subset: bool = False,
    on_error: OnError = "fail",
    inspect: ImageInspector | None = None,
    flagged_objects: FlaggedObjects = "crowd",
) -> CheckedDataset:
    """Check and repair raw data sets and concatenate them. Arguments as in `read_annotations`.

    Raises:
        ValueError: the records of the categories are no classes.
    """
    several = len(datasets) > 1
    names = merge_class_names(datasets) if several and class_names is None else class_names
    parts, findings, digests = [], [], []
    for raw in datasets:
        classes, differences = match_classes(
            raw.categories, names, subset, raw.source.name, raw.lists_classes and not several
        )
        findings += raw.findings + differences
        images = check_images(raw, on_error, inspect, findings)
        parts.append(check_objects(raw.objects, images, classes, on_error, flagged_objects, findings))
        digests += images.digests
        if not raw.is_labeled:
            message = f"{raw.source.name}: a list of images without annotations; nothing can be scored"
            findings.append(Finding("no_annotations", message, "warning"))
    annotations = concatenate(parts)
    if not len(annotations):
        sources = ", ".join(raw.source.name for raw in datasets)
        findings.append(Finding("no_images", f"{sources}: expected at least one usable image, got none", "fatal"))
    return CheckedDataset(annotations, findings, digests, tuple(raw.image_list for raw in datasets))


def detect_format(source: Path) -> Format:
    """Determine the format of a path.

    COCO is a JSON file and CSV a table. VOC is a folder of XML files, a folder with `Annotations`, or a list of names in
    `ImageSets`. YOLO is a `data.yaml`, or the folder of one or of `classes.txt`.

    Raises:
        ValueError: the folder is of none of them; says what was looked for.
    """
    suffix = source.suffix.lower()
    if source.is_dir():
        if voc.is_voc(source):
            return "voc"
        if yolo.find_description(source) is not None:
            return "yolo"
        files = ", ".join(sorted(path.name for path in source.iterdir() if path.suffix in (".json", ".csv"))[:5])
        another = f" that holds {files}: name that file" if files else ""
        raise ValueError(
            f"{source}: expected a folder in VOC or YOLO format, got another{another}. "
            f"VOC has {' or '.join(voc.ANNOTATION_FOLDERS)} or XML files, YOLO data.yaml or classes.txt."
        )
    if suffix in (".yaml", ".yml"):
        return "yolo"
    if suffix in (".csv", ".tsv"):
        return "csv"
    return "voc" if suffix == ".txt" else "coco"


def _load(source: Path, folder: Path | None, format: Format, split: str) -> RawDataset:
    try:
        if format == "coco":
            return coco.load(source, folder or source.parent)
        if format == "csv":
            return csv_table.load(source, folder or source.parent)
        return (voc if format == "voc" else yolo).load(source, folder, split)
    except OSError as error:
        raise ValueError(
            f"{error.filename or source}: expected a path that can be read, got: {error.strerror}."
        ) from None


def as_list(paths: Paths | None) -> list:
    """Return one path, several, or None as a list."""
    return [paths] if paths is None or isinstance(paths, str | Path) else list(paths)
