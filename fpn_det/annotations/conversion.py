"""Convert data sets between COCO JSON, Pascal VOC, YOLO text files and CSV.

The source is read and checked as for training, and stays as it is. The result is a new folder with annotations and images,
which gets its name when it is complete.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal

from rich.progress import track

from fpn_det.annotations.classes import merge_class_names
from fpn_det.annotations.files import existing_path
from fpn_det.annotations.findings import Finding, OnError, describe_findings, one_line, raise_for_faults
from fpn_det.annotations.formats import coco, csv_table, voc, yolo
from fpn_det.annotations.image_inspection import inspect_images
from fpn_det.annotations.partition import divide
from fpn_det.annotations.raw import RawDataset
from fpn_det.annotations.reading import CheckedDataset, Format, check_raw
from fpn_det.annotations.splits import are_same_images, drop_images, find_overlap
from fpn_det.annotations.writers import Files, Part, as_coco, as_csv, as_voc, as_yolo, image_folder
from fpn_det.structures import Annotations
from fpn_det.terminal import SafeConsole

Pictures = Literal["link", "copy", "none"]
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # of file systems that have none
HELD_OUT = ("test", "val")  # in both, an image stays in the first; in one of them and train, it leaves train


@dataclass(frozen=True)
class ConversionConfig:
    """Settings of one conversion."""

    source: Format  # format to read
    target: Format  # format to write
    input: str  # folder of the data set; or JSON file (coco), table (csv), list (voc), data.yaml (yolo) of the training set
    output: str  # folder to make
    images: str | None = None  # folder of the images; null = where the format has them
    pictures: Pictures = "link"  # in the output: symbolic links, copies, or none, which writes annotations only
    val: str | None = (
        None  # share of the training images such as 0.1, list of names (.txt) or annotations; null = as it is
    )
    test: str | None = None  # the same for the test split
    seed: int = 0  # of the random choice of a share
    classes: list[str] | None = None  # their order; null = by id (coco), number (yolo) or name (voc, csv)
    pixel_offset: Literal[0, 1] = 1  # number of the first pixel in VOC; 1 is the standard
    on_error: OnError = "fail"  # faults of the source: refuse, repair in what is written, or leave out


@dataclass
class Conversion:
    """Result of a conversion: splits, what was found in the source, and what the output lacks."""

    splits: Mapping[str, CheckedDataset]
    findings: list[Finding]
    on_error: OnError
    remarks: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """The lines for the user, the counts last."""
        lines = [one_line(remark) for remark in self.remarks]
        reported = [finding for finding in self.findings if finding.severity != "note"]
        if reported:
            outcome = {"fail": "", "fix": ", and repaired or left out", "skip": ", and left out"}[self.on_error]
            lines.append(f"Found in the source{outcome}:\n{describe_findings(reported)}")
        for split, dataset in self.splits.items():
            annotations = dataset.annotations
            empty = int((annotations.boxes_per_image == 0).sum())
            without = f" ({empty} without objects)" if empty else ""
            lines.append(f"{split}: {len(annotations)} images{without}, {len(annotations.boxes)} objects")
            names = annotations.class_names
        return "\n".join([*lines, f"classes: {one_line(', '.join(names))}"])


def convert(config: ConversionConfig) -> Conversion:
    """Read a data set in one format and write it in another.

    Raises:
        ValueError: the output exists, the source has faults that `on_error` does not allow, or the target format cannot
            hold a name.
    """
    output = Path(os.path.abspath(os.path.expanduser(config.output)))
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output: expected a new or empty folder, got {config.output}. Choose another one.")
    raws = _read(config)
    result = _check(raws, config)
    with_images = config.pictures != "none"
    parts = {}
    for split, dataset in result.splits.items():
        names = _names(dataset.annotations, raws.get(split, raws["train"]).folder)
        parts[split] = Part(dataset.annotations, _below_common_folder(names) if with_images else names)
    if with_images or config.target in ("voc", "yolo"):
        _refuse_names_outside(parts)
    if config.target in ("voc", "yolo"):
        parts = _with_own_stems(parts, config.target)
    if config.target in ("yolo", "csv") and (
        lost := sum(int(part.annotations.iscrowd.sum()) for part in parts.values())
    ):
        result.remarks.append(f"{lost} crowd region(s), which {config.target} cannot hold, are left out.")
    writers: dict[Format, Callable[[Mapping[str, Part]], Files]] = {
        "coco": as_coco,
        "voc": partial(as_voc, pixel_offset=config.pixel_offset),
        "yolo": as_yolo,
        "csv": partial(as_csv, with_folder=with_images),
    }
    images = {
        str(image_folder(config.target, split) / name): part.annotations.path(row).resolve()
        for split, part in parts.items()
        for row, name in enumerate(part.names)
    }
    try:
        remark = _write(output, writers[config.target](parts), images if with_images else {}, config.pictures == "link")
    except UnicodeEncodeError as error:
        raise ValueError(f"output: expected names in Unicode, got {error.object!r}. Rename the file.") from None
    except OSError as error:
        raise ValueError(f"output: expected a path to write to, got {error.filename}: {error.strerror}.") from None
    result.remarks += [remark] if remark else []
    return result


def _read(config: ConversionConfig) -> dict[str, RawDataset]:
    """Load the splits of the source, and those that `val` and `test` name as annotations."""
    images = None if config.images is None else existing_path(config.images, "images")
    raws = {}
    for split, (source, folder) in _sources(config).items():
        if config.source == "voc":
            raws[split] = voc.load(source, images, split, config.pixel_offset)
        elif config.source == "yolo":
            raws[split] = yolo.load(source, images, split)
        else:
            raws[split] = (coco if config.source == "coco" else csv_table).load(source, images or folder)
    return raws


def _sources(config: ConversionConfig) -> dict[str, tuple[Path, Path | None]]:
    """The annotations of each split, and for coco and csv the folder of its images.

    Raises:
        ValueError: there is no such data set, or a split is given that it has already.
    """
    path = existing_path(config.input, "input")
    found: dict[str, tuple[Path, Path | None]]
    if config.source in ("coco", "csv"):
        # Annotations alone can be converted without the images, which are looked for where their place is known.
        beside = config.pictures != "none"
        found = {"train": (path, path.parent if beside else None)}
        if path.is_dir():
            found = dict((coco if config.source == "coco" else csv_table).find_splits(path))
        if "train" not in found:
            expected = "annotations/instances_train.json" if config.source == "coco" else "train.csv"
            raise ValueError(f"input: expected a folder with {expected}, got {config.input}. Name the file instead.")
    else:
        beside = False
        found = dict.fromkeys((voc if config.source == "voc" else yolo).find_splits(path) or ["train"], (path, None))
    for split in HELD_OUT:
        part = _held_out(config, split)
        if part is not None and split in found:
            raise ValueError(f"{split}: the data set has this split already. Leave it out, or name a list as input.")
        if isinstance(part, Path) and part.suffix != ".txt":
            found[split] = part, part.parent if beside else None
    return found


def _held_out(config: ConversionConfig, split: str) -> float | Path | None:
    """The share or the file that `val` or `test` states.

    Raises:
        ValueError: it is neither.
    """
    text = config.val if split == "val" else config.test
    if text is None:
        return None
    try:
        share = float(text)
    except ValueError:
        return existing_path(text, split)
    if not 0 < share < 1:
        raise ValueError(f"{split}: expected a share between 0 and 1 or a file, got {text}.")
    return share


def _check(raws: Mapping[str, RawDataset], config: ConversionConfig) -> Conversion:
    """Check the splits, divide the training set as asked, and see to it that no image is in two of them.

    Raises:
        ValueError: there are faults that `on_error` does not allow.
    """
    names = config.classes or merge_class_names(raws.values())
    checked = {}
    findings: list[Finding] = []
    remarks = []
    for split, raw in raws.items():
        checked[split] = check_raw(
            [raw], names, on_error=config.on_error, inspect=partial(inspect_images, pixel_format=None)
        )
        findings += checked[split].findings
    for split in HELD_OUT:
        if split in checked and are_same_images(checked["train"], checked[split]):
            remarks.append(f"{split} has the images of train and is left out; {split}=0.1 would hold out a tenth.")
            del checked[split]
    raise_for_faults(findings, config.input, config.on_error)
    parts = {split: part for split in HELD_OUT if split not in raws and (part := _held_out(config, split)) is not None}
    if parts:
        train = checked["train"]
        checked |= divide(train, _names(train.annotations, raws["train"].folder), parts, config.seed)
    for one, other in (("val", "test"), ("train", "val"), ("train", "test")):
        if one in checked and other in checked and (overlap := find_overlap(checked[one], checked[other], other)):
            findings += overlap.values()
            raise_for_faults(list(overlap.values()), one, config.on_error)
            checked[one] = drop_images(checked[one], overlap)
            if not len(checked[one].annotations):
                raise ValueError(f"{one}: expected images that {other} does not have, got none.")
    splits = {split: checked[split] for split in ("train", *reversed(HELD_OUT)) if split in checked}
    return Conversion(splits, findings, config.on_error, remarks)


def _names(annotations: Annotations, folder: Path | None) -> list[str]:
    """Names of the images relative to their folder, with forward slashes."""
    paths = [annotations.path(row) for row in range(len(annotations))]
    return [(path if folder is None else Path(os.path.relpath(path, folder))).as_posix() for path in paths]


def _below_common_folder(names: list[str]) -> list[str]:
    """Names without the folders that all of them begin with."""
    folders = [PurePosixPath(name).parent.parts for name in names]
    depths = range(min(map(len, folders)), 0, -1)
    common = next((depth for depth in depths if len({folder[:depth] for folder in folders}) == 1), 0)
    return [PurePosixPath(*PurePosixPath(name).parts[common:]).as_posix() for name in names]


def _refuse_names_outside(parts: Mapping[str, Part]) -> None:
    """Refuse names that are absolute or climb out of the folder of the images."""
    for part in parts.values():
        for name in part.names:
            if name.startswith("/") or ".." in PurePosixPath(name).parts:
                raise ValueError(
                    f"images: expected images inside one folder, got {one_line(name)}, which would be outside of the "
                    "output. Set images to the folder of the images."
                )


def _with_own_stems(parts: Mapping[str, Part], target: Format) -> dict[str, Part]:
    """Splits whose images have names that differ not only by their ending, which the annotations of VOC and YOLO lack.

    VOC has one folder for all splits: the same names in several splits get a subfolder for each.

    Raises:
        ValueError: two images of a split differ by their ending only.
    """
    owners: dict[str, dict[str, str]] = {}
    for split, part in parts.items():
        owner = owners[split] = {}
        for name in part.names:
            stem = PurePosixPath(name).with_suffix("").as_posix()
            if stem in owner:
                raise ValueError(
                    f"{split}: expected a name of its own for each image, got '{one_line(stem)}' more than once: "
                    f"{one_line(owner[stem])} and {one_line(name)}. {target} ignores the ending: rename one."
                )
            owner[stem] = name
    num_stems = len({stem for owner in owners.values() for stem in owner})
    if target == "yolo" or num_stems == sum(map(len, owners.values())):
        return dict(parts)
    return {split: Part(part.annotations, [f"{split}/{name}" for name in part.names]) for split, part in parts.items()}


def _write(output: Path, files: Files, images: Mapping[str, Path], link: bool) -> str:
    """Write a folder beside the output and give it that name when it is complete; an interruption leaves nothing.

    Args:
        output: folder that does not exist or is empty.
        files: texts by relative path.
        images: source of each image by its relative path in the output.
        link: place symbolic links, or copies where the file system has none.

    Returns:
        A remark about copies in place of links, or nothing.
    """
    unfinished = output.with_name(f".{output.name}.unfinished")
    remark = ""
    try:
        shutil.rmtree(unfinished, ignore_errors=True)  # of a conversion that was killed
        unfinished.mkdir(parents=True)
        for name, text in files.items():
            path = unfinished / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode())  # not in the line ends and encoding of the system
        console = SafeConsole(stderr=True)
        for name, source in track(
            images.items(), "placing images", console=console, transient=True, disable=not console.is_terminal
        ):
            path = unfinished / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if link:
                try:
                    path.symlink_to(source)
                    continue
                except OSError as error:
                    if error.errno not in NO_LINKS:
                        raise
                link, remark = False, f"Images are copied: links are not possible in {output.parent}."
            shutil.copyfile(source, path)
        unfinished.rename(output)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return remark
