from __future__ import annotations

import pytest
import torch

from fpn_det.annotations import check_objects
from fpn_det.annotations.reading import read_annotations
from fpn_det.annotations.subsets import drop_empty, select_images, split_images


def test_read_annotations_gives_corners_and_labels_by_category_id(document, write, pictures):
    annotations = read_annotations(write(document), pictures)
    assert annotations.class_names == ("cat", "dog")
    assert annotations.category_ids == (3, 90)
    assert annotations.image_ids.tolist() == [7, 17, 27, 37, 47, 57, 67, 77]
    assert annotations.sizes[1].tolist() == [64, 48]
    assert annotations.offsets.tolist() == [0, 2, 4, 4, 6, 8, 10, 12, 14]
    # image 3: x 2 + 3, y 3 and 13, width 20 + 3, height 15 and 16
    assert annotations.boxes[annotations.rows(3)].tolist() == [[5, 3, 28, 18], [5, 13, 28, 29]]
    assert annotations.labels[annotations.rows(3)].tolist() == [0, 1]
    assert annotations.area[annotations.rows(3)].tolist() == [23 * 15 / 2, 23 * 16 / 2]
    assert annotations.iscrowd.tolist() == [False, False, True, True] + [False] * 10
    assert annotations.path(4) == pictures / "4.png"


def test_read_annotations_does_not_depend_on_the_order_of_the_annotations(document, write, pictures):
    sound = read_annotations(write(document), pictures)
    document["annotations"] = document["annotations"][::2] + document["annotations"][1::2]
    mixed = read_annotations(write(document), pictures)
    assert torch.equal(mixed.boxes, sound.boxes)
    assert torch.equal(mixed.labels, sound.labels)


@pytest.mark.parametrize("ids", [(0, 1), (1, 2), (7, 90), (90, 7)])
def test_read_annotations_matches_classes_by_name_whatever_the_ids(document, write, pictures, ids):
    sound = read_annotations(write(document), pictures)
    new = {3: ids[0], 90: ids[1]}
    for record in document["annotations"]:
        record["category_id"] = new[record["category_id"]]
    document["categories"] = [{"id": ids[0], "name": "cat"}, {"id": ids[1], "name": "dog"}]
    other = read_annotations(write(document), pictures, sound.class_names)
    assert other.class_names == sound.class_names
    assert other.category_ids == ids
    assert torch.equal(other.labels, sound.labels)


def test_read_annotations_selects_classes(document, write, pictures):
    annotations = read_annotations(write(document), pictures, ["dog"], subset=True)
    assert annotations.class_names == ("dog",)
    assert annotations.labels.tolist() == [0] * 7
    assert annotations.offsets.tolist() == [0, 1, 2, 2, 3, 4, 5, 6, 7]


def test_read_annotations_names_classes_that_differ(document, write, pictures):
    with pytest.raises(
        ValueError,
        match=r"(?s)'Cat'.*is 'cat' here.*'bird' of the training set is missing.*'dog' is not in the training set",
    ):
        read_annotations(write(document), pictures, ["Cat", "bird"])
    fixed = read_annotations(write(document), pictures, ["Cat", "bird"], on_error="fix")
    assert fixed.class_names == ("Cat", "bird")
    assert fixed.category_ids == (3, 91)  # the class without objects gets an id that is free
    assert fixed.labels.tolist() == [0] * 7


def test_read_annotations_refuses_a_class_that_is_not_there(document, write, pictures):
    with pytest.raises(ValueError, match=r"data\.classes, got no 'dgo' \(near: 'dog'\)"):
        read_annotations(write(document), pictures, ["dgo"], subset=True, on_error="fix")


def first(document):
    return document["annotations"][0]


BOX_FAULTS = {
    "box_not_numbers": [
        [1, 2, float("nan"), 4],
        [1, 2, float("inf"), 4],
        [1, 2, 3],
        None,
        "1 2 3 4",
        [1, None, 3, 4],
        [1, 2, 3, 10**400],
    ],
    "box_without_area": [[1, 2, 0, 4], [1, 2, 5, -4], [30, 2, 1e-15, 5]],
    "box_outside": [[64, 3, 5, 5], [-9, 3, 5, 5], [3, 480, 5, 5]],
}


@pytest.mark.parametrize(("kind", "box"), [(kind, box) for kind, boxes in BOX_FAULTS.items() for box in boxes])
def test_box_fault_is_named_and_left_out(document, write, pictures, kind, box):
    first(document)["bbox"] = box
    with pytest.raises(
        ValueError, match=rf"(?s)instances.json: .*1 fault.*{kind}.*image 7 \(0.png\), annotation 1: .*bbox"
    ):
        read_annotations(write(document), pictures)
    assert read_annotations(write(document), pictures, on_error="fix").annotation_ids.tolist() == list(range(2, 15))


def test_box_over_the_border_is_clipped_or_left_out(document, write, pictures):
    first(document)["bbox"] = [-3, 40, 10, 20]
    with pytest.raises(ValueError, match="box_partly_outside"):
        read_annotations(write(document), pictures)
    assert read_annotations(write(document), pictures, on_error="fix").boxes[0].tolist() == [0, 40, 7, 48]
    assert read_annotations(write(document), pictures, on_error="skip").annotation_ids[0] == 2


def test_box_over_the_border_by_a_rounding_is_clipped_silently(document, write, pictures, caplog):
    first(document)["bbox"] = [-0.4, 40, 64.9, 8.7]
    assert read_annotations(write(document), pictures).boxes[0].tolist() == [0, 40, 64, 48]
    assert not caplog.records


def test_rare_box_faults_of_a_large_set_are_warnings(document, write, pictures, monkeypatch, caplog):
    monkeypatch.setattr(check_objects, "TOLERATED_SHARE", 1 / 14)  # as if the 14 boxes were 100,000
    first(document)["bbox"] = [1, 2, 3, 0]
    assert len(read_annotations(write(document), pictures).boxes) == 13
    assert "box_without_area (1)" in caplog.text
    document["annotations"][1]["bbox"] = [1, 2, 3, 0]
    with pytest.raises(ValueError, match="2 fault"):
        read_annotations(write(document), pictures)


@pytest.mark.parametrize("value", [0, 2, -3, None, "x", 10**30, 1e300])
def test_annotation_id_is_renumbered(document, write, pictures, value):
    first(document)["id"] = value
    with pytest.raises(ValueError, match=r"annotation_id"):
        read_annotations(write(document), pictures)
    assert read_annotations(write(document), pictures, on_error="fix").annotation_ids.tolist() == list(range(1, 15))


@pytest.mark.parametrize("key", ["area", "iscrowd"])
def test_missing_field_is_filled(document, write, pictures, key):
    for record in document["annotations"]:
        del record[key]
    with pytest.raises(ValueError, match=rf"(?s){key}_missing \(14\).*annotation 5.*and 9 more"):
        read_annotations(write(document), pictures)
    fixed = read_annotations(write(document), pictures, on_error="fix")
    if key == "area":
        assert fixed.area[:2].tolist() == [20 * 15, 20 * 16]
    else:
        assert not fixed.iscrowd.any()


@pytest.mark.parametrize(("key", "kind"), [("image_id", "image_unknown"), ("category_id", "class_unknown")])
@pytest.mark.parametrize("value", [333, None, "x", [7], True])
def test_unknown_id_is_named_and_left_out(document, write, pictures, key, kind, value):
    first(document)[key] = value
    with pytest.raises(ValueError, match=rf"(?s){kind}.*annotation 1"):
        read_annotations(write(document), pictures)
    assert len(read_annotations(write(document), pictures, on_error="fix").boxes) == 13


def test_image_listed_twice_counts_once(document, write, pictures):
    document["images"].append(dict(document["images"][0]))
    with pytest.raises(ValueError, match=r"(?s)image_id_duplicate.*image 7 \(0.png\): this image is listed twice"):
        read_annotations(write(document), pictures)
    fixed = read_annotations(write(document), pictures, on_error="fix")
    assert len(fixed) == 8
    assert len(fixed.boxes) == 14


def test_images_that_share_an_id_are_left_out_with_their_boxes(document, write, pictures):
    document["images"][1]["id"] = 7
    with pytest.raises(ValueError, match=r"(?s)image_id_duplicate.*image 7 \(1.png\): 2 different files have this id"):
        read_annotations(write(document), pictures)
    fixed = read_annotations(write(document), pictures, on_error="skip")
    assert fixed.image_ids.tolist() == [27, 37, 47, 57, 67, 77]
    assert len(fixed.boxes) == 10


def test_missing_file_is_named_and_left_out(document, write, pictures):
    document["images"][0]["file_name"] = "00.png"
    with pytest.raises(
        ValueError, match=rf"(?s)image_file_missing.*image 7 \(00.png\): no file {pictures}/00.png, but 0.png"
    ):
        read_annotations(write(document), pictures)
    assert len(read_annotations(write(document), pictures, on_error="fix")) == 7


@pytest.mark.parametrize("name", ["0.PNG", "C:\\data\\0.png", "/home/somebody/set/0.png", "train/0.png", " 0.png"])
def test_file_under_another_name_is_found(document, write, pictures, name):
    document["images"][0]["file_name"] = name
    with pytest.raises(ValueError, match=rf"(?s)image_file_missing.*image 7.*, but {pictures}/0.png"):
        read_annotations(write(document), pictures)
    assert read_annotations(write(document), pictures, on_error="fix").path(0) == pictures / "0.png"
    assert len(read_annotations(write(document), pictures, on_error="skip")) == 7


def test_missing_size_is_read_from_the_file(document, write, pictures):
    del document["images"][1]["width"]
    with pytest.raises(ValueError, match=r"(?s)image_size_missing.*image 17 \(1.png\): width None, height 64"):
        read_annotations(write(document), pictures)
    assert read_annotations(write(document), pictures, on_error="fix").sizes[1].tolist() == [64, 48]
    assert len(read_annotations(write(document), pictures, on_error="skip")) == 7


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "expected a JSON file"),
        ("[]", "no table 'images' .found: a list"),
        ('{"images": [], "annotations": []}', "no table 'categories'"),
        ('{"images": [1], "annotations": [], "categories": []}', "no table 'images'"),
        ('{"images": [], "annotations": [], "categories": []}', "at least one category"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1}]}', "integer id and a name"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}', "at least one usable image"),
    ],
)
def test_read_annotations_refuses_what_is_no_coco_file(tmp_path, text, words):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_annotations(path)


def test_missing_path_is_named_with_similar_names(tmp_path):
    (tmp_path / "annotations").mkdir()
    for name in ("instances_train2017.json", "instances_val2017.json", "other.txt"):
        (tmp_path / "annotations" / name).touch()
    with pytest.raises(
        ValueError, match=r"annotations: .*instances_train.json; .*Did you mean .*instances_train2017.json"
    ):
        read_annotations(tmp_path / "annotations" / "instances_train.json", None)
    with pytest.raises(ValueError, match=rf"{tmp_path}/annotation is not there. Did you mean {tmp_path}/annotations"):
        read_annotations(tmp_path / "annotation" / "x.json", None)


def test_read_annotations_refuses_an_unknown_policy(document, write, pictures):
    with pytest.raises(ValueError, match="expected fail, fix or skip, got 'ignore'"):
        read_annotations(write(document), pictures, on_error="ignore")  # type: ignore[arg-type]


def test_select_images_keeps_each_image_whole(document, write, pictures):
    annotations = read_annotations(write(document), pictures)
    rows = torch.tensor([6, 2, 0])
    chosen = select_images(annotations, rows)
    assert chosen.image_ids.tolist() == [67, 27, 7]
    for new, old in enumerate(rows.tolist()):
        assert chosen.path(new) == annotations.path(old)
        assert torch.equal(chosen.boxes[chosen.rows(new)], annotations.boxes[annotations.rows(old)])
        assert torch.equal(chosen.annotation_ids[chosen.rows(new)], annotations.annotation_ids[annotations.rows(old)])
    assert len(select_images(annotations, rows[:0])) == 0


def test_drop_empty_drops_images_without_objects_and_with_crowds_only(document, write, pictures):
    kept = drop_empty(read_annotations(write(document), pictures))
    assert kept.image_ids.tolist() == [7, 37, 47, 57, 67, 77]


def test_split_images_covers_all_images_once(document, write, pictures):
    annotations = read_annotations(write(document), pictures)
    train, val = split_images(annotations, 0.25, seed=0)
    assert (len(train), len(val)) == (6, 2)
    assert sorted(train.image_ids.tolist() + val.image_ids.tolist()) == annotations.image_ids.tolist()
    assert train.class_names == val.class_names == annotations.class_names
    with pytest.raises(ValueError, match=r"data\.val_fraction"):
        split_images(annotations, 0.01, seed=0)


def test_real_annotations_are_sound(coco128):
    train = read_annotations(coco128 / "annotations/instances_train2017.json", coco128 / "train2017")
    val = read_annotations(coco128 / "annotations/instances_val2017.json", coco128 / "val2017", train.class_names)
    assert (len(train), len(val)) == (128, 128)
    assert train.num_classes == 80
    assert (train.category_ids[0], train.category_ids[-1]) == (1, 90)
    assert (train.iscrowd.sum(), val.iscrowd.sum()) == (6, 5)
    assert len(drop_empty(train)) == 126
