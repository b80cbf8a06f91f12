"""Carry annotations from one format to another: COCO JSON, Pascal VOC, YOLO text files, CSV.

Every reader makes, and every writer takes, a list of `Picture`: boxes in continuous px, xyxy, pixel i covering
[i, i + 1). Pictures stay where they are; their names are relative to the folder that holds them.

What is written can be trained on: an object without area is left out, one that reaches outside its picture is cut, and
each such case is printed. Anything worse (a missing picture, an unknown class, a number that is none) ends the
conversion with the name of the file. Crowd regions are COCO's alone; VOC keeps them as `difficult`, which is nearest in
meaning, YOLO and CSV leave them out.

    python datasets/convert.py voc coco --input VOC2007 --split train --output VOC2007/train.json
    python datasets/convert.py coco yolo --input instances_train.json --split train --output yolo
"""

from __future__ import annotations

import argparse
import csv
import glob
import json
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from PIL import Image

FORMATS = ("coco", "voc", "yolo", "csv")
CSV_COLUMNS = ("file", "width", "height", "x1", "y1", "x2", "y2", "class")
PICTURE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
EXIF_ORIENTATION = 0x0112
ROUNDING = 0.1  # px that a box may reach outside for having been written with few digits

Box = tuple[float, float, float, float]


@dataclass
class Object:
    """Something drawn on a picture."""

    class_name: str
    box: Box  # xyxy, px
    crowd: bool = False


@dataclass
class Picture:
    """One picture's annotations."""

    file: str  # relative to the folder of the pictures
    size: tuple[int, int]  # (h, w) as shown, that is after the EXIF rotation
    objects: list[Object] = field(default_factory=list)

    def add(self, where: str, class_name: str, box: Box, crowd: bool = False) -> None:
        """Append an object, cut to the picture; `where` names its file and number in what is printed."""
        if not all(map(math.isfinite, box)):
            raise ValueError(f"{where}: expected a box of finite numbers, got {box}. Correct it.")
        (x1, y1, x2, y2), (height, width) = box, self.size
        inside = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
        span = f"x {x1:g}..{x2:g}, y {y1:g}..{y2:g}"
        if x1 >= x2 or y1 >= y2:
            print(f"{where}: {class_name} has no area ({span}); left out.")
        elif inside[0] >= inside[2] or inside[1] >= inside[3]:
            print(f"{where}: {class_name} is outside the {width}x{height} picture ({span}); left out.")
        else:
            if max(abs(new - old) for new, old in zip(inside, box, strict=True)) > ROUNDING:
                print(f"{where}: {class_name} reaches outside the {width}x{height} picture ({span}); cut.")
            self.objects.append(Object(class_name, inside, crowd))


def _number(text: Any, where: str) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: expected a number, got {text!r}. Correct it.") from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{path}: expected a file, got none. Check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a readable text file, got {error}.") from error


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def picture_size(path: Path) -> tuple[int, int]:
    """(h, w) of a picture as shown, after the EXIF rotation; reads the header only."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(EXIF_ORIENTATION, 1) >= 5
    except FileNotFoundError:
        raise ValueError(f"{path}: expected a picture, got no such file. Check the folder.") from None
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for broken headers
        raise ValueError(f"{path}: expected a picture, got {error}. Replace or remove the file.") from error
    return (width, height) if turned else (height, width)


def _without_crowd(pictures: Sequence[Picture], target: str) -> list[Picture]:
    kept = [replace(picture, objects=[item for item in picture.objects if not item.crowd]) for picture in pictures]
    for picture, rest in zip(pictures, kept, strict=True):
        if lost := len(picture.objects) - len(rest.objects):
            print(f"{picture.file}: {lost} crowd region(s), which {target} cannot say; left out.")
    return kept


def read_coco(path: Path) -> tuple[list[Picture], tuple[str, ...]]:
    """The pictures of a COCO file, and its class names in the order of their ids."""
    try:
        content = json.loads(_read_text(path))
        names = {row["id"]: row["name"] for row in sorted(content["categories"], key=lambda row: row["id"])}
        pictures = {row["id"]: Picture(row["file_name"], (int(row["height"]), int(row["width"]))) for row in content["images"]}
        for row in content["annotations"]:
            where = f"{path.name}: annotation {row['id']}"
            if row["image_id"] not in pictures or row["category_id"] not in names:
                raise ValueError(f"{where}: expected known ids, got image {row['image_id']}, category {row['category_id']}. Correct it.")
            if len(row["bbox"]) != 4:
                raise ValueError(f"{where}: expected 4 numbers, got {row['bbox']}. Correct it.")
            x, y, width, height = (_number(value, where) for value in row["bbox"])
            pictures[row["image_id"]].add(where, names[row["category_id"]], (x, y, x + width, y + height), bool(row.get("iscrowd", 0)))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, got {error}.") from error
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected COCO's images, annotations and categories, got a file that lacks some: {error}.") from error
    return list(pictures.values()), tuple(names.values())


def write_coco(pictures: Sequence[Picture], class_names: Sequence[str], path: Path) -> None:
    """One JSON file; ids count from 1, in the order given. An object's area is that of its box."""
    category_ids = {name: number for number, name in enumerate(class_names, start=1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, picture in enumerate(pictures, start=1):
        height, width = picture.size
        images.append({"id": image_id, "file_name": picture.file, "height": height, "width": width})
        for item in picture.objects:
            x1, y1, x2, y2 = item.box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_ids[item.class_name],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": int(item.crowd),
                }
            )
    categories = [{"id": number, "name": name} for name, number in category_ids.items()]
    _write_text(path, json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def _voc_root(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except FileNotFoundError:
        raise ValueError(f"{path}: expected a file, got none. Correct the list of the split or add it.") from None
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}: expected XML, got {error}. Correct or remove the file.") from error


def _voc_picture(path: Path, images: Path, pixel_offset: int) -> Picture:
    """One XML file's annotations. The size is that of the picture; another one in the file is refused."""
    root = _voc_root(path)
    named = images / (root.findtext("filename") or "")
    candidates = [named] if named.is_file() else sorted(images.glob(f"{glob.escape(path.stem)}.*"))
    if not candidates:
        raise ValueError(f"{path}: expected its picture in {images}, got none named {named.name} or {path.stem}.*. Check the folder.")
    height, width = picture_size(candidates[0])
    stated = tuple(int(_number(root.findtext(f"size/{side}") or 0, f"{path}: size")) for side in ("height", "width"))
    if stated not in ((height, width), (0, 0)):
        raise ValueError(f"{path}: expected the picture's size {width}x{height}, got {stated[1]}x{stated[0]}. Correct one of them.")
    picture = Picture(candidates[0].name, (height, width))
    for number, item in enumerate(root.iter("object"), start=1):
        where = f"{path}: object {number}"
        x1, y1, x2, y2 = (_number(item.findtext(f"bndbox/{side}"), where) for side in ("xmin", "ymin", "xmax", "ymax"))
        if not (name := (item.findtext("name") or "").strip()):
            raise ValueError(f"{where}: expected a name, got none. Correct it.")
        if x1 < x2 and y1 < y2:  # equal corners are a slip of the mouse, not an object one pixel wide
            x1, y1 = x1 - pixel_offset, y1 - pixel_offset
        picture.add(where, name, (x1, y1, x2, y2), item.findtext("difficult") == "1")
    return picture


def read_voc(folder: Path, split: str, images: Path, pixel_offset: int = 1) -> tuple[list[Picture], tuple[str, ...]]:
    """The pictures listed for a split, and the sorted class names of the whole folder, so that all splits agree.

    The list is `ImageSets/Main/<split>.txt`, each entry has an `Annotations/<entry>.xml`.

    Args:
        pixel_offset: 1 where the first pixel is number 1 and `xmax` the last one inside, as in the original VOC;
            0 where the numbers are continuous already.
    """
    lines = _read_text(folder / "ImageSets" / "Main" / f"{split}.txt").splitlines()
    stems = [line.split()[0] for line in lines if line.strip()]
    pictures = [_voc_picture(folder / "Annotations" / f"{stem}.xml", images, pixel_offset) for stem in stems]
    files = sorted((folder / "Annotations").glob("*.xml"))
    return pictures, tuple(sorted({(name.text or "").strip() for path in files for name in _voc_root(path).iterfind("object/name")}))


def write_voc(pictures: Sequence[Picture], folder: Path, split: str, pixel_offset: int = 1) -> None:
    """XML files and the list of a split; fractions of a pixel are kept."""
    stems = [Path(picture.file).stem for picture in pictures]
    if len(set(stems)) < len(stems):
        twice = max(stems, key=stems.count)
        raise ValueError(f"{folder}: expected a name of its own for each picture, got '{twice}' more than once. VOC knows no folders: rename some.")
    for stem, picture in zip(stems, pictures, strict=True):
        root = ElementTree.Element("annotation")
        ElementTree.SubElement(root, "filename").text = Path(picture.file).name
        size = ElementTree.SubElement(root, "size")
        for tag, value in zip(("width", "height", "depth"), (picture.size[1], picture.size[0], 3), strict=True):
            ElementTree.SubElement(size, tag).text = str(value)
        for item in picture.objects:
            element = ElementTree.SubElement(root, "object")
            ElementTree.SubElement(element, "name").text = item.class_name
            ElementTree.SubElement(element, "difficult").text = str(int(item.crowd))
            corners = ElementTree.SubElement(element, "bndbox")
            x1, y1, x2, y2 = item.box
            for tag, side in zip(("xmin", "ymin", "xmax", "ymax"), (x1 + pixel_offset, y1 + pixel_offset, x2, y2), strict=True):
                ElementTree.SubElement(corners, tag).text = f"{side:.12g}"
        ElementTree.indent(root)
        _write_text(folder / "Annotations" / f"{stem}.xml", ElementTree.tostring(root, encoding="unicode") + "\n")
    _write_text(folder / "ImageSets" / "Main" / f"{split}.txt", "".join(f"{stem}\n" for stem in stems))


def _yolo_names(folder: Path) -> tuple[str, ...]:
    """The class names in the order of their numbers, from data.yaml or, without it, classes.txt."""
    path = folder / "data.yaml"
    if not path.exists():
        return tuple(line.strip() for line in _read_text(folder / "classes.txt").splitlines() if line.strip())
    try:
        names = yaml.safe_load(_read_text(path))["names"]
        names = [names[number] for number in range(len(names))]  # a list, or a table from 0
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected 'names' as a list or a table that counts from 0, got {error}.") from error
    return tuple(str(name) for name in names)


def read_yolo(folder: Path, images: Path) -> tuple[list[Picture], tuple[str, ...]]:
    """The pictures of `images`, a path with a part of that name; their labels are where it says `labels` instead.

    A line is `class cx cy w h`: the number of a class, the rest as parts of the picture's sides. A picture without
    a label file has no objects.
    """
    names = _yolo_names(folder)
    parts = list(images.parts)
    if "images" not in parts:
        raise ValueError(f"{images}: expected a path with a folder 'images', got none. YOLO finds labels by that word.")
    parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    labels = Path(*parts)
    if not images.is_dir() or not labels.is_dir():
        raise ValueError(f"{folder}: expected the folders {images} and {labels}, got only one or none of them. Check the split.")
    files = sorted(path for path in images.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
    known = {path.relative_to(images).with_suffix("") for path in files}
    texts = sorted(path for path in labels.rglob("*.txt") if path.name != "classes.txt")
    lonely = [path for path in texts if path.relative_to(labels).with_suffix("") not in known]
    if lonely:
        raise ValueError(f"{lonely[0]}: expected its picture in {images}, got none (so for {len(lonely)} label files).")
    pictures = []
    for file in files:
        picture = Picture(file.relative_to(images).as_posix(), picture_size(file))
        height, width = picture.size
        path = labels / file.relative_to(images).with_suffix(".txt")
        for number, line in enumerate(_read_text(path).splitlines() if path.exists() else [], start=1):
            where = f"{path}: line {number}"
            values = [_number(value, where) for value in line.split()]
            if not values:
                continue
            if len(values) != 5 or values[0] not in range(len(names)):
                raise ValueError(f"{where}: expected a class below {len(names)} and 4 numbers, got '{line}'. Correct it.")
            label, x, y, w, h = values
            box = ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
            picture.add(where, names[int(label)], box)
        pictures.append(picture)
    return pictures, names


def write_yolo(pictures: Sequence[Picture], class_names: Sequence[str], folder: Path, split: str) -> None:
    """A label file per picture, and data.yaml, which a second split extends."""
    labels = {name: number for number, name in enumerate(class_names)}
    described = folder / "data.yaml"
    content: dict[str, Any] = {"path": "."}
    if described.exists():
        if _yolo_names(folder) != tuple(class_names):
            raise ValueError(f"{described}: expected the classes {', '.join(class_names)}, got others. Give --classes or another --output.")
        content = yaml.safe_load(_read_text(described))
    for picture in _without_crowd(pictures, "YOLO"):
        height, width = picture.size
        rows = []
        for item in picture.objects:
            x1, y1, x2, y2 = item.box
            center_and_sides = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
            rows.append(" ".join([str(labels[item.class_name]), *(f"{value:.12g}" for value in center_and_sides)]) + "\n")
        _write_text((folder / "labels" / split / picture.file).with_suffix(".txt"), "".join(rows))
    content |= {split: f"images/{split}", "names": dict(enumerate(class_names))}
    _write_text(described, yaml.safe_dump(content, sort_keys=False))


def read_csv(path: Path) -> tuple[list[Picture], tuple[str, ...]]:
    """The pictures of a table with the columns CSV_COLUMNS, a line per object, and its sorted class names.

    A picture without objects has one line, empty from x1 on.
    """
    reader = csv.DictReader(_read_text(path).splitlines())
    missing = [name for name in CSV_COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(f"{path}: expected the columns {', '.join(CSV_COLUMNS)}, got none named {', '.join(missing)}. Add a first line.")
    pictures: dict[str, Picture] = {}
    for row in reader:
        where = f"{path}: line {reader.line_num}"
        size = (int(_number(row["height"], where)), int(_number(row["width"], where)))
        picture = pictures.setdefault(row["file"], Picture(row["file"], size))
        if picture.size != size:
            raise ValueError(f"{where}: expected the same size as before for {row['file']}, got {size[1]}x{size[0]}. Correct it.")
        if row["class"] or row["x1"]:
            x1, y1, x2, y2 = (_number(row[side], where) for side in ("x1", "y1", "x2", "y2"))
            picture.add(where, row["class"], (x1, y1, x2, y2))
    return list(pictures.values()), tuple(sorted({item.class_name for picture in pictures.values() for item in picture.objects}))


def write_csv(pictures: Sequence[Picture], path: Path) -> None:
    """One table, with a line of column names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        for picture in _without_crowd(pictures, "CSV"):
            start = (picture.file, picture.size[1], picture.size[0])
            writer.writerows((*start, *item.box, item.class_name) for item in picture.objects)
            if not picture.objects:
                writer.writerow((*start, *[""] * 5))


def read(source: str, path: Path, split: str | None, images: Path | None, pixel_offset: int) -> tuple[list[Picture], tuple[str, ...]]:
    """Pictures and class names of data in the format `source`; the folders that are not given are those of the format."""
    if source == "coco":
        return read_coco(path)
    if source == "csv":
        return read_csv(path)
    if source == "yolo":
        return read_yolo(path, images or path / "images" / (split or ""))
    return read_voc(path, split or "train", images or path / "JPEGImages", pixel_offset)


def write(target: str, pictures: Sequence[Picture], class_names: Sequence[str], path: Path, split: str | None, pixel_offset: int) -> None:
    """Write pictures as the format `target`."""
    if target == "coco":
        write_coco(pictures, class_names, path)
    elif target == "csv":
        write_csv(pictures, path)
    elif target == "yolo":
        write_yolo(pictures, class_names, path, split or "train")
    else:
        write_voc(pictures, path, split or "train", pixel_offset)


def order_classes(pictures: Iterable[Picture], found: Sequence[str], wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The names in the order wanted, or as found; refuses an order that lacks the class of an object."""
    if wanted is None:
        return tuple(found)
    for picture in pictures:
        for item in picture.objects:
            if item.class_name not in wanted:
                near = get_close_matches(item.class_name, wanted, n=1)
                hint = f"Is it '{near[0]}'?" if near else "Add it."
                raise ValueError(f"{picture.file}: expected one of the classes {', '.join(wanted)}, got '{item.class_name}'. {hint}")
    return tuple(wanted)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Convert annotations between formats.", epilog="See datasets/README.md.")
    parser.add_argument("source", choices=FORMATS)
    parser.add_argument("target", choices=FORMATS)
    parser.add_argument("--input", type=Path, required=True, help="file (coco, csv) or folder (voc, yolo)")
    parser.add_argument("--output", type=Path, required=True, help="the same, to write")
    parser.add_argument("--split", help="which list (voc; default train) or folder below images (yolo; default all) to read; its name to write")
    parser.add_argument("--images", type=Path, help="where the pictures to read are (voc, yolo), if not where the format says")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="their order; else by id (coco), number (yolo), name (voc, csv)")
    parser.add_argument("--pixel-offset", type=int, choices=(0, 1), help="number of the first pixel in voc: 1 (default, the standard) or 0")
    options = parser.parse_args(arguments)
    formats = {options.source, options.target}
    if options.split is not None and not formats & {"voc", "yolo"}:
        parser.error("--split: only voc and yolo have splits.")
    if options.images is not None and options.source not in ("voc", "yolo"):
        parser.error("--images: only voc and yolo read pictures.")
    if options.pixel_offset is not None and "voc" not in formats:
        parser.error("--pixel-offset: only voc counts pixels.")
    pixel_offset = 1 if options.pixel_offset is None else options.pixel_offset
    try:
        pictures, found = read(options.source, options.input, options.split, options.images, pixel_offset)
        class_names = order_classes(pictures, found, options.classes)
        write(options.target, pictures, class_names, options.output, options.split, pixel_offset)
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    objects, empty = sum(len(picture.objects) for picture in pictures), sum(not picture.objects for picture in pictures)
    print(f"{options.output}: {len(pictures)} pictures ({empty} without objects), {objects} objects, classes {', '.join(class_names)}.")


if __name__ == "__main__":
    main()
