"""Conversions between formats keep the annotations."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from convert import main
from PIL import Image

from fpn_det.annotations.reading import read_annotations
from fpn_det.structures import Annotations

CLASSES = ("zebra", "ant")  # an order that is not the alphabet's
SIZES = {"a.jpg": (48, 64), "b.png": (57, 31), "empty.jpg": (10, 20)}  # (h, w)


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images" / "train"
    folder.mkdir(parents=True)
    for name, (height, width) in SIZES.items():
        Image.new("RGB", (width, height)).save(folder / name)
    return folder


@pytest.fixture
def start(tmp_path, images) -> Path:
    """A COCO file with four objects on the first image, the second of them a crowd, and two on the second."""
    corners = np.random.default_rng(0).uniform(0, 20, (6, 2)).tolist()
    document = {
        "images": [
            {"id": n, "file_name": name, "height": h, "width": w}
            for n, (name, (h, w)) in enumerate(SIZES.items(), start=1)
        ],
        "annotations": [
            {
                "id": n + 1,
                "image_id": 1 + n // 4,
                "category_id": 1 + n % 2,
                "bbox": [x, y, 7.3, 9.1],
                "area": 7.3 * 9.1,
                "iscrowd": int(n == 1),
            }
            for n, (x, y) in enumerate(corners)
        ],
        "categories": [{"id": n, "name": name} for n, name in enumerate(CLASSES, start=1)],
    }
    path = tmp_path / "start.json"
    path.write_text(json.dumps(document))
    return path


def convert(source: str, target: str, path: Path, output: Path, *options: str) -> Path:
    main([source, target, "--input", str(path), "--output", str(output), *options])
    return output


def contents(annotations: Annotations) -> list[tuple]:
    """(file, size, class, crowd) of every object, and of every image without one."""
    rows = []
    for row in range(len(annotations)):
        picture = annotations.path(row).name, tuple(annotations.sizes[row].tolist())
        objects = annotations.rows(row)
        kinds = zip(annotations.labels[objects].tolist(), annotations.iscrowd[objects].tolist(), strict=True)
        rows += [(*picture, annotations.class_names[label], crowd) for label, crowd in kinds] or [picture]
    return rows


def assert_same(found: Annotations, expected: Annotations, with_crowd: bool = True) -> None:
    wanted = [row for row in contents(expected) if with_crowd or len(row) == 2 or not row[3]]
    assert contents(found) == wanted
    kept = slice(None) if with_crowd else ~expected.iscrowd
    np.testing.assert_allclose(found.boxes, expected.boxes[kept], atol=1e-8)


@pytest.mark.parametrize("offset", ["0", "1"])
def test_voc_round_trip_keeps_everything(start, images, tmp_path, offset):
    voc = convert("coco", "voc", start, tmp_path / "voc", "--split", "val", "--pixel-offset", offset)
    end = convert(
        "voc", "coco", voc, tmp_path / "end.json", "--split", "val", "--images", str(images), "--pixel-offset", offset
    )
    found = read_annotations(end, images)
    assert found.class_names == ("ant", "zebra")
    assert_same(found, read_annotations(start, images))
    if offset == "1":  # the standard is what is read without a word about it
        assert_same(read_annotations(voc, images, split="val"), read_annotations(start, images))


def test_coco_round_trip_keeps_everything(start, images, tmp_path):
    found = read_annotations(convert("coco", "coco", start, tmp_path / "end.json"), images)
    assert found.class_names == CLASSES
    assert_same(found, read_annotations(start, images))


@pytest.mark.parametrize("target", ["yolo", "csv"])
def test_round_trip_keeps_everything_but_crowds(start, images, tmp_path, target, capsys):
    table, split, pictures = tmp_path / "table.csv", ["--split", "train"], ["--images", str(images)]
    output = (
        convert("coco", "csv", start, table) if target == "csv" else convert("coco", "yolo", start, tmp_path, *split)
    )
    assert "a.jpg: 1 crowd region(s), which" in capsys.readouterr().out
    end = convert(target, "coco", output, tmp_path / "end.json", *(pictures if target == "csv" else split))
    assert_same(read_annotations(end, images), read_annotations(start, images), with_crowd=False)


def test_command_goes_round_all_formats(start, images, tmp_path, capsys):
    pictures = ["--images", str(images)]
    voc = convert("coco", "voc", start, tmp_path / "voc", "--split", "train")
    yolo = convert("voc", "yolo", voc, tmp_path, "--split", "train", *pictures, "--classes", *CLASSES)
    table = convert("yolo", "csv", yolo, tmp_path / "table.csv", "--split", "train")
    end = convert("csv", "coco", table, tmp_path / "end.json", *pictures, "--classes", *CLASSES)
    found = read_annotations(end, images)
    assert found.class_names == CLASSES
    assert_same(found, read_annotations(start, images), with_crowd=False)
    assert (
        capsys.readouterr().out.splitlines()[-1]
        == f"{end}: 3 images (1 without objects), 5 objects, classes zebra, ant."
    )


def test_coco_written_has_ids_from_one_and_areas(start, tmp_path):
    document = json.loads(start.read_text())
    document["annotations"] = [
        {"id": 70, "image_id": 1, "category_id": 30, "bbox": [1, 2, 3.5, 4], "area": 11, "iscrowd": 0}
    ]
    document["categories"] = [{"id": 9, "name": "zebra"}, {"id": 30, "name": "ant"}]
    start.write_text(json.dumps(document))
    content = json.loads(convert("coco", "coco", start, tmp_path / "end.json").read_text())
    assert content["images"] == document["images"]
    assert content["annotations"] == [
        {"id": 1, "image_id": 1, "category_id": 2, "bbox": [1.0, 2.0, 3.5, 4.0], "area": 11.0, "iscrowd": 0}
    ]
    assert content["categories"] == [{"id": 1, "name": "zebra"}, {"id": 2, "name": "ant"}]


def test_yolo_second_split_joins_the_first(start, tmp_path, capsys):
    for split in ("train", "val"):
        convert("coco", "yolo", start, tmp_path, "--split", split)
    assert (
        tmp_path / "data.yaml"
    ).read_text() == "path: .\ntrain: images/train\nnames:\n  0: zebra\n  1: ant\nval: images/val\n"
    with pytest.raises(SystemExit):
        convert("coco", "yolo", start, tmp_path, "--split", "test", "--classes", "ant", "zebra")
    assert "data.yaml: expected the classes ant, zebra, got others" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["voc", "yolo"])
def test_two_images_that_differ_by_their_ending_are_refused(start, tmp_path, capsys, target):
    document = json.loads(start.read_text())
    document["images"][1]["file_name"] = "a.png"
    start.write_text(json.dumps(document))
    with pytest.raises(SystemExit):
        convert("coco", target, start, tmp_path / "output")
    assert "got 'a' more than once: a.jpg and a.png" in capsys.readouterr().err
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("target", ["voc", "yolo"])
def test_images_of_one_name_in_two_folders_keep_their_labels(start, images, tmp_path, target):
    (images / "x").mkdir()
    (images / "b.png").rename(images / "x" / "a.png")
    document = json.loads(start.read_text())
    document["images"][1]["file_name"] = "x/a.png"
    start.write_text(json.dumps(document))
    output = convert("coco", target, start, tmp_path, "--split", "train")
    found = read_annotations(output, images if target == "voc" else None, format=target)
    counts = {str(found.path(row).relative_to(images)): len(found.boxes[found.rows(row)]) for row in range(len(found))}
    assert counts == {"a.jpg": 4 if target == "voc" else 3, "x/a.png": 2, "empty.jpg": 0}


@pytest.mark.parametrize("name", ["/etc/a.jpg", "../../a.jpg", "x/../../a.jpg"])
@pytest.mark.parametrize("target", ["voc", "yolo"])
def test_nothing_is_written_outside_of_the_output(start, tmp_path, capsys, target, name):
    document = json.loads(start.read_text())
    document["images"][0]["file_name"] = name
    (tmp_path / "in").mkdir()
    source = tmp_path / "in" / "start.json"
    source.write_text(json.dumps(document))
    before = set(tmp_path.rglob("*"))
    with pytest.raises(SystemExit):
        convert("coco", target, source, tmp_path / "out" / "deep")
    assert "whose label file would be outside of the output" in capsys.readouterr().err
    assert set(tmp_path.rglob("*")) == before


def test_labels_of_another_image_are_not_overwritten(start, tmp_path, capsys):
    convert("coco", "yolo", start, tmp_path / "yolo")
    convert("coco", "yolo", start, tmp_path / "yolo")  # the same again is no change
    labels = tmp_path / "yolo" / "labels" / "train" / "a.txt"
    labels.write_text("0 0.5 0.5 0.1 0.1\n")
    with pytest.raises(SystemExit):
        convert("coco", "yolo", start, tmp_path / "yolo")
    assert "a.txt: expected no such file, got one with other labels" in capsys.readouterr().err
    assert labels.read_text() == "0 0.5 0.5 0.1 0.1\n"


def test_the_source_is_not_overwritten(start, capsys):
    before = start.read_bytes()
    with pytest.raises(SystemExit):
        convert("coco", "coco", start, start)
    assert "expected an output that is not the input" in capsys.readouterr().err and start.read_bytes() == before


@pytest.mark.parametrize("names", [("no", "1e3"), ("012", "null"), ("a: b", "#c"), ("M\u00e4use", "M\u00f6use")])
@pytest.mark.parametrize("target", ["yolo", "csv", "voc"])
def test_class_names_survive_every_format(start, images, tmp_path, target, names):
    document = json.loads(start.read_text())
    for record, name in zip(document["categories"], names, strict=True):
        record["name"] = name
    start.write_text(json.dumps(document))
    output = tmp_path / "table.csv" if target == "csv" else tmp_path
    convert("coco", target, start, output)
    found = read_annotations(output, images, format=target)
    assert set(found.class_names) == set(names)


def test_faults_end_the_conversion_or_are_repaired_in_what_is_written(start, images, tmp_path, capsys):
    document = json.loads(start.read_text())
    document["annotations"][0]["bbox"] = [60, 40, 10, 20]
    document["annotations"][2]["category_id"] = 3
    start.write_text(json.dumps(document))
    with pytest.raises(SystemExit) as end:
        convert("coco", "csv", start, tmp_path / "table.csv")
    said = capsys.readouterr().err
    assert end.value.code == 1 and not (tmp_path / "table.csv").exists()
    assert (
        "box_partly_outside" in said
        and "annotation 1: " in said
        and "annotation 3: expected the id of a category" in said
    )
    assert "--on-error fix" in said
    convert("coco", "csv", start, tmp_path / "table.csv", "--on-error", "fix")
    assert (tmp_path / "table.csv").read_text().splitlines()[1] == "a.jpg,64,48,60.0,40.0,64.0,48.0,zebra"


def test_command_refuses_classes_and_options_that_do_not_fit(start, tmp_path, capsys):
    for options, words in (
        (["--classes", "Zebra", "ant"], "class 'Zebra' of the training set is 'zebra' here"),
        (["--split", "train"], "--split: only voc and yolo have splits."),
        (["--pixel-offset", "0"], "--pixel-offset: only voc counts pixels."),
    ):
        with pytest.raises(SystemExit):
            convert("coco", "csv", start, tmp_path / "table.csv", *options)
        assert words in capsys.readouterr().err


@pytest.mark.skipif("FPN_DET_DATA" not in os.environ, reason="FPN_DET_DATA names no folder with real pictures")
def test_voc_of_real_pictures_leaves_out_the_boxes_without_area(tmp_path, capsys):
    folder = Path(os.environ["FPN_DET_DATA"]) / "bccd"
    counts = {}
    for split in ("train", "val", "test"):
        end = convert("voc", "coco", folder, tmp_path / f"{split}.json", "--split", split, "--on-error", "fix")
        found = read_annotations(end, folder / "JPEGImages")
        assert found.class_names == ("Platelets", "RBC", "WBC")
        counts[split] = len(found), len(found.boxes)
    assert counts == {"train": (205, 2804), "val": (87, 1137), "test": (72, 945)}  # 4,888 boxes, less two
    printed = capsys.readouterr().out
    for place in ("BloodImage_00343.xml object", "BloodImage_00338.xml object"):
        assert place in printed
