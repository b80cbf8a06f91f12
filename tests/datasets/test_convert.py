"""Annotations keep their meaning on the way from format to format."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from convert import (
    Object,
    Picture,
    main,
    read_coco,
    read_csv,
    read_voc,
    read_yolo,
    write_coco,
    write_csv,
    write_voc,
    write_yolo,
)
from PIL import Image

CLASSES = ("zebra", "ant")  # an order that is not the alphabet's


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images" / "train"
    folder.mkdir(parents=True)
    for name, (width, height) in {"a.jpg": (64, 48), "b.png": (31, 57), "empty.jpg": (20, 10)}.items():
        Image.new("RGB", (width, height)).save(folder / name)
    return folder


def pictures():
    fractions = np.random.default_rng(0).uniform(0, 20, (6, 2))
    objects = [Object(CLASSES[number % 2], (x, y, x + 7.3, y + 9.1)) for number, (x, y) in enumerate(fractions.tolist())]
    return [Picture("a.jpg", (48, 64), objects[:4]), Picture("b.png", (57, 31), objects[4:]), Picture("empty.jpg", (10, 20))]


def assert_same(found, expected):
    assert [(picture.file, picture.size) for picture in found] == [(picture.file, picture.size) for picture in expected]
    for one, other in zip(found, expected, strict=True):
        assert [(item.class_name, item.crowd) for item in one.objects] == [(item.class_name, item.crowd) for item in other.objects]
        for item, twin in zip(one.objects, other.objects, strict=True):
            np.testing.assert_allclose(item.box, twin.box, atol=1e-8)


def voc_xml(folder: Path, objects: str, stem="a", size="<width>64</width><height>48</height>"):
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 48)).save(folder / "JPEGImages" / f"{stem}.jpg")
    (folder / "Annotations" / f"{stem}.xml").write_text(f"<annotation><size>{size}</size>{objects}</annotation>")
    (folder / "ImageSets" / "Main" / "train.txt").write_text(f"{stem}\n")
    return folder


def voc_object(name, xmin, ymin, xmax, ymax):
    corners = f"<xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax>"
    return f"<object><name>{name}</name><bndbox>{corners}</bndbox></object>"


@pytest.mark.parametrize("offset", [0, 1])
def test_voc_round_trip_keeps_everything(images, tmp_path, offset):
    drawn = pictures()
    drawn[0].objects[1].crowd = True
    write_voc(drawn, tmp_path / "voc", "val", offset)
    found, names = read_voc(tmp_path / "voc", "val", images, offset)
    assert_same(found, drawn)
    assert names == ("ant", "zebra")


def test_coco_round_trip_keeps_everything(tmp_path):
    drawn = pictures()
    drawn[1].objects[0].crowd = True
    write_coco(drawn, CLASSES, tmp_path / "coco.json")
    found, names = read_coco(tmp_path / "coco.json")
    assert_same(found, drawn)
    assert names == CLASSES


def test_yolo_round_trip_keeps_everything(images, tmp_path):
    write_yolo(pictures(), CLASSES, tmp_path, "train")
    found, names = read_yolo(tmp_path, images)
    assert_same(found, pictures())
    assert names == CLASSES


def test_csv_round_trip_keeps_everything(tmp_path):
    write_csv(pictures(), tmp_path / "table.csv")
    found, names = read_csv(tmp_path / "table.csv")
    assert_same(found, pictures())
    assert names == ("ant", "zebra")


def test_command_goes_round_all_formats(images, tmp_path, capsys):
    write_coco(pictures(), CLASSES, tmp_path / "start.json")
    voc, yolo, table, end = tmp_path / "voc", tmp_path, tmp_path / "table.csv", tmp_path / "end.json"
    main(["coco", "voc", "--input", str(tmp_path / "start.json"), "--output", str(voc), "--split", "train"])
    main(["voc", "yolo", "--input", str(voc), "--split", "train", "--images", str(images), "--output", str(yolo), "--classes", *CLASSES])
    main(["yolo", "csv", "--input", str(yolo), "--split", "train", "--output", str(table)])
    main(["csv", "coco", "--input", str(table), "--output", str(end), "--classes", *CLASSES])
    assert_same(read_coco(end)[0], pictures())
    assert read_coco(end)[1] == CLASSES
    assert capsys.readouterr().out.splitlines()[-1] == f"{end}: 3 pictures (1 without objects), 6 objects, classes zebra, ant."


def test_coco_written_has_ids_from_one_and_areas(tmp_path):
    write_coco([Picture("a.jpg", (48, 64), [Object("ant", (1.0, 2.0, 4.5, 6.0))])], CLASSES, tmp_path / "coco.json")
    content = json.loads((tmp_path / "coco.json").read_text())
    assert content["images"] == [{"id": 1, "file_name": "a.jpg", "height": 48, "width": 64}]
    # x, y, width = 4.5 - 1, height = 6 - 2; area = 3.5 * 4
    assert content["annotations"] == [{"id": 1, "image_id": 1, "category_id": 2, "bbox": [1.0, 2.0, 3.5, 4.0], "area": 14.0, "iscrowd": 0}]
    assert content["categories"] == [{"id": 1, "name": "zebra"}, {"id": 2, "name": "ant"}]


def test_voc_counts_pixels_from_one_by_default(tmp_path):
    # pixels 1..64 of a line of 64 are all of it, [0, 64)
    folder = voc_xml(tmp_path, voc_object("ant", 1, 1, 64, 48) + voc_object("ant", 11, 21, 30, 40))
    found, _ = read_voc(folder, "train", folder / "JPEGImages")
    assert [item.box for item in found[0].objects] == [(0, 0, 64, 48), (10, 20, 30, 40)]
    found, _ = read_voc(folder, "train", folder / "JPEGImages", pixel_offset=0)
    assert [item.box for item in found[0].objects] == [(1, 1, 64, 48), (11, 21, 30, 40)]


def test_yolo_reads_parts_of_the_sides(images, tmp_path):
    # a.jpg is 64 x 48: center (32, 12), sides 16 and 24
    labels = tmp_path / "labels" / "train"
    labels.mkdir(parents=True)
    (labels / "a.txt").write_text("1 0.5 0.25 0.25 0.5\n\n")
    (tmp_path / "classes.txt").write_text("zebra\nant\n")
    found, names = read_yolo(tmp_path, images)
    assert found[0].objects == [Object("ant", (24.0, 0.0, 40.0, 24.0))]
    assert names == CLASSES and not found[1].objects and not found[2].objects


def test_yolo_size_is_that_of_the_picture_as_shown(images, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (64, 48)).save(images / "a.jpg", exif=exif)
    write_yolo(pictures(), CLASSES, tmp_path, "train")
    assert read_yolo(tmp_path, images)[0][0].size == (64, 48)


def test_yolo_second_split_joins_the_first(images, tmp_path):
    write_yolo(pictures(), CLASSES, tmp_path, "train")
    write_yolo(pictures(), CLASSES, tmp_path, "val")
    assert (tmp_path / "data.yaml").read_text() == "path: .\ntrain: images/train\nnames:\n  0: zebra\n  1: ant\nval: images/val\n"
    with pytest.raises(ValueError, match=r"data.yaml: expected the classes ant, got others"):
        write_yolo([], ("ant",), tmp_path, "test")


def test_objects_without_area_are_left_out_by_name(tmp_path, capsys):
    folder = voc_xml(tmp_path, voc_object("ant", 5, 5, 5, 9) + voc_object("zebra", 3, 3, 70, 9) + voc_object("ant", 65, 3, 70, 9))
    found, names = read_voc(folder, "train", folder / "JPEGImages")
    assert [item.box for item in found[0].objects] == [(2, 2, 64, 9)] and names == ("ant", "zebra")
    path = folder / "Annotations" / "a.xml"
    assert capsys.readouterr().out.splitlines() == [
        f"{path}: object 1: ant has no area (x 5..5, y 5..9); left out.",
        f"{path}: object 2: zebra reaches outside the 64x48 picture (x 2..70, y 2..9); cut.",
        f"{path}: object 3: ant is outside the 64x48 picture (x 64..70, y 2..9); left out.",
    ]


def test_crowd_is_left_out_where_it_cannot_be_said(tmp_path, capsys):
    drawn = [Picture("a.jpg", (48, 64), [Object("ant", (1, 1, 9, 9), crowd=True), Object("ant", (2, 2, 9, 9))])]
    write_csv(drawn, tmp_path / "table.csv")
    assert len(read_csv(tmp_path / "table.csv")[0][0].objects) == 1
    assert "1 crowd region(s), which CSV cannot say; left out" in capsys.readouterr().out


def test_voc_refuses_two_pictures_of_one_name(tmp_path):
    with pytest.raises(ValueError, match="got 'a' more than once"):
        write_voc([Picture("x/a.jpg", (9, 9)), Picture("b.jpg", (9, 9)), Picture("y/a.png", (9, 9))], tmp_path, "train")


@pytest.fixture
def refusal(tmp_path, capsys):
    """What the command says when it refuses `source`, read from `path`."""

    def run(source: str, path: Path, *options: str) -> str:
        target = "csv" if source == "coco" else "coco"
        with pytest.raises(SystemExit) as error:
            main([source, target, "--input", str(path), "--output", str(tmp_path / "out"), *options])
        assert error.value.code != 0 and not (tmp_path / "out").exists()
        return capsys.readouterr().err.strip()

    return run


def text_file(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_coco_refusals_name_file_and_annotation(tmp_path, refusal):
    def broken(**changes):
        image = {"id": 1, "file_name": "a.jpg", "height": 48, "width": 64}
        annotation = {"id": 7, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]} | changes
        content = {"images": [image], "annotations": [annotation], "categories": [{"id": 1, "name": "ant"}]}
        return text_file(tmp_path / "x.json", json.dumps(content))

    assert refusal("coco", tmp_path / "no.json") == f"{tmp_path}/no.json: expected a file, got none. Check the path."
    assert "x.json: annotation 7: expected known ids, got image 1, category 3." in refusal("coco", broken(category_id=3))
    assert "x.json: annotation 7: expected a box of finite numbers" in refusal("coco", broken(bbox=[1, 2, float("nan"), 4]))
    assert "x.json: annotation 7: expected 4 numbers, got [1, 2, 3]" in refusal("coco", broken(bbox=[1, 2, 3]))
    assert "a file that lacks some: 'images'" in refusal("coco", text_file(tmp_path / "x.json", '{"categories": []}'))
    assert "x.json: expected JSON, got" in refusal("coco", text_file(tmp_path / "x.json", "{"))


def test_voc_refusals_name_file_and_object(tmp_path, refusal):
    folder = voc_xml(tmp_path, voc_object("ant", 1, 1, "nine", 9))
    assert "a.xml: object 1: expected a number, got 'nine'. Correct it." in refusal("voc", folder)
    voc_xml(tmp_path, "", size="<width>48</width><height>64</height>")
    assert "a.xml: expected the picture's size 64x48, got 48x64. Correct one of them." in refusal("voc", folder)
    text_file(folder / "JPEGImages" / "a.jpg", "no picture")
    assert "a.jpg: expected a picture, got cannot identify image file" in refusal("voc", folder)
    (folder / "JPEGImages" / "a.jpg").unlink()
    assert "a.xml: expected its picture in" in refusal("voc", folder)
    text_file(folder / "Annotations" / "a.xml", "<annotation>")
    assert "a.xml: expected XML, got no element found" in refusal("voc", folder)
    assert "val.txt: expected a file, got none" in refusal("voc", folder, "--split", "val")


def test_yolo_refusals_name_file_and_line(images, tmp_path, refusal):
    assert "classes.txt: expected a file, got none" in refusal("yolo", tmp_path, "--split", "train")
    text_file(tmp_path / "data.yaml", "names: [zebra, ant]")
    assert "expected the folders" in refusal("yolo", tmp_path, "--split", "train")
    for line in ("2 0.5 0.5 0.1 0.1", "-1 0.5 0.5 0.1 0.1", "0.5 0.5 0.5 0.1 0.1", "0 0.5 0.5 0.1"):
        text_file(tmp_path / "labels" / "train" / "a.txt", line)
        assert "a.txt: line 1: expected a class below 2 and 4 numbers" in refusal("yolo", tmp_path, "--split", "train")
    text_file(tmp_path / "labels" / "train" / "gone.txt", "")
    assert "gone.txt: expected its picture in" in refusal("yolo", tmp_path, "--split", "train")


def test_csv_refusals_name_file_and_line(tmp_path, refusal):
    header = "file,width,height,x1,y1,x2,y2,class\n"
    table = tmp_path / "table.csv"
    assert "table.csv: expected the columns file, width, " in refusal("csv", text_file(table, "a.jpg,64,48,1,1,9,9,ant\n"))
    assert "table.csv: line 2: expected a number, got ''" in refusal("csv", text_file(table, header + "a.jpg,64,48,1,1,,9,ant\n"))
    two_sizes = header + "a.jpg,64,48,1,1,9,9,ant\na.jpg,48,64,1,1,9,9,ant\n"
    assert "table.csv: line 3: expected the same size as before for a.jpg, got 48x64." in refusal("csv", text_file(table, two_sizes))


def test_command_refuses_classes_and_options_that_do_not_fit(tmp_path, refusal):
    write_csv(pictures(), tmp_path / "table.csv")
    assert "got 'zebra'. Is it 'Zebra'?" in refusal("csv", tmp_path / "table.csv", "--classes", "Zebra", "ant")
    assert "--split: only voc and yolo have splits." in refusal("csv", tmp_path / "table.csv", "--split", "train")
    assert "--images: only voc and yolo read pictures." in refusal("csv", tmp_path / "table.csv", "--images", "x")
    assert "--pixel-offset: only voc counts pixels." in refusal("csv", tmp_path / "table.csv", "--pixel-offset", "0")


@pytest.mark.skipif("FPN_DET_DATA" not in os.environ, reason="FPN_DET_DATA names no folder with real pictures")
def test_voc_of_real_pictures_leaves_out_the_boxes_without_area(tmp_path, capsys):
    folder = Path(os.environ["FPN_DET_DATA"]) / "bccd"
    counts = {}
    for split in ("train", "val", "test"):
        main(["voc", "coco", "--input", str(folder), "--split", split, "--output", str(tmp_path / f"{split}.json")])
        found, names = read_coco(tmp_path / f"{split}.json")
        assert names == ("Platelets", "RBC", "WBC") and all((folder / "JPEGImages" / picture.file).exists() for picture in found)
        counts[split] = len(found), sum(len(picture.objects) for picture in found)
    printed = [line for line in capsys.readouterr().out.splitlines() if "has no area" in line]
    assert counts == {"train": (205, 2804), "val": (87, 1137), "test": (72, 945)}  # 4,888 boxes, less two
    assert [Path(line.split(":")[0]).name for line in printed] == ["BloodImage_00343.xml", "BloodImage_00338.xml"]
