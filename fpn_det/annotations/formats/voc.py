"""Pascal VOC: an XML file for each picture.

VOC counts pixels from 1 and `xmax` is the last one inside, so x1 = xmin - 1 and x2 = xmax. Many tools write the corners
as they are, and a 0 among them gives them away.
"""

from __future__ import annotations

import glob
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from fpn_det.annotations.findings import Finding, near_matches
from fpn_det.annotations.raw import RawDataset, parse_number, parse_pixels, read_text, split_aliases
from fpn_det.image_io import image_size

SIDES = ("xmin", "ymin", "xmax", "ymax")


def load(source: Path, folder: Path | None, split: str, pixel_offset: int | None = None) -> RawDataset:
    """The pictures of a split. The classes are those of all XML files beside each other, by name, so that all splits agree.

    Args:
        source: the list of a split (`ImageSets/Main/train.txt`); a folder of XML files; or the folder that holds
            `Annotations` and maybe `ImageSets`, or a folder of XML files for each split.
        folder: of the pictures; None is `JPEGImages`, or where the XML files are.
        split: which list to read, if `source` is a folder with lists.
        pixel_offset: number of the first pixel; None decides by the corners of all files.

    Raises:
        ValueError: there is no XML file, or no such list.
    """
    root = source.parents[2] if source.is_file() and len(source.parents) > 2 else source
    root = next((inner for name in split_aliases(split) if any((inner := root / name).glob("*.xml"))), root)
    files_in = root / "Annotations" if (root / "Annotations").is_dir() else root if source.is_dir() else source.parent
    pictures = files_in.parent / "JPEGImages"
    folder = folder or (pictures if pictures.is_dir() else files_in)
    tables = RawDataset(source, folder, [], [], [], states_classes=False)
    parsed: dict[str, ElementTree.Element | None] = {
        path.stem: _parse(path, tables) for path in sorted(files_in.glob("*.xml"))
    }
    if not parsed:
        raise ValueError(
            f"{source}: expected XML files in {files_in}, got none. Name the folder that holds Annotations."
        )
    category_of = _categories(parsed, tables)
    offset = _pixel_offset(parsed) if pixel_offset is None else pixel_offset
    for stem in _stems(source, root, split) or list(parsed):
        path = files_in / f"{stem}.xml"
        element = parsed.get(stem)
        if element is None:
            if stem not in parsed:
                tables.findings.append(
                    Finding("annotation_file_missing", f"expected its file {path}, got none", file_name=stem)
                )
            continue
        name = _picture(element, stem, folder)
        size = [parse_pixels(element.findtext(f"size/{side}", "").strip()) for side in ("height", "width")]
        height, width = size if all(size) else image_size(folder / name) or size
        image = {"id": len(tables.images) + 1, "file_name": name, "height": height, "width": width}
        tables.images.append(image)
        for number, item in enumerate(element.iter("object"), start=1):
            category_id = category_of.get((item.findtext("name") or "").strip())
            corners = [parse_number((item.findtext(f"bndbox/{side}") or "").strip()) for side in SIDES]
            difficult = (item.findtext("difficult") or "").strip() == "1"
            tables.add_box(image, category_id, corners, f"{path.name} object {number}", offset, int(difficult))
    return tables


def _parse(path: Path, tables: RawDataset) -> ElementTree.Element | None:
    try:
        return ElementTree.fromstring(path.read_bytes())
    except (OSError, ElementTree.ParseError, ValueError) as error:
        tables.findings.append(
            Finding(
                "annotation_file_unreadable", f"expected XML, got {error}; its picture is left out", file_name=path.name
            )
        )
        return None


def _categories(parsed: dict[str, ElementTree.Element | None], tables: RawDataset) -> dict[str, int]:
    elements = [element for element in parsed.values() if element is not None]
    names = sorted(
        {(name.text or "").strip() for element in elements for name in element.iterfind("object/name")} - {""}
    )
    tables.categories.extend({"id": number, "name": name} for number, name in enumerate(names, start=1))
    return {name: number for number, name in enumerate(names, start=1)}


def _pixel_offset(parsed: dict[str, ElementTree.Element | None]) -> int:
    elements = [element for element in parsed.values() if element is not None]
    starts = [
        parse_number((start.text or "").strip())
        for element in elements
        for side in SIDES[:2]
        for start in element.iterfind(f"object/bndbox/{side}")
    ]
    below, first = (sum(low <= start < low + 1 for start in starts) for low in (0, 1))
    return int(below <= first)  # objects at the border begin at the first pixel, whatever its number


def _stems(source: Path, root: Path, split: str) -> list[str]:
    """The names of a list; none where there are no lists."""
    lists = root / "ImageSets" / "Main"
    file = source if source.is_file() else lists / f"{split}.txt"
    if source.is_dir() and not lists.is_dir():
        return []
    if not file.is_file():
        known = sorted(path.stem for path in lists.glob("*.txt"))
        near = near_matches(split, known) or known[:5]
        raise ValueError(
            f"{lists}: expected the list {split}.txt, got none of that name. Name one as data.{split}.annotations: {', '.join(near)}."
        )
    return [line.split()[0] for line in read_text(file).splitlines() if line.strip()]


def _picture(element: ElementTree.Element, stem: str, folder: Path) -> str:
    """The name of a picture, relative to the folder: as stated, or else any of the same stem."""
    stated = (element.findtext("filename") or "").strip()
    if stated and (folder / stated).is_file():
        return stated
    candidates = sorted(path.name for path in folder.glob(f"{glob.escape(stem)}.*") if path.suffix.lower() != ".xml")
    return candidates[0] if candidates else stated or f"{stem}.jpg"
