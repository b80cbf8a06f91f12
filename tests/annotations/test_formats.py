"""VOC, YOLO and CSV: the same data set in each format is read alike, and faults are named with file and place."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fpn_det.annotations.image_inspection import inspect_images
from fpn_det.annotations.reading import detect_format, read_annotations
from fpn_det.structures import Annotations

SIZES = {"a": (48, 64), "b": (57, 31), "c": (40, 40)}  # (h, w)
BOXES = {"a": [("ant", 10, 20, 30, 40), ("bee", 32, 24, 64, 48)], "b": [("ant", 1, 2, 21, 42)], "c": []}


def pictures(folder: Path) -> None:
    folder.mkdir(parents=True)
    for number, (name, (height, width)) in enumerate(SIZES.items()):
        Image.new("RGB", (width, height), (number, 9, 9)).save(folder / f"{name}.png")


def make_voc(root: Path) -> Path:
    pictures(root / "JPEGImages")
    (root / "Annotations").mkdir()
    for name, (height, width) in SIZES.items():
        objects = "".join(
            f"<object><name>{kind}</name><difficult>0</difficult><bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin>"
            f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            for kind, x1, y1, x2, y2 in BOXES[name]
        )
        size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
        (root / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><filename>{name}.png</filename>{size}{objects}</annotation>"
        )
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nb\nc\n")
    (lists / "val.txt").write_text("b\n")
    return root


def make_yolo(root: Path) -> Path:
    pictures(root / "images" / "train")
    labels = root / "labels" / "train"
    labels.mkdir(parents=True)
    for name, (height, width) in SIZES.items():
        lines = [
            f"{('ant', 'bee').index(kind)} {(x1 + x2) / 2 / width} {(y1 + y2) / 2 / height} {(x2 - x1) / width} {(y2 - y1) / height}\n"
            for kind, x1, y1, x2, y2 in BOXES[name]
        ]
        if lines:
            (labels / f"{name}.txt").write_text("".join(lines))
    (root / "data.yaml").write_text("path: .\ntrain: images/train\nnames: [ant, bee]\n")
    return root


def make_csv(root: Path) -> Path:
    pictures(root)
    lines = ["file,width,height,x1,y1,x2,y2,class"]
    for name, (height, width) in SIZES.items():
        start = f"{name}.png,{width},{height}"
        lines += [f"{start},{x1},{y1},{x2},{y2},{kind}" for kind, x1, y1, x2, y2 in BOXES[name]] or [f"{start},,,,,"]
    (root / "train.csv").write_text("\n".join(lines) + "\n")
    return root


MAKERS: dict[str, Callable[[Path], Path]] = {"voc": make_voc, "yolo": make_yolo, "csv": make_csv}


def source_of(kind: str, root: Path) -> Path:
    return root / "train.csv" if kind == "csv" else root


def read(kind: str, root: Path, on_error: str = "fail") -> Annotations:
    return read_annotations(source_of(kind, root), on_error=on_error, inspect=inspect_images)  # type: ignore[arg-type]


def assert_is_the_set(found: Annotations) -> None:
    assert found.class_names == ("ant", "bee")
    assert [found.path(row).name for row in range(3)] == ["a.png", "b.png", "c.png"]
    assert found.sizes.tolist() == [list(size) for size in SIZES.values()]
    np.testing.assert_allclose(found.boxes, [box[1:] for boxes in BOXES.values() for box in boxes], atol=1e-9)
    assert found.labels.tolist() == [0, 1, 0] and found.offsets.tolist() == [0, 2, 3, 3]
    assert found.annotation_ids.tolist() == [1, 2, 3] and not found.iscrowd.any()


@pytest.mark.parametrize("kind", MAKERS)
def test_format_is_recognized_and_read(tmp_path, kind):
    root = MAKERS[kind](tmp_path / "set")
    assert detect_format(source_of(kind, root)) == kind
    assert_is_the_set(read(kind, root))


@pytest.mark.parametrize("name", ["", "Annotations", "ImageSets/Main/train.txt"])
def test_voc_is_named_by_its_root_its_files_or_a_list(tmp_path, name):
    assert_is_the_set(read_annotations(make_voc(tmp_path / "set") / name))


def test_voc_without_lists_reads_all_files_also_beside_the_images(tmp_path):
    root = make_voc(tmp_path / "set")
    for path in (root / "Annotations").iterdir():
        path.rename(root / "JPEGImages" / path.name)
    assert_is_the_set(read_annotations(root / "JPEGImages"))


def test_voc_with_a_folder_for_each_split(tmp_path):
    root = make_voc(tmp_path / "set")
    (root / "valid").mkdir()
    for path in [*(root / "Annotations").iterdir(), *(root / "JPEGImages").iterdir()]:
        path.rename(root / "valid" / path.name)
    for folder in ("Annotations", "JPEGImages", "ImageSets"):
        shutil.rmtree(root / folder)
    assert_is_the_set(read_annotations(root, format="voc", split="val"))


def test_voc_split_has_the_classes_of_all_files(tmp_path):
    found = read_annotations(make_voc(tmp_path / "set"), split="val")
    assert found.class_names == ("ant", "bee") and len(found) == 1
    with pytest.raises(
        ValueError, match=r"expected the list tran.txt, got none of that name. Name one as data.tran.annotations: train"
    ):
        read_annotations(tmp_path / "set", split="tran")


def test_voc_that_counts_pixels_from_0_is_recognized(tmp_path):
    root = make_voc(tmp_path / "set")
    path = root / "Annotations" / "b.xml"
    path.write_text(path.read_text().replace("<xmin>2</xmin>", "<xmin>0</xmin>"))
    # with 0 among the corners they are continuous: 11 stays 11
    assert read_annotations(root).boxes[:3].tolist() == [[11, 21, 30, 40], [33, 25, 64, 48], [0, 3, 21, 42]]


@pytest.mark.parametrize(
    "change",
    ["data.yaml", "no path", "parent", "list", "list of Windows", "split folders", "beside", "classes.txt"],
)
def test_yolo_in_the_layouts_that_tools_write(tmp_path, change):
    root = make_yolo(tmp_path / "set")
    described, images, labels = root / "data.yaml", root / "images" / "train", root / "labels" / "train"
    if change == "data.yaml":
        assert_is_the_set(read_annotations(described))
    elif change == "no path":
        described.write_text("train: images/train\nnc: 2\nnames: {0: ant, 1: bee}\n")
    elif change == "parent":  # as if the file lay one folder deeper
        described.write_text("train: ../images/train\nnames: [ant, bee]\n")
    elif change == "list":
        (root / "train.txt").write_text("".join(f"./images/train/{name}.png\n" for name in SIZES))
        described.write_text("train: train.txt\nnames: [ant, bee]\n")
    elif change == "list of Windows":
        (root / "train.txt").write_bytes("".join(f"images\\train\\{name}.png\r\n" for name in SIZES).encode())
        described.write_text("train: train.txt\nnames: [ant, bee]\n")
    elif change == "split folders":
        (root / "train").mkdir()
        shutil.move(images, root / "train" / "images")
        shutil.move(labels, root / "train" / "labels")
        described.write_text("train: ../train/images\nnames: [ant, bee]\n")
    elif change == "beside":
        (root / "all").mkdir()
        for path in [*images.iterdir(), *labels.iterdir()]:
            path.rename(root / "all" / path.name)
        described.write_text("train: all\nnames: [ant, bee]\n")
    else:
        described.unlink()
        (root / "classes.txt").write_text("ant\nbee\n")
    assert_is_the_set(read_annotations(root))


def test_yolo_size_is_that_of_the_upright_image(tmp_path):
    root = make_yolo(tmp_path / "set")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (48, 64)).save(root / "images" / "train" / "a.png", exif=exif)
    assert_is_the_set(read("yolo", root))


def test_yolo_polygon_is_the_box_around_it(tmp_path):
    root = make_yolo(tmp_path / "set")
    path = root / "labels" / "train" / "b.txt"
    path.write_text("0 " + " ".join(f"{x / 31} {y / 57}" for x, y in [(1, 20), (9, 2), (21, 30), (5, 42)]) + "\n")
    assert_is_the_set(read("yolo", root))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("ending", ["\r\n", "\n"])
def test_text_files_of_windows_are_read(tmp_path, encoding, ending):
    for kind, name in (("yolo", "labels/train/a.txt"), ("csv", "train.csv"), ("voc", "ImageSets/Main/train.txt")):
        path = MAKERS[kind](tmp_path / kind) / name
        path.write_bytes(path.read_text().replace("\n", ending).encode(encoding))
        assert_is_the_set(read(kind, tmp_path / kind))


def test_labels_are_found_for_images_that_a_list_spells_otherwise(tmp_path):
    root = make_yolo(tmp_path / "set")
    (root / "train.txt").write_text("".join(f"./images/train/{name}.PNG\n" for name in SIZES))
    (root / "data.yaml").write_text("train: train.txt\nnames: [ant, bee]\n")
    assert_is_the_set(read("yolo", root, "fix"))


def test_csv_with_the_names_of_other_tools(tmp_path):
    root = make_csv(tmp_path / "set")
    path = root / "train.csv"
    path.write_text(
        path.read_text()
        .replace("file,width,height,x1,y1,x2,y2,class", "filename,w,h,xmin,ymin,xmax,ymax,label")
        .replace(",", ";")
    )
    assert_is_the_set(read("csv", root))
    path.write_text(
        "\n".join(",".join(line.split(";")[:1] + line.split(";")[3:]) for line in path.read_text().splitlines())
    )
    assert_is_the_set(read("csv", root))  # sizes are the pictures'


def edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    def fault(root: Path) -> None:
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new, 1))

    return fault


def remove(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


def empty(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).write_bytes(b"")


# (format, fault, what the refusal says, whether `fix` gives the clean set)
FAULTS: dict[str, tuple[str, Callable[[Path], None], tuple[str, ...], bool]] = {
    "voc corners exchanged": (
        "voc",
        edit(
            "Annotations/b.xml",
            "<xmin>2</xmin><ymin>3</ymin><xmax>21</xmax>",
            "<xmin>21</xmin><ymin>3</ymin><xmax>2</xmax>",
        ),
        ("box_corners_exchanged", "b.png", "b.xml object 1"),
        True,
    ),
    "voc corner is text": (
        "voc",
        edit("Annotations/b.xml", "<xmin>2<", "<xmin>two<"),
        ("box_not_numbers", "b.png", "b.xml object 1"),
        False,
    ),
    "voc corner missing": (
        "voc",
        edit("Annotations/b.xml", "<xmin>2</xmin>", ""),
        ("box_not_numbers", "b.xml object 1"),
        False,
    ),
    "voc box outside": (
        "voc",
        edit("Annotations/b.xml", "<xmax>21<", "<xmax>99<"),
        ("box_partly_outside", "b.xml object 1"),
        False,
    ),
    "voc name missing": (
        "voc",
        edit("Annotations/a.xml", "<name>ant</name>", ""),
        ("class_unknown", "a.xml object 1: expected the name of a class, got none; left out"),
        False,
    ),
    "voc size differs": (
        "voc",
        edit("Annotations/a.xml", "<width>64<", "<width>46<"),
        ("image_size_differs", "a.png"),
        True,
    ),
    "voc file broken": (
        "voc",
        edit("Annotations/b.xml", "</annotation>", ""),
        ("annotation_file_unreadable", "b.xml"),
        False,
    ),
    "voc file empty": ("voc", empty("Annotations/b.xml"), ("annotation_file_unreadable", "b.xml"), False),
    "voc file missing": ("voc", remove("Annotations/b.xml"), ("annotation_file_missing", "b.xml"), False),
    "voc picture missing": ("voc", remove("JPEGImages/b.png"), ("image_file_missing", "b.png"), False),
    "voc picture empty": ("voc", empty("JPEGImages/b.png"), ("image_unreadable", "b.png"), False),
    "yolo class out of range": (
        "yolo",
        edit("labels/train/a.txt", "1 0.75", "7 0.75"),
        ("class_unknown", "a.png", "a.txt line 2", "7"),
        False,
    ),
    "yolo class negative": (
        "yolo",
        edit("labels/train/a.txt", "1 0.75", "-1 0.75"),
        ("class_unknown", "a.txt line 2"),
        False,
    ),
    "yolo class with a fraction": (
        "yolo",
        edit("labels/train/a.txt", "1 0.75", "1.5 0.75"),
        ("class_unknown", "a.txt line 2: expected the id of a category, got category_id 1.5"),
        False,
    ),
    "yolo class by name": (
        "yolo",
        edit("labels/train/a.txt", "1 0.75", "bee 0.75"),
        ("label_columns", "a.txt line 2: expected numbers separated by blanks, got 'bee 0.75 0.75 0.5 0.5'"),
        False,
    ),
    "yolo decimal commas": (
        "yolo",
        edit("labels/train/a.txt", "1 0.75 0.75", "1 0,75 0,75"),
        ("label_columns", "got '1 0,75 0,75 0.5 0.5'"),
        False,
    ),
    "yolo four values": (
        "yolo",
        edit("labels/train/a.txt", "1 0.75", "0.75"),
        ("label_columns", "a.png", "a.txt line 2"),
        False,
    ),
    "yolo six values": (
        "yolo",
        edit("labels/train/a.txt", "0.5\n", "0.5 0.93\n"),
        ("label_columns", "a.txt line 2"),
        True,
    ),
    "yolo in px": (
        "yolo",
        edit("labels/train/a.txt", "1 0.75 0.75", "1 48 36"),
        ("box_outside", "a.txt line 2"),
        False,
    ),
    "yolo NaN": ("yolo", edit("labels/train/a.txt", "1 0.75", "1 nan"), ("label_columns", "a.txt line 2"), False),
    "yolo label without picture": ("yolo", remove("images/train/b.png"), ("image_file_missing", "b.txt"), False),
    "yolo picture empty": ("yolo", empty("images/train/b.png"), ("image_unreadable", "b.png"), False),
    "csv number is text": (
        "csv",
        edit("train.csv", "10,20,30,40", "ten,20,30,40"),
        ("box_not_numbers", "a.png", "train.csv line 2", "got bbox ['ten', '20', '30', '40']"),
        False,
    ),
    "csv number missing": (
        "csv",
        edit("train.csv", "10,20,30,40", ",20,30,40"),
        ("box_not_numbers", "train.csv line 2"),
        False,
    ),
    "csv class missing": (
        "csv",
        edit("train.csv", "30,40,ant", "30,40,"),
        ("class_unknown", "train.csv line 2: expected the name of a class, got none; left out"),
        False,
    ),
    "csv line too short": (
        "csv",
        edit("train.csv", "10,20,30,40,ant", "10,20"),
        ("class_unknown", "train.csv line 2"),
        False,
    ),
    "csv corners exchanged": (
        "csv",
        edit("train.csv", "10,20,30,40", "30,20,10,40"),
        ("box_corners_exchanged", "train.csv line 2"),
        True,
    ),
    "csv two sizes": (
        "csv",
        edit("train.csv", "a.png,64,48,32", "a.png,64,49,32"),
        ("image_size_differs", "train.csv line 3"),
        True,
    ),
    "csv picture missing": ("csv", remove("b.png"), ("image_file_missing", "b.png"), False),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_named_and_repaired_or_left_out(tmp_path, caplog, name):
    kind, fault, words, is_repaired = FAULTS[name]
    root = MAKERS[kind](tmp_path / "set")
    fault(root)
    with pytest.raises(ValueError) as refusal:
        read(kind, root)
    for word in words:
        assert word in str(refusal.value), str(refusal.value)
    fixed = read(kind, root, "fix")
    assert all(word in caplog.text for word in words)
    if is_repaired:
        assert_is_the_set(fixed)


@pytest.mark.parametrize(
    ("kind", "fault", "words"),
    [
        ("voc", lambda root: shutil.rmtree(root / "Annotations"), "expected XML files in"),
        ("yolo", edit("data.yaml", "names: [ant, bee]", ""), "expected 'names' with the names of the classes"),
        ("yolo", edit("data.yaml", "[ant, bee]", "{1: ant, 2: bee}"), "a list or a table that counts from 0"),
        ("yolo", edit("data.yaml", "names:", "nc: 3\nnames:"), "got nc 3 and 2 names"),
        ("yolo", edit("data.yaml", "names: [", "names: [["), "expected plain YAML"),
        ("yolo", edit("data.yaml", "images/train", "images/trian"), "expected a path that exists, got 'images/trian'"),
        ("yolo", lambda root: shutil.rmtree(root / "images" / "train"), "expected a path that exists"),
        ("csv", edit("train.csv", "class", "kind"), "got none named class. Its first line is"),
        ("csv", empty("train.csv"), "expected the columns file, x1"),
    ],
)
def test_incomplete_data_is_refused_in_one_sentence(tmp_path, kind, fault, words):
    root = MAKERS[kind](tmp_path / "set")
    fault(root)
    for policy in ("fail", "fix"):
        with pytest.raises(ValueError) as refusal:
            read(kind, root, policy)
        assert words in str(refusal.value) and "\n" not in str(refusal.value), str(refusal.value)


def test_a_folder_of_no_format_is_refused(tmp_path):
    (tmp_path / "instances.json").write_text("{}")
    with pytest.raises(
        ValueError,
        match=r"expected a folder in VOC or YOLO format, got another that holds instances.json: name that file",
    ):
        read_annotations(tmp_path)
