"""Several files as one data set, and the parts of one beside each other."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from broken import clean, write, write_pictures

from fpn_det.annotations.config import SplitConfig
from fpn_det.annotations.reading import read_annotations
from fpn_det.annotations.splits import find_overlap
from fpn_det.composition import compose
from fpn_det.data.config import DataConfig
from fpn_det.structures import Annotations


def both_parts(data: DataConfig, seed: int) -> tuple[Annotations, Annotations]:
    read = data.read_train_and_val(seed)
    return read.train, read.val


@pytest.fixture(scope="module")
def defaults() -> DataConfig:
    return compose(["experiment=demo"]).data


@pytest.fixture
def root(tmp_path) -> Path:
    """Two sets of six pictures, `train` and `other`, with the same annotations."""
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


def test_a_picture_in_two_splits_is_named_and_leaves_training(root, defaults):
    shutil.copy(root / "train" / "0.png", root / "other" / "3.png")
    words = r"data.train(?s:.*)image_copied_to_two_splits \(1\)(?s:.*)image 7 .*: data.val has a copy with the same bytes: image 37"
    with pytest.raises(ValueError, match=words):
        both_parts(data_of(root, defaults), 0)
    train, val = both_parts(data_of(root, defaults, "fix"), 0)
    assert 7 not in train.image_ids.tolist() and len(val) == 6


def test_the_same_folder_in_two_splits_is_named_and_the_same_file_twice_is_meant(root, defaults):
    data = data_of(root, defaults)
    data = replace(data, val=replace(data.val, images=data.train.images))
    train, val = (data.check_split(split, None) for split in ("train", "val"))
    assert {finding.kind for finding in find_overlap(train, val, "val").values()} == {"image_in_two_splits"}
    with pytest.raises(ValueError, match=r"image_in_two_splits \(6\)(?s:.*)also in data.val"):
        both_parts(data, 0)
    assert len(both_parts(replace(data, val=data.train), 0)[1]) == 6


def test_pictures_are_not_looked_at_where_nobody_asks(root, defaults):
    (root / "train" / "0.png").write_bytes(b"")
    data = replace(data_of(root, defaults), check=False)
    assert len(both_parts(data, 0)[0]) == 5  # the last has no objects
    with pytest.raises(ValueError, match="image_unreadable"):
        both_parts(replace(data, check=True), 0)


def test_a_set_without_objects_says_how_to_train_on_it(root, defaults):
    change(root, "train", lambda document: document.update(annotations=[]))
    with pytest.raises(ValueError, match="expected images with objects, got none. Set data.keep_empty=true"):
        both_parts(data_of(root, defaults), 0)
    train, _ = both_parts(replace(data_of(root, defaults), keep_empty=True), 0)
    assert len(train) == 6 and train.boxes.shape == (0, 4)


def test_evaluation_reads_what_training_left_for_it(root, defaults):
    none = SplitConfig(None, None, None)
    data = replace(data_of(root, defaults), val=none, val_fraction=0.5, keep_empty=True)
    train, val = both_parts(data, seed=3)
    again = data.read_split("val", train.class_names, seed=3)
    assert again.image_ids.tolist() == val.image_ids.tolist()
    assert sorted([*train.image_ids.tolist(), *val.image_ids.tolist()]) == [7, 17, 27, 37, 47, 57]
