"""Pascal VOC: one XML file per image.

VOC numbers pixels from 1 and `xmax` is the last one inside, so x1 = xmin - 1 and x2 = xmax. Many tools write corners as
they are; a corner of 0 shows this.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path

from fpn_det.annotations.files import (
    FolderListings,
    near_matches,
    non_empty_lines,
    read_file,
    walk_files,
)
from fpn_det.annotations.findings import Finding
from fpn_det.annotations.parsing import parse_number, parse_pixels
from fpn_det.annotations.raw import SPLIT_ALIASES, RawDataset, split_aliases
from fpn_det.image_io import IMAGE_SUFFIXES, image_size

SIDES = ("xmin", "ymin", "xmax", "ymax")
ANNOTATION_FOLDERS = ("Annotations", "annotations", "annots", "xmls")
IMAGE_FOLDERS = ("JPEGImages", "images", "imgs")
LIST_FOLDERS = ("ImageSets/Main", "ImageSets")
MAX_XML_BYTES = 64 << 20

DECLARATION = re.compile(rb"\s*<\?xml[^>]*?encoding\s*=\s*[\"']([A-Za-z0-9._-]+)[\"'][^>]*\?>")
# VOC's lists of one class: the name, and whether the image shows it.
CLASS_FLAG = re.compile(r"(.*\S)\s+(-1|0|1)")


def load(source: Path, folder: Path | None, split: str, pixel_offset: int | None = None) -> RawDataset:
    """Load the images of a split. The classes are those of all XML files, by name, so all splits agree.

    Args:
        source: a list of names (`ImageSets/Main/train.txt`); a folder of XML files; or a folder that holds
            `Annotations` and maybe `ImageSets`, or a folder of XML files for each split.
        folder: of the images; None is `JPEGImages` beside the XML files, or their folder.
        split: list or folder to read, if `source` has several.
        pixel_offset: number of the first pixel; None determines it from the corners of all files.

    Raises:
        ValueError: there is no XML file, or no list of the split where there are lists; says what was looked for.
    """
    root, is_split_folder = _find_root(source, split)
    xml_folder = _find_xml_folder(root)
    parsed: dict[str, ElementTree.Element | None] = {}
    list_file = None if is_split_folder else _find_list(source, root, split)
    raw = RawDataset(source, None, lists_classes=False)
    raw.image_list = str(root) if is_split_folder else None if list_file is None else str(list_file)
    raw.folder = folder = folder or _find_image_folder(xml_folder)
    for path in walk_files(xml_folder):
        if path.suffix.lower() == ".xml":
            parsed[path.relative_to(xml_folder).with_suffix("").as_posix()] = _parse(path, raw)
    if not parsed:
        raise ValueError(
            f"{source}: expected XML files in {xml_folder}, got none. "
            f"Name the folder that holds {' or '.join(ANNOTATION_FOLDERS)}."
        )
    elements = [element for element in parsed.values() if element is not None]
    names = sorted({_text(name) for element in elements for name in element.iterfind("object/name")} - {""})
    category_of = {name: number for number, name in enumerate(names, start=1)}
    raw.categories.extend({"id": number, "name": name} for name, number in category_of.items())
    offset = _detect_pixel_offset(elements) if pixel_offset is None else pixel_offset
    listings = FolderListings()
    for stem in list(parsed) if list_file is None else _read_list(list_file, parsed):
        element = parsed.get(stem)
        if element is None:
            if stem not in parsed:
                message = f"expected its file {xml_folder / stem}.xml, got none"
                raw.findings.append(Finding("annotation_file_missing", message, file_name=stem))
            continue
        name = _find_image(element, stem, folder, parsed, listings, raw)
        if name is None:
            continue
        size = [parse_pixels(_text(element.find(f"size/{side}"))) for side in ("height", "width")]
        image = raw.add_image(name, (size[0], size[1]) if all(size) else image_size(folder / name))
        for number, item in enumerate(element.iter("object"), start=1):
            stated = [_text(item.find(f"bndbox/{side}")) for side in SIDES]
            corners = list(map(parse_number, stated))
            is_difficult = _text(item.find("difficult")).lower() in ("1", "true", "yes")
            where = f"{stem}.xml object {number}"
            category_id = category_of.get(_text(item.find("name")))
            raw.add_box(image, category_id, corners, where, offset, is_difficult, stated)
    return raw


def is_voc(folder: Path) -> bool:
    """True if a folder has the layout of VOC."""
    names = {path.name for path in folder.iterdir()}
    if "ImageSets" in names or any(name.lower().endswith(".xml") for name in names):
        return True
    split_folders = [name for split in SPLIT_ALIASES for name in split_aliases(split)]
    return any(name in names and _has_xml(folder / name) for name in (*ANNOTATION_FOLDERS, *split_folders))


def find_splits(source: Path) -> list[str]:
    """Return the splits that `load` finds in a folder, by their lists or folders; empty if all XML files are one set."""
    if source.is_file():
        return []
    lists = [source / name for name in LIST_FOLDERS if (source / name).is_dir()]

    def exists(split: str) -> bool:
        names = split_aliases(split)
        if lists:
            return any((folder / f"{name}.txt").is_file() for folder in lists for name in names)
        return any(_has_xml(source / name / inner) for name in names for inner in ("", *ANNOTATION_FOLDERS))

    return [split for split in SPLIT_ALIASES if exists(split)]


def _has_xml(folder: Path) -> bool:
    return folder.is_dir() and any(path.suffix.lower() == ".xml" for path in walk_files(folder))


def _find_root(source: Path, split: str) -> tuple[Path, bool]:
    """Return the folder that holds XML files or their folder, and whether it is one of several, one for each split."""
    if not source.is_dir():
        for parent in source.parents[:4]:
            if any((parent / name).is_dir() for name in ANNOTATION_FOLDERS):
                return parent, False
        return source.parent, False
    for alias in split_aliases(split):
        if any(_has_xml(source / alias / inner) for inner in ("", *ANNOTATION_FOLDERS)):
            return source / alias, True
    others = [name for other in ("train", "val", "test") for name in split_aliases(other) if _has_xml(source / name)]
    if others and not any((source / name).is_dir() for name in ("ImageSets", *ANNOTATION_FOLDERS)):
        expected = " or ".join(split_aliases(split))
        raise ValueError(
            f"{source}: expected a folder {expected} with XML files, got {', '.join(others)}. "
            f"Name the folder as data.{split}.annotations."
        )
    return source, False


def _find_xml_folder(root: Path) -> Path:
    candidates = [root / name for name in ANNOTATION_FOLDERS if (root / name).is_dir()]
    return next((path for path in candidates if _has_xml(path)), candidates[0] if candidates else root)


def _find_image_folder(xml_folder: Path) -> Path:
    """Return JPEGImages beside the XML files, or their own folder if it holds images, or another folder beside them."""
    beside = [xml_folder.parent / name for name in IMAGE_FOLDERS if (xml_folder.parent / name).is_dir()]
    if beside and beside[0].name == IMAGE_FOLDERS[0]:
        return beside[0]
    holds_images = any(path.suffix.lower() in IMAGE_SUFFIXES for path in xml_folder.iterdir())
    return beside[0] if beside and not holds_images else xml_folder


def _find_list(source: Path, root: Path, split: str) -> Path | None:
    """Return the file that lists the images; None for all XML files of a folder without lists.

    Raises:
        ValueError: there are lists, but none of the split.
    """
    if source.is_file():
        return source
    folders = [root / name for name in LIST_FOLDERS if (root / name).is_dir()]
    for folder in folders:
        for name in split_aliases(split):
            if (folder / f"{name}.txt").is_file():
                return folder / f"{name}.txt"
    if not folders:
        return None
    known = sorted(path.stem for folder in folders for path in folder.glob("*.txt"))
    near = near_matches(split, known) or known[:5]
    raise ValueError(
        f"{folders[0]}: expected the list {split}.txt, got none of that name. "
        f"Name one as data.{split}.annotations: {', '.join(near) or 'there are no lists'}."
    )


def _read_list(file: Path, parsed: Iterable[str]) -> list[str]:
    """Names of a list without endings and flags; names may hold blanks, so a flag is only recognized if the whole line is no name.

    Raises:
        ValueError: the list is empty.
    """
    known = set(parsed)
    by_name = {stem.rpartition("/")[2]: stem for stem in known}
    stems = []
    for line in non_empty_lines(file):
        flagged = CLASS_FLAG.fullmatch(line)
        candidates = [text for name in (line, flagged and flagged[1]) if name for text in _spellings(name)]
        stem = next((text for text in candidates if text in known), None)
        if stem is None:
            stem = next((by_name[text] for c in candidates if (text := c.rpartition("/")[2]) in by_name), None)
        stems.append(stem or candidates[-1])
    if not stems:
        raise ValueError(
            f"{file}: expected a name in each line, got an empty list. Write the names of the split into it."
        )
    return stems


def _spellings(name: str) -> list[str]:
    """A name of a list as it is, and without the ending of an image or XML file."""
    name = name.replace("\\", "/").removeprefix("./")
    stem, dot, suffix = name.rpartition(".")
    return [name, stem] if dot and f".{suffix.lower()}" in IMAGE_SUFFIXES | {".xml"} else [name]


def _parse(path: Path, raw: RawDataset) -> ElementTree.Element | None:
    """The root element; None for a file that cannot be read, which is reported."""
    try:
        content = read_file(path, MAX_XML_BYTES)
        declared = DECLARATION.match(content)
        if declared and declared[1].lower() not in (b"utf-8", b"utf8", b"utf-16", b"us-ascii", b"iso-8859-1"):
            # The parser supports few encodings; Python supports all.
            text = content[declared.end() :].decode(declared[1].decode("ascii"))
            element = ElementTree.fromstring(text)
        else:
            element = ElementTree.fromstring(content)
        if element.tag != "annotation" and all(element.find(tag) is None for tag in ("object", "size", "filename")):
            raise ValueError(f"the element <{element.tag[:40]}>")
    except (ElementTree.ParseError, ValueError, LookupError, RecursionError, MemoryError) as error:
        reason = str(error).removeprefix(f"{path}: ") or type(error).__name__
        message = f"expected XML with the element <annotation>, got {reason}; its image is left out"
        raw.findings.append(Finding("annotation_file_unreadable", message, file_name=path.name))
        return None
    return element


def _text(element: ElementTree.Element | None) -> str:
    return (element.text or "").strip() if element is not None else ""


def _detect_pixel_offset(elements: list[ElementTree.Element]) -> int:
    starts = [
        parse_number(_text(start))
        for element in elements
        for side in SIDES[:2]
        for start in element.iterfind(f"object/bndbox/{side}")
    ]
    below, first = (sum(low <= start < low + 1 for start in starts) for low in (0, 1))
    return int(below <= first)  # objects at the border begin at the first pixel, whatever its number


def _find_image(
    element: ElementTree.Element,
    stem: str,
    folder: Path,
    parsed: Iterable[str],
    listings: FolderListings,
    raw: RawDataset,
) -> str | None:
    """Return the file name of an image, relative to the folder; None if it is ambiguous, which is reported.

    The image with the name of the XML file comes before the one that `<filename>` states: copied XML files often keep
    the name of another image.
    """
    stated = _text(element.find("filename")).replace("\\", "/")
    inner, _, base = stem.rpartition("/")
    prefix = f"{inner}/" if inner else ""
    own = [f"{prefix}{name}" for name in _images_with_stem(folder / inner, base, listings)]
    if not own and inner:  # images of XML subfolders in one folder
        own = _images_with_stem(folder, base, listings)
    if own:
        named = [name for name in own if stated in (name, name.rpartition("/")[2])]
        if len(own) > 1 and not named:
            message = f"expected one image named {base}, got {', '.join(own)}; <filename> names none of them; left out"
            raw.findings.append(Finding("image_file_ambiguous", message, file_name=f"{stem}.xml"))
            return None
        name = (named or own)[0]
        if not named and stated and listings.has(str(folder / stated)):
            message = f"<filename> names {stated}, which exists too; the annotations are taken as those of {name}"
            raw.findings.append(Finding("file_name_differs", message, "warning", file_name=f"{stem}.xml"))
        return name
    if stated and listings.has(str(folder / stated)):
        if stated.rpartition(".")[0] in parsed:
            message = f"<filename> names {stated}, which has an XML file of its own; left out"
            raw.findings.append(Finding("image_file_missing", message, file_name=f"{stem}.xml"))
            return None
        return stated
    return stated or f"{stem}.jpg"


def _images_with_stem(folder: Path, stem: str, listings: FolderListings) -> list[str]:
    names = listings.with_stem(folder, stem)
    return [name for name in names if "." in name and not name.lower().endswith((".xml", ".txt", ".json"))]
