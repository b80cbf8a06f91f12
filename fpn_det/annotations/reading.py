"""From data as people have it, in any format and in one part or several, to Annotations."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from fpn_det.annotations.check_images import ImageInspector, OnError, check_images
from fpn_det.annotations.check_objects import check_objects
from fpn_det.annotations.classes import match_classes, merge_class_names
from fpn_det.annotations.findings import Finding, describe_findings, existing_path
from fpn_det.annotations.formats import coco, csv_table, voc, yolo
from fpn_det.annotations.raw import RawDataset
from fpn_det.annotations.subsets import concatenate
from fpn_det.schema import listed
from fpn_det.structures import Annotations

Format = Literal["coco", "voc", "yolo", "csv"]
Paths = str | Path | Sequence[str | Path]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckedDataset:
    """A data set after repair, all that was wrong with it, and what a look at its pictures showed."""

    annotations: Annotations
    findings: list[Finding]
    digests: list[str]  # of each picture's bytes; "" where nobody looked


def read_annotations(
    annotations: Paths,
    images: Paths | None = None,
    class_names: Sequence[str] | None = None,
    subset: bool = False,
    on_error: OnError = "fail",
    format: Format | None = None,
    split: str = "train",
    inspect: ImageInspector | None = None,
) -> Annotations:
    """Read a data set. What is wrong with it stops here or is repaired in memory, and is said in either case.

    Args:
        annotations: what the format calls for, see `format_of`; several are put together.
        images: the folder its file names start from, one for all or one for each; None is where the format has it.
        class_names: the classes and their order, from the training set; None takes them from the files.
        subset: the files may hold more classes than `class_names`; their objects are left out.
        on_error: `fail` raises with everything found. `fix` clips, fills and renumbers, and leaves out what cannot be
            repaired. `skip` also leaves out what `fix` would clip or look up.
        format: None recognizes it.
        split: which part of a folder with several.
        inspect: looks into the picture files; None trusts the annotations.

    Raises:
        ValueError: a file is not of its format or holds no usable image, or there are faults under `fail`.
    """
    tables = load_raw(annotations, images, format, split)
    examined = check_raw(tables, class_names, subset, on_error, inspect)
    raise_for_faults(examined, ", ".join(str(part.source) for part in tables), on_error)
    return examined.annotations


def raise_for_faults(examined: CheckedDataset, source: str, on_error: OnError) -> None:
    """Say what was found, or stop because of it.

    Raises:
        ValueError: there are faults under `fail`, faults that cannot be repaired, or no image is left.
    """
    if on_error not in get_args(OnError):
        raise ValueError(f"data.on_error: expected {listed(get_args(OnError))}, got {on_error!r}.")
    told = [finding for finding in examined.findings if finding.severity != "note"]
    fatal = [finding for finding in told if finding.severity == "fatal"]
    errors = [finding for finding in told if finding.severity in ("fatal", "error")]
    if fatal and on_error != "fail":
        raise ValueError(
            f"{source}: expected annotations that can be repaired, got:\n{describe_findings(fatal)}\nCorrect the file."
        )
    if errors and on_error == "fail":
        raise ValueError(
            f"{source}: expected sound annotations, got {len(errors)} fault(s). Correct the file, or set "
            f"data.on_error=fix (repairs in memory) or data.on_error=skip (leaves out).\n{describe_findings(errors)}"
        )
    if told:
        outcome = "worth a look" if on_error == "fail" else "repaired in memory or left out"
        logger.warning("%s: %s:\n%s", source, outcome, describe_findings(told))
    if not len(examined.annotations):
        raise ValueError(f"{source}: expected at least one usable image, got none.\n{describe_findings(told)}")


def load_raw(
    annotations: Paths, images: Paths | None, format: Format | None = None, split: str = "train"
) -> list[RawDataset]:
    """The tables of each part, as they are in the files.

    Raises:
        ValueError: a path is not there, or is not of its format; or there is not one folder for each part.
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
        _load(source, folder, format or format_of(source), split)
        for source, folder in zip(sources, folders, strict=True)
    ]


def check_raw(
    tables: Sequence[RawDataset],
    class_names: Sequence[str] | None = None,
    subset: bool = False,
    on_error: OnError = "fail",
    inspect: ImageInspector | None = None,
) -> CheckedDataset:
    """The parts as one data set after repair. Arguments as in `read_annotations`.

    Raises:
        ValueError: the classes make no sense.
    """
    several = len(tables) > 1
    names = merge_class_names(tables) if several and class_names is None else class_names
    parts, findings, digests = [], [], []
    for part in tables:
        classes, wrong = match_classes(
            part.categories, names, subset, part.source.name, part.states_classes and not several
        )
        findings += part.findings + wrong
        pictures = check_images(part, on_error, inspect, findings)
        parts.append(check_objects(part.annotations, pictures, classes, on_error, findings))
        digests += pictures.digests
    return CheckedDataset(concatenate(parts), findings, digests)


def format_of(source: Path) -> Format:
    """What a path holds: COCO is a JSON file, CSV a table; VOC a folder of XML files, a folder with `Annotations`, or a
    list of names in `ImageSets`; YOLO a `data.yaml`, or the folder of one or of `classes.txt`.

    Raises:
        ValueError: none of them.
    """
    suffix = source.suffix.lower()
    if source.is_dir():
        if (source / "Annotations").is_dir() or (source / "ImageSets").is_dir() or any(source.glob("*.xml")):
            return "voc"
        if yolo.description(source) is not None:
            return "yolo"
        files = ", ".join(sorted(path.name for path in source.iterdir() if path.suffix in (".json", ".csv"))[:5])
        raise ValueError(
            f"{source}: expected a folder in VOC or YOLO format, got another{f' that holds {files}: name that file' if files else ''}."
        )
    if suffix in (".yaml", ".yml"):
        return "yolo"
    if suffix in (".csv", ".tsv"):
        return "csv"
    return "voc" if suffix == ".txt" else "coco"


def _load(source: Path, folder: Path | None, format: Format, split: str) -> RawDataset:
    if format == "coco":
        return coco.load(source, folder or source.parent)
    if format == "csv":
        return csv_table.load(source, folder or source.parent)
    return (voc if format == "voc" else yolo).load(source, folder, split)


def as_list(paths: Paths | None) -> list:
    """One path or several (or None), as a list."""
    return [paths] if paths is None or isinstance(paths, str | Path) else list(paths)
