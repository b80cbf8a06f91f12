"""Several files as one data set, and the splits of a data set against each other."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from broken import FAULTS, clean, write, write_pictures
from PIL import Image

from fpn_det.annotations.config import SplitConfig
from fpn_det.annotations.reading import read_annotations
from fpn_det.annotations.splits import find_overlap
from fpn_det.composition import compose
from fpn_det.data.config import DataConfig
from fpn_det.data_report.report import inspect_data
from fpn_det.structures import Annotations


def both_parts(data: DataConfig, seed: int) -> tuple[Annotations, Annotations]:
    read = data.read_train_and_val(seed)
    return read.train, read.val


@pytest.fixture(scope="module")
def defaults() -> DataConfig:
    return compose(["experiment=demo"]).data


@pytest.fixture
def root(tmp_path) -> Path:
    """Two sets of six images, `train` and `other`, with the same annotations."""
    for name in ("train", "other"):
        write_pictures(tmp_path / name)
        write(clean(), tmp_path / f"{name}.json")
    return tmp_path


def change(root: Path, name: str, edit) -> None:
    document = json.loads((root / f"{name}.json").read_text())
    edit(document)
    write(document, root / f"{name}.json")


def data_of(root: Path, defaults: DataConfig, on_error: str = "fail") -> DataConfig:
    train, val = (SplitConfig(str(root / name), str(root / f"{name}.json"), None) for name in ("train", "other"))
    return replace(defaults, train=train, val=val, on_error=on_error)  # type: ignore[arg-type]


def joined(root: Path, **options):
    return read_annotations([root / "train.json", root / "other.json"], [root / "train", root / "other"], **options)


def test_two_files_are_one_set_and_ids_that_clash_are_raised(root):
    one, both = read_annotations(root / "train.json", root / "train"), joined(root)
    assert both.image_ids.tolist() == [7, 17, 27, 37, 47, 57, 58, 68, 78, 88, 98, 108]  # 58 is the first that is free
    assert both.annotation_ids.tolist() == list(range(1, 21))
    assert [both.path(row).parent.name for row in (0, 5, 6, 11)] == ["train", "train", "other", "other"]
    for row in range(6):
        for twin in (row, row + 6):
            assert both.boxes[both.rows(twin)].tolist() == one.boxes[one.rows(row)].tolist()
            assert both.labels[both.rows(twin)].tolist() == one.labels[one.rows(row)].tolist()
    assert (both.class_names, both.category_ids) == (one.class_names, one.category_ids)


def test_ids_that_do_not_clash_stay(root):
    def raise_ids(document):
        for table, key in (("images", "id"), ("annotations", "image_id")):
            for record in document[table]:
                record[key] += 5000

    change(root, "other", raise_ids)
    assert joined(root).image_ids.tolist() == [7, 17, 27, 37, 47, 57, 5007, 5017, 5027, 5037, 5047, 5057]


def test_classes_of_several_files_are_united_by_name(root):
    def other_classes(document):
        document["categories"] = [{"id": 3, "name": "emu"}, {"id": 90, "name": "cat"}]

    change(root, "other", other_classes)
    both = joined(root)
    assert both.class_names == ("cat", "dog", "emu")
    assert len(set(both.category_ids)) == 3 and both.category_ids[:2] == (3, 90)
    assert both.labels.tolist() == [0, 1] * 5 + [2, 0] * 5


def test_a_class_in_other_letters_is_a_fault_of_several_files_too(root):
    change(root, "other", lambda document: document["categories"][0].update(name="Cat"))
    with pytest.raises(ValueError, match=r"class_spelling(?s:.*)class 'cat' .*is 'Cat' here"):
        joined(root)
    assert joined(root, on_error="fix").class_names == ("cat", "dog")


def test_several_files_need_a_folder_each_or_one(root):
    with pytest.raises(
        ValueError, match=r"data.train: expected a folder of images for each of 2 annotations, or one, got 3"
    ):
        read_annotations([root / "train.json", root / "other.json"], [root] * 3)
    assert len(read_annotations([root / "train.json", root / "other.json"], root / "train", on_error="fix")) == 12


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            lambda document: document["categories"][0].update(name="Cat"),
            "class 'cat' of the training set is 'Cat' here",
        ),
        (
            lambda document: document["categories"][0].update(name="cta"),
            "class 'cat' of the training set is missing (near: 'cta')",
        ),
        (lambda document: document["categories"].pop(0), "class 'cat' of the training set is missing"),
        (
            lambda document: document["categories"].append({"id": 5, "name": "emu"}),
            "class 'emu' is not in the training set",
        ),
    ],
)
def test_classes_of_validation_that_differ_are_named(root, defaults, edit, words):
    change(root, "other", edit)
    with pytest.raises(ValueError) as refusal:
        both_parts(data_of(root, defaults), 0)
    assert "data.val" in str(refusal.value) and words in str(refusal.value)
    _, val = both_parts(data_of(root, defaults, "fix"), 0)
    assert val.class_names == ("cat", "dog")


def test_classes_of_validation_in_another_order_are_the_same(root, defaults):
    def reorder(document):
        document["categories"] = [{"id": 0, "name": "dog"}, {"id": 1, "name": "cat"}]
        for record in document["annotations"]:
            record["category_id"] = 1 if record["category_id"] == 3 else 0

    change(root, "other", reorder)
    train, val = both_parts(data_of(root, defaults), 0)
    assert train.class_names == val.class_names == ("cat", "dog")
    assert val.labels.tolist() == [0, 1] * 5 and val.category_ids == (1, 0)


def test_an_image_in_two_splits_is_named_and_left_out_of_training(root, defaults):
    shutil.copy(root / "train" / "0.png", root / "other" / "3.png")
    words = r"data.train(?s:.*)image_copied_to_two_splits \(1\)(?s:.*)image 7 .*: data.val has a copy with the same bytes: image 37"
    with pytest.raises(ValueError, match=words):
        both_parts(data_of(root, defaults), 0)
    train, val = both_parts(data_of(root, defaults, "fix"), 0)
    assert 7 not in train.image_ids.tolist() and len(val) == 6


def test_the_same_folder_in_two_splits_is_named_and_the_same_file_is_accepted(root, defaults):
    data = data_of(root, defaults)
    data = replace(data, val=replace(data.val, images=data.train.images))
    train, val = (data.check_split(split, None) for split in ("train", "val"))
    assert {finding.kind for finding in find_overlap(train, val, "data.val").values()} == {"image_in_two_splits"}
    with pytest.raises(ValueError, match=r"image_in_two_splits \(6\)(?s:.*)also in data.val"):
        both_parts(data, 0)
    assert len(both_parts(replace(data, val=data.train), 0)[1]) == 6


def test_images_are_not_inspected_without_data_check(root, defaults):
    (root / "train" / "0.png").write_bytes(b"")
    data = replace(data_of(root, defaults), check=False)
    assert len(both_parts(data, 0)[0]) == 5  # the last has no objects
    with pytest.raises(ValueError, match="image_unreadable"):
        both_parts(replace(data, check=True), 0)


def test_images_without_objects_are_left_out_and_told(root, defaults):
    read = data_of(root, defaults).read_train_and_val(0)  # five of six have objects
    left_out = [str(finding) for finding in read.findings["train"] if finding.kind == "without_objects"]
    assert len(read.train) == 5 and left_out == ["1 without objects are left out; data.keep_empty=true trains on them"]
    kept = replace(data_of(root, defaults), keep_empty=True).read_train_and_val(0)
    assert len(kept.train) == 6 and not [one for one in kept.findings["train"] if one.kind == "without_objects"]


def test_a_set_without_objects_is_refused_with_the_setting_that_accepts_it(root, defaults):
    change(root, "train", lambda document: document.update(annotations=[]))
    with pytest.raises(ValueError, match="expected images with objects, got none. Set data.keep_empty=true"):
        both_parts(data_of(root, defaults), 0)
    train, _ = both_parts(replace(data_of(root, defaults), keep_empty=True), 0)
    assert len(train) == 6 and train.boxes.shape == (0, 4)


def test_evaluation_reads_the_held_out_images_of_training(root, defaults):
    none = SplitConfig(None, None, None)
    data = replace(data_of(root, defaults), val=none, val_fraction=0.5, keep_empty=True)
    train, val = both_parts(data, seed=3)
    again = data.read_split("val", train.class_names, seed=3)
    assert again.image_ids.tolist() == val.image_ids.tolist()
    assert sorted([*train.image_ids.tolist(), *val.image_ids.tolist()]) == [7, 17, 27, 37, 47, 57]


def test_copies_of_an_image_are_never_on_both_sides_of_a_random_split(root, defaults):
    for copy, original in ((1, 0), (4, 3), (5, 3)):
        (root / f"train/{copy}.png").write_bytes((root / f"train/{original}.png").read_bytes())

    def sized(document):
        for copy, original in ((1, 0), (4, 3), (5, 3)):
            for side in ("width", "height"):
                document["images"][copy][side] = document["images"][original][side]
        document["annotations"] = [dict(one, bbox=[5, 5, 10, 10]) for one in document["annotations"]]

    change(root, "train", sized)
    none = SplitConfig(None, None, None)
    data = replace(data_of(root, defaults), val=none, val_fraction=0.5, keep_empty=True)
    sides = set()
    for seed in range(10):
        train, val = (set(part.image_ids.tolist()) for part in both_parts(data, seed))
        assert train | val == {7, 17, 27, 37, 47, 57} and not train & val
        for group in ({7, 17}, {37, 47, 57}):
            assert group <= train or group <= val
        assert set(data.read_split("val", ["cat", "dog"], seed).image_ids.tolist()) == val
        sides.add(tuple(sorted(val)))
    assert sides == {(7, 17, 27), (37, 47, 57)}


def test_a_link_without_its_file_is_a_fault(root, defaults):
    (root / "train/2.png").unlink()
    (root / "train/2.png").symlink_to("gone.png")
    with pytest.raises(ValueError, match=r"image_unreadable \(1\)\n.*2\.png: cannot be read: No such file"):
        both_parts(data_of(root, defaults), 0)
    train, _ = both_parts(data_of(root, defaults, "fix"), 0)
    assert 27 not in train.image_ids.tolist()


def voc_root(root: Path, lists: dict[str, str]) -> Path:
    for number, stem in enumerate("abc"):
        (root / "JPEGImages").mkdir(parents=True, exist_ok=True)
        (root / "Annotations").mkdir(exist_ok=True)
        Image.new("RGB", (80, 64), (number, 9, 9)).save(root / f"JPEGImages/{stem}.png")
        box = "<bndbox><xmin>11</xmin><ymin>11</ymin><xmax>40</xmax><ymax>30</ymax></bndbox>"
        (root / f"Annotations/{stem}.xml").write_text(
            f"<annotation><object><name>cat</name>{box}</object></annotation>"
        )
    for split, names in lists.items():
        (root / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
        (root / f"ImageSets/Main/{split}.txt").write_text("\n".join(names))
    return root


def yolo_root(root: Path, colors: dict[str, list[int]], description: str = "") -> Path:
    for split, numbers in colors.items():
        (root / "images" / split).mkdir(parents=True)
        (root / "labels" / split).mkdir(parents=True)
        for number in numbers:
            Image.new("RGB", (80, 64), (number, 9, 9)).save(root / f"images/{split}/{split}{number}.png")
            (root / f"labels/{split}/{split}{number}.txt").write_text("0 .5 .5 .25 .5\n")
    (root / "data.yaml").write_text("names: [cat]\n" + description)
    return root


def data_at(kind: str, root: Path, *words: str) -> DataConfig:
    return compose(["experiment=demo", f"data={kind}", f"data.root={root}", *words]).data


def test_images_in_two_splits_are_found_below_a_root_too(tmp_path):
    voc = voc_root(tmp_path / "voc", {"train": "ab", "val": "bc"})
    with pytest.raises(ValueError, match=r"image_in_two_splits \(1\)(?s:.*)b.png"):
        data_at("voc", voc).read_train_and_val(0)
    data = data_at("voc", voc, "data.on_error=fix").read_train_and_val(0)
    assert [data.train.path(row).name for row in range(len(data.train))] == ["a.png"] and len(data.val) == 2

    yolo = yolo_root(tmp_path / "yolo", {"train": [1, 2], "val": [2, 3]})  # the same pixels under another name
    with pytest.raises(ValueError, match=r"image_copied_to_two_splits \(1\)(?s:.*)train2.png"):
        data_at("yolo", yolo).read_train_and_val(0)
    data = data_at("yolo", yolo, "data.on_error=fix").read_train_and_val(0)
    assert [data.train.path(row).name for row in range(len(data.train))] == ["train1.png"] and len(data.val) == 2


def test_evaluation_on_the_training_images_is_possible_where_it_is_stated_and_is_reported(tmp_path):
    root = yolo_root(tmp_path, {"train": [1, 2]}, "train: images/train\nval: images/train\n")
    data = data_at("yolo", root).read_train_and_val(0)
    assert len(data.train) == len(data.val) == 2
    assert [finding.kind for finding in data.findings["val"]] == ["val_is_train"]


def test_a_folder_without_lists_is_no_two_splits(tmp_path):
    root = voc_root(tmp_path, {})
    with pytest.raises(ValueError, match=r"data.train: expected a list .* those of data.val too. .*data.val_fraction"):
        data_at("voc", root).read_train_and_val(0)
    with pytest.raises(ValueError, match=r"data.test: expected a list or a folder of the images of the split"):
        data_at("voc", root).read_split("test", ["cat"], 0)
    data = data_at("voc", root, "data.val_fraction=0.4").read_train_and_val(0)
    assert (len(data.train), len(data.val)) == (2, 1)


def test_xml_files_and_images_in_folders_of_other_names_are_found(tmp_path):
    root = voc_root(tmp_path, {})
    (root / "Annotations").rename(root / "annots")
    (root / "JPEGImages").rename(root / "images")
    assert len(data_at("voc", root, "data.val_fraction=0.4").read_train_and_val(0).train) == 2


UNUSABLE = {
    "no annotations": lambda document, folder: document.update(annotations=[]),
    "no table of annotations": lambda document, folder: document.pop("annotations"),
    "no images": lambda document, folder: document.update(images=[], annotations=[]),
    "no categories": lambda document, folder: document.update(categories=[]),
    "crowd only": lambda document, folder: [record.update(iscrowd=1) for record in document["annotations"]],
    "no files": lambda document, folder: [path.unlink() for path in folder.iterdir()],
    "nothing": lambda document, folder: None,
}


@pytest.mark.parametrize(
    ("name", "part"), [*((name, "train") for name in [*FAULTS, *UNUSABLE]), *((name, "other") for name in UNUSABLE)]
)
def test_check_data_and_training_refuse_the_same_data(root, defaults, name, part):
    fault = FAULTS[name][0] if name in FAULTS else UNUSABLE[name]
    document = clean()
    fault(document, root / part)
    write(document, root / f"{part}.json")
    for on_error in ("fail", "fix", "skip"):
        data = data_of(root, defaults, on_error)
        try:
            data.read_train_and_val(0)
            is_trained = True
        except ValueError:
            is_trained = False
        assert inspect_data(data).is_sound == is_trained, on_error


def test_ten_kinds_of_fault_are_all_returned(root, defaults):
    def break_everything(document):
        objects = document["annotations"]
        objects[0]["bbox"] = [1, 2, float("nan"), 4]
        objects[1]["bbox"] = [9, 9, 0, 9]
        objects[2]["bbox"] = [90, 9, 9, 9]
        objects[3]["id"] = 0
        objects[4]["area"] = -1
        objects[5]["iscrowd"] = 2
        objects[8]["category_id"] = 333
        objects[9]["image_id"] = 4711
        document["images"][1]["width"] = 65
        document["images"].append(dict(document["images"][2]))
        (root / "train" / "3.png").unlink()
        (root / "train" / "5.png").write_bytes(b"")

    change(root, "train", break_everything)
    data = data_of(root, defaults, "fix").read_train_and_val(0)
    assert {finding.kind for finding in data.findings["train"] if finding.severity != "note"} == {
        "box_not_numbers",
        "box_without_area",
        "box_outside",
        "annotation_id",
        "area_missing",
        "iscrowd_missing",
        "class_unknown",
        "image_unknown",
        "image_size_differs",
        "image_id_duplicate",
        "image_file_missing",
        "image_unreadable",
    }
    assert not data.findings["val"]


def test_a_list_of_images_without_annotations_can_be_evaluated_and_not_trained_on(root, defaults):
    change(root, "other", lambda document: document.pop("annotations"))
    data = data_of(root, defaults)
    test = replace(data, test=data.val).read_split("test", ["cat", "dog"], 0)
    assert len(test) == 6 and not len(test.boxes)
    with pytest.raises(ValueError, match="data.val .*expected annotations to evaluate on, got a list of images"):
        data.read_train_and_val(0)
    with pytest.raises(ValueError, match="data.train .*expected images with objects"):
        replace(data, train=data.val, val=data.train).read_train_and_val(0)
