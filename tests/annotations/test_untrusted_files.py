"""Files that are damaged, foreign or ambiguous: read as what they are, or refused in a sentence that names them."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from broken import clean, write, write_pictures
from PIL import Image

from fpn_det.annotations.files import read_file, read_text
from fpn_det.annotations.image_inspection import inspect_images
from fpn_det.annotations.masks import mask_extent
from fpn_det.annotations.parsing import parse_id, parse_number
from fpn_det.annotations.reading import CheckedDataset, check_raw, load_raw, read_annotations


def image(path: Path, size: tuple[int, int] = (80, 64), color: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (color, 9, 9)).save(path, "PNG")
    return path


def text(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def xml(path: Path, filename: str = "", name: str = "cat", x: int = 11, extra: str = "") -> Path:
    box = f"<bndbox><xmin>{x}</xmin><ymin>11</ymin><xmax>{x + 20}</xmax><ymax>30</ymax></bndbox>"
    stated = f"<filename>{filename}</filename>" if filename else ""
    return text(path, f"<annotation>{stated}<object><name>{name}</name>{extra}{box}</object></annotation>")


def yolo(root: Path, *names: str, labels: str = "0 .5 .5 .25 .5\n", description: str = "names: [cat]\n") -> Path:
    for number, name in enumerate(names):
        image(root / "images" / name, color=number)
        text((root / "labels" / name).with_suffix(".txt"), labels)
    text(root / "data.yaml", description)
    return root


def check(path: Path, split: str = "train", on_error: str = "fail", **options) -> CheckedDataset:
    return check_raw(load_raw(path, None, None, split), on_error=on_error, inspect=inspect_images, **options)  # type: ignore[arg-type]


def names_of(checked: CheckedDataset) -> list[str]:
    return [checked.annotations.path(row).name for row in range(len(checked.annotations))]


def kinds_of(checked: CheckedDataset) -> set[str]:
    return {finding.kind for finding in checked.findings}


# text files


@pytest.mark.parametrize("encoding", ["cp1252", "gbk", "shift_jis", "utf-16-le"])
def test_text_in_another_encoding_is_refused_with_its_line(tmp_path, encoding):
    word = {"cp1252": "M\u00e4use", "gbk": "\u72d7", "shift_jis": "\u732b", "utf-16-le": "cat"}[encoding]
    path = text(tmp_path / "a.txt", f"cat\n{word}\n".encode(encoding))
    with pytest.raises(ValueError, match=r"a.txt: expected UTF-8 text, got .* in line [12]. Save the file as UTF-8."):
        read_text(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_pipes_devices_and_folders_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a named pipe"), (Path("/dev/zero"), "a device"), (tmp_path, "a folder")):
        with pytest.raises(ValueError, match=f"expected a regular file, got {kind}"):
            read_file(path)
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(ValueError, match="a.json: expected a JSON file, .*a named pipe"):
        read_annotations(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a pointer of Git LFS: .*git lfs pull"),
        ("<!DOCTYPE html><html>404</html>", "an HTML page: download the file again"),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.csv", "data.yaml"])
def test_what_a_failed_download_left_is_named(tmp_path, name, content, words):
    with pytest.raises(ValueError, match=f"{name}: .*{words}"):
        read_annotations(text(tmp_path / name, content))


@pytest.mark.parametrize("value", ["1_0", "\u0663", "0x10", "ten", "", " ", None, [1], "nan", "1e999"])
def test_what_is_no_number_is_none(value):
    assert parse_number(value) != parse_number(value)  # NaN
    assert not isinstance(parse_id(value), int)


def test_numbers_are_read_from_strings_as_json_and_xml_write_them():
    assert [parse_number(value) for value in ("7", " 7.5 ", ".5", "-1e2", 7, 7.5)] == [7, 7.5, 0.5, -100, 7, 7.5]
    assert [parse_id(value) for value in ("7", 7, 7.0, "a7", " a ")] == [7, 7, 7, "a7", "a"]


# splits


def test_an_empty_list_is_refused(tmp_path):
    xml(tmp_path / "Annotations/a.xml")
    image(tmp_path / "JPEGImages/a.png")
    text(tmp_path / "ImageSets/Main/train.txt", "\n")
    with pytest.raises(ValueError, match=r"train.txt: expected a name in each line, got an empty list"):
        check(tmp_path)


@pytest.mark.parametrize(
    "description", ["train: images/train\ntest: \n", "train: images/train\ntest: null\n", "train: images/train\n"]
)
def test_a_split_that_is_not_stated_is_refused_with_those_that_are(tmp_path, description):
    yolo(tmp_path, "train/a.png", description="names: [cat]\n" + description)
    assert names_of(check(tmp_path)) == ["a.png"]
    with pytest.raises(ValueError, match=r"data.yaml: expected test or testing .* got train. Add it"):
        check(tmp_path, "test")


def test_a_split_without_a_folder_is_refused_with_the_folders_that_exist(tmp_path):
    yolo(tmp_path, "train/a.png", "val/b.png")
    assert names_of(check(tmp_path, "val")) == ["b.png"]
    with pytest.raises(
        ValueError, match=r"expected the folder images/test or test/images, got images/train, images/val"
    ):
        check(tmp_path, "test")


def test_folders_of_xml_files_for_each_split_need_one_for_this_split(tmp_path):
    for split in ("train", "valid"):
        xml(tmp_path / split / "a.xml")
        image(tmp_path / split / "a.png")
    assert check(tmp_path, "val").image_lists == (str(tmp_path / "valid"),)
    with pytest.raises(ValueError, match=r"expected a folder test or testing with XML files, got train, valid"):
        check_raw(load_raw(tmp_path, None, "voc", "test"))


def test_lists_divide_one_folder_and_labels_of_the_other_split_are_no_fault(tmp_path):
    yolo(tmp_path, "0.png", "1.png", description="names: [cat]\ntrain: train.txt\nval: val.txt\n")
    text(tmp_path / "train.txt", "images/0.png\n")
    text(tmp_path / "val.txt", "images/1.png\n")
    for split, name in (("train", "0.png"), ("val", "1.png")):
        checked = check(tmp_path, split)
        assert names_of(checked) == [name] and not checked.findings


# names


@pytest.mark.parametrize(
    ("stems", "lines", "expected"),
    [
        (["my photo 1", "b"], ["my photo 1", "b"], ["my photo 1.png", "b.png"]),
        (["a", "a 1"], ["a 1"], ["a 1.png"]),
        (["a", "b"], ["a  1", "b -1"], ["a.png", "b.png"]),
        (["a.b", "c"], ["a.b", "c.png"], ["a.b.png", "c.png"]),
        (["job/a", "b"], ["job/a", "b"], ["a.png", "b.png"]),
        (["job/a", "b"], [".\\job\\a", "JPEGImages/b.png"], ["a.png", "b.png"]),
    ],
)
def test_lists_of_voc_name_what_they_mean(tmp_path, stems, lines, expected):
    for number, stem in enumerate(stems):
        xml(tmp_path / f"Annotations/{stem}.xml")
        image(tmp_path / f"JPEGImages/{stem}.png", color=number)
    text(tmp_path / "ImageSets/Main/train.txt", "\n".join(lines))
    checked = check(tmp_path)
    assert names_of(checked) == expected and not checked.findings


def test_hidden_files_are_no_images_and_upper_case_endings_are(tmp_path):
    yolo(tmp_path, "train/a.png")
    text(tmp_path / "images/train/._a.png", "of another system")
    text(tmp_path / "images/train/.cache/b.png", "hidden")
    image(tmp_path / "images/train/B.PNG", color=5)
    text(tmp_path / "labels/train/B.TXT", "0 .5 .5 .5 .5\n")
    checked = check(tmp_path)
    assert names_of(checked) == ["B.PNG", "a.png"] and checked.annotations.boxes_per_image.tolist() == [1, 1]


def test_links_to_folders_are_followed_and_loops_end(tmp_path):
    yolo(tmp_path / "real", "a.png")
    root = tmp_path / "set"
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    (root / "images/train").symlink_to(tmp_path / "real/images")
    (root / "labels/train").symlink_to(tmp_path / "real/labels")
    (tmp_path / "real/images/loop").symlink_to(tmp_path / "real/images")
    text(root / "data.yaml", "names: [cat]\n")
    checked = check(root)
    assert names_of(checked) == ["a.png"] and len(checked.annotations.boxes) == 1


def test_two_images_that_share_a_label_file_are_left_out(tmp_path):
    yolo(tmp_path, "train/a.png", "train/b.png")
    image(tmp_path / "images/train/a.jpg", color=7)
    checked = check(tmp_path)
    assert names_of(checked) == ["b.png"]
    assert [finding.kind for finding in checked.findings] == ["label_file_shared"] * 2


def test_an_image_with_two_endings_is_the_one_that_filename_states_or_none(tmp_path):
    for suffix, color in (("png", 0), ("bmp", 1)):
        image(tmp_path / f"JPEGImages/a.{suffix}", color=color)
        image(tmp_path / f"JPEGImages/b.{suffix}", color=color + 2)
    xml(tmp_path / "Annotations/a.xml", "a.png")
    xml(tmp_path / "Annotations/b.xml")
    checked = check(tmp_path)
    assert names_of(checked) == ["a.png"] and "image_file_ambiguous" in kinds_of(checked)


def test_an_xml_file_belongs_to_the_image_of_its_own_name(tmp_path):
    for number, (stem, stated) in enumerate((("a", "b.png"), ("b", "a.png"), ("c", "c.png"))):
        image(tmp_path / f"JPEGImages/{stem}.png", color=number)
        xml(tmp_path / f"Annotations/{stem}.xml", stated, x=11 + 10 * number)
    checked = check(tmp_path)
    assert names_of(checked) == ["a.png", "b.png", "c.png"]
    assert checked.annotations.boxes[:, 0].tolist() == [10, 20, 30]
    assert [finding.kind for finding in checked.findings] == ["file_name_differs"] * 2


def test_an_xml_file_whose_image_is_gone_does_not_take_that_of_another(tmp_path):
    image(tmp_path / "JPEGImages/a.png")
    xml(tmp_path / "Annotations/a.xml", "a.png")
    xml(tmp_path / "Annotations/a_flip.xml", "a.png", x=31)
    checked = check(tmp_path, on_error="fix")
    assert checked.annotations.boxes[:, 0].tolist() == [10] and "image_file_missing" in kinds_of(checked)


def test_file_names_that_cannot_be_paths_are_named(tmp_path):
    write_pictures(tmp_path / "train")
    for name in ("a\0b.png", "\ud800.png", "x" * 300, "../" * 40 + "x.png"):
        document = clean()
        document["images"][0]["file_name"] = name
        with pytest.raises(ValueError, match="image_file_unnamed|image_file_missing"):
            read_annotations(write(document, tmp_path / "train.json"), tmp_path / "train", inspect=inspect_images)


def test_terminal_commands_in_names_are_escaped(tmp_path):
    write_pictures(tmp_path / "train")
    document = clean()
    document["images"][0]["file_name"] = "\x1b[2Jgone\n.png"
    document["categories"][0]["name"] = "\x1b]0;title\x07"
    document["categories"].append({"id": 5, "name": "\x1b]0;TITLE\x07"})
    with pytest.raises(ValueError, match="image_file_missing") as refusal:
        read_annotations(write(document, tmp_path / "train.json"), tmp_path / "train")
    assert "\x1b" not in str(refusal.value) and "\\x1b[2Jgone\\n.png" in str(refusal.value)


# classes


@pytest.mark.parametrize(
    "name", ["no", "on", "null", "~", "1e3", "012", "0x1F", "1.0", "2020-01-01", "12:30:45", "true", ".inf", "="]
)
def test_class_names_of_data_yaml_stay_as_written(tmp_path, name):
    yolo(tmp_path, "train/a.png", description=f"names: [{name}, dog]\n")
    assert check(tmp_path).annotations.class_names == (name, "dog")
    text(tmp_path / "data.yaml", f"names:\n  0: dog\n  1: {name}\nnc: 2\n")
    assert check(tmp_path).annotations.class_names == ("dog", name)


@pytest.mark.parametrize(
    ("description", "words"),
    [
        ("names: cat\n", "expected 'names' as a list or a table that counts from 0, got 'cat'"),
        ("names: {0: cat, 0: dog}\n", "a key comes twice"),
        ("names: {0: cat, 2: dog}\n", "got no class 1"),
        ("names: [cat, [dog]]\n", "expected a name for each class"),
        ("names: [cat, '']\n", "expected a name for each class"),
        ("names: [cat]\ntrain: {a: b}\n", "expected 'train' as a path or a list of paths"),
        ("names: [cat]\ntrain: true\n", "expected a path that exists, got 'true'"),
        (f"names: [cat]\ntrain: {'a' * 5000}\n", "expected a path that exists"),
        ("names: [cat]\npath: [a]\n", "expected 'path' as a folder"),
        ("names: [cat]\nkpt_shape: 17\n", "expected 'kpt_shape' as"),
        ("a: &a [1, 1]\nnames: [*a, *a]\n", "aliases are not allowed"),
        ("names: " + "[" * 1000 + "]" * 1000, "levels of nesting"),
        ("names: [cat]\nwhen: 2020-99-99\nnc: many\n", "expected as many names as 'nc' says"),
        ("- names\n", "expected 'names' with the names of the classes"),
    ],
)
def test_data_yaml_that_cannot_be_understood_is_refused_in_one_sentence(tmp_path, description, words):
    yolo(tmp_path, "train/a.png", description=description)
    with pytest.raises(ValueError, match="data.yaml") as refusal:
        check(tmp_path)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_yaml_file_of_many_megabytes_is_refused_at_once(tmp_path):
    yolo(tmp_path, "train/a.png", description="names: [cat]\nx: '" + "a" * (5 << 20) + "'\n")
    start = time.perf_counter()
    with pytest.raises(ValueError, match="expected at most 4 MiB of YAML"):
        check(tmp_path)
    assert time.perf_counter() - start < 1


def test_twenty_thousand_classes_are_matched_in_linear_time(tmp_path):
    write_pictures(tmp_path / "train")
    document = clean()
    document["categories"] = [{"id": number, "name": f"class {number}"} for number in range(20_000)]
    path = write(document, tmp_path / "train.json")
    others = [f"class {number}" for number in range(10_000, 30_000)]
    start = time.process_time()
    checked = check_raw(load_raw(path, tmp_path / "train"), others, on_error="fix")
    assert time.process_time() - start < 3  # 0.5 s; a step per pair of classes takes 8 s
    assert sum(finding.kind == "class_missing" for finding in checked.findings) == 10_000


def test_unreadable_files_are_named_if_no_file_can_be_read(tmp_path):
    image(tmp_path / "JPEGImages/a.png")
    text(tmp_path / "Annotations/a.xml", "<annotation><object><name>Gr\u00f6\u00dfe</name>".encode("cp1252"))
    with pytest.raises(ValueError, match=r"no_classes(?s:.*)annotation_file_unreadable(?s:.*)a.xml: expected XML"):
        read_annotations(tmp_path)


@pytest.mark.parametrize("encoding", ["gbk", "shift_jis", "cp1252", "utf-16"])
def test_xml_in_a_declared_encoding_is_read(tmp_path, encoding):
    name = "Gr\u00f6\u00dfe" if encoding == "cp1252" else "\u732b"
    image(tmp_path / "JPEGImages/a.png")
    xml(tmp_path / "Annotations/a.xml", name=name)
    content = f'<?xml version="1.0" encoding="{encoding}"?>' + (tmp_path / "Annotations/a.xml").read_text()
    text(tmp_path / "Annotations/a.xml", content.encode(encoding))
    assert check(tmp_path).annotations.class_names == (name,)


@pytest.mark.parametrize(
    "content",
    [
        '<?xml version="1.0" encoding="no-such-code"?><annotation/>',
        "<svg/>",
        "<annotation><name>salt & pepper</name></annotation>",
        "<!DOCTYPE a [<!ENTITY x 'x'>"
        + "".join(f"<!ENTITY {chr(97 + i)} '{f'&{chr(96 + i)};' * 10 if i else '&x;' * 10}'>" for i in range(9))
        + "]><annotation>&i;</annotation>",
        "<annotation>" + "<a>" * 100_000,
    ],
    ids=["encoding", "svg", "ampersand", "entities", "deep"],
)
def test_xml_that_cannot_be_read_is_a_finding(tmp_path, content):
    for stem in "ab":
        image(tmp_path / f"JPEGImages/{stem}.png", color=ord(stem))
        xml(tmp_path / f"Annotations/{stem}.xml")
    text(tmp_path / "Annotations/b.xml", content)
    checked = check(tmp_path)
    assert names_of(checked) == ["a.png"] and kinds_of(checked) == {"annotation_file_unreadable"}


# labels


@pytest.mark.parametrize(("count", "dims"), [(2, 2), (5, 2), (4, 3), (17, 3)])
def test_labels_with_keypoints_are_boxes_if_data_yaml_says_so(tmp_path, count, dims):
    keypoints = " ".join(["0.8 0.8 2" if dims == 3 else "0.8 0.8"] * count)
    description = f"names: [cat]\nkpt_shape: [{count}, {dims}]\n"
    yolo(tmp_path, "train/a.png", labels=f"0 0.5 0.5 0.25 0.5 {keypoints}\n", description=description)
    checked = check(tmp_path)
    assert checked.annotations.boxes.tolist() == [[30, 16, 50, 48]] and not checked.findings


def test_labels_that_may_be_keypoints_or_polygons_are_refused(tmp_path):
    yolo(tmp_path, "train/a.png", labels="0 0.5 0.5 0.25 0.5 0.4 0.5 0.6 0.5 0.5 0.6\n")
    checked = check(tmp_path)
    assert not len(checked.annotations.boxes) and "State kpt_shape" in str(checked.findings[0])


@pytest.mark.parametrize(
    "labels",
    [
        "0 .1 .2 .6 .2 .6 .7 .1 .7\n",  # an oriented box
        "0 .1 .2 .6 .2 .6 .7 .1 .7 .1 .2\n",  # closed
        "0 .1 .2 .6 .2 .6 .7 .1 .7 .3 .5\n0 .1 .2 .6 .2 .6 .7\n",  # of different lengths
    ],
)
def test_polygons_are_the_boxes_around_them(tmp_path, labels):
    yolo(tmp_path, "train/a.png", labels=labels)
    checked = check(tmp_path)
    assert checked.annotations.boxes[0].tolist() == pytest.approx([8, 12.8, 48, 44.8])


def test_an_image_whose_ending_is_not_read_is_named(tmp_path):
    yolo(tmp_path, "train/a.png", "train/b.png")
    (tmp_path / "images/train/b.png").rename(tmp_path / "images/train/b.xyz")
    (finding,) = check(tmp_path).findings
    assert "b.xyz, whose ending is not that of an image" in str(finding)


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "gif", "avif", "mpo", "jp2", "ppm"])
def test_every_format_that_is_decoded_is_found(tmp_path, suffix):
    yolo(tmp_path, "train/a.png", f"train/z.{suffix}")
    assert names_of(check(tmp_path)) == ["a.png", f"z.{suffix}"]


@pytest.mark.parametrize("mode", ["crowd", "keep", "drop"])
def test_flagged_objects_are_what_the_setting_says_and_are_reported(tmp_path, mode):
    write_pictures(tmp_path / "train")
    document = clean()
    document["annotations"][0]["ignore"] = 1
    write(document, tmp_path / "train.json")
    image(tmp_path / "voc/JPEGImages/a.png")
    xml(tmp_path / "voc/Annotations/a.xml", extra="<difficult>1</difficult>")
    for path, images, count in ((tmp_path / "train.json", tmp_path / "train", 10), (tmp_path / "voc", None, 1)):
        checked = check_raw(load_raw(path, images), flagged_objects=mode)  # type: ignore[arg-type]
        assert len(checked.annotations.boxes) == count - (mode == "drop")
        if mode != "drop":
            assert bool(checked.annotations.iscrowd[0]) == (mode == "crowd")
        (finding,) = checked.findings
        assert finding.severity == "warning" and f"(data.flagged_objects={mode})" in str(finding)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("file,x1,y1,x2,y2,class\na.png,1,1,9,9,{}\n".format("c" * 200_000), "that cannot be read: field larger than"),
        ("file,x1,y1,x2,y2,class,class\na.png,1,1,9,9,c,c\n", "expected each column once"),
    ],
)
def test_tables_that_cannot_be_read_are_refused(tmp_path, table, words):
    image(tmp_path / "a.png")
    with pytest.raises(ValueError, match=words):
        check(text(tmp_path / "a.csv", table))


def test_a_line_with_too_many_values_is_left_out_and_quoted_names_are_read(tmp_path):
    image(tmp_path / "a,b.png")
    lines = ["file,x1,y1,x2,y2,class", "a,b.png,1,1,9,9,c", '"a,b.png",1,1,9,9,c']
    checked = check(text(tmp_path / "a.csv", "\n".join(lines)))
    assert len(checked.annotations.boxes) == 1 and kinds_of(checked) == {"label_columns"}


def test_only_one_of_width_and_height_is_as_none(tmp_path):
    image(tmp_path / "a.png")
    lines = ["file,x1,y1,x2,y2,class,width,height", "a.png,1,1,9,9,c,80,", "a.png,2,2,9,9,c,,64"]
    checked = check(text(tmp_path / "a.csv", "\n".join(lines)))
    assert checked.annotations.sizes.tolist() == [[64, 80]] and not checked.findings


# fields of COCO that can be computed or are not needed


@pytest.mark.parametrize(
    ("mask", "box"),
    [
        ([[1, 2, 9, 2, 9, 8]], [1, 2, 8, 6]),
        ([[1, 2, 9, 2, 9, 8], [0, 5, 1, 5, 1, 6]], [0, 2, 9, 6]),
        ([1, 2, 9, 2, 9, 8], [1, 2, 8, 6]),
        # 4 x 3 px (h, w), down the columns: 5 zeros, 2 ones, 5 zeros: column 1, rows 1 and 2
        ({"size": [4, 3], "counts": [5, 2, 5]}, [1, 1, 1, 2]),
        ({"size": [4, 3], "counts": "525"}, [1, 1, 1, 2]),  # a digit is itself
        ({"size": [4, 3], "counts": [3, 2, 7]}, [0, 0, 2, 4]),  # over two columns
        ({"size": [4, 3], "counts": [12]}, None),
        ({"size": [4, 3], "counts": "\u00ff"}, None),
        ({"size": 4, "counts": [5, 2, 5]}, None),
        ([["a", "b", "c", "d"]], None),
        ([[1, 2, 3]], None),
        ([], None),
        ("mask", None),
    ],
)
def test_mask_extent(mask, box):
    assert mask_extent(mask) == box


def test_mask_extent_equals_pycocotools():
    mask_tools = pytest.importorskip("pycocotools.mask")
    numpy = pytest.importorskip("numpy")
    random = numpy.random.default_rng(0)
    for _ in range(50):
        pixels = numpy.asfortranarray((random.random((37, 23)) < 0.02).astype(numpy.uint8))
        if pixels.any():
            encoded = mask_tools.encode(pixels)
            expected = mask_tools.toBbox(encoded).tolist()
            assert mask_extent({"size": [37, 23], "counts": encoded["counts"].decode()}) == expected


def test_boxes_are_computed_from_masks(tmp_path):
    write_pictures(tmp_path / "train")
    document = clean()
    expected = check_raw(load_raw(write(document, tmp_path / "train.json"), tmp_path / "train")).annotations
    for record in document["annotations"]:
        x, y, w, h = record.pop("bbox")
        record["segmentation"] = [[x, y, x + w, y, x + w, y + h]]
    checked = check_raw(load_raw(write(document, tmp_path / "train.json"), tmp_path / "train"))
    assert checked.annotations.boxes.tolist() == expected.boxes.tolist()
    assert [(finding.kind, finding.severity) for finding in checked.findings] == [("box_from_mask", "warning")]


def test_a_list_of_images_without_annotations_is_read(tmp_path):
    write_pictures(tmp_path / "test")
    document = clean()
    del document["annotations"]
    checked = check_raw(load_raw(write(document, tmp_path / "test.json"), tmp_path / "test"), inspect=inspect_images)
    assert len(checked.annotations) == 6 and not len(checked.annotations.boxes)
    assert [(finding.kind, finding.severity) for finding in checked.findings] == [("no_annotations", "warning")]


def test_coco_url_replaces_a_missing_file_name(tmp_path):
    write_pictures(tmp_path / "train")
    (tmp_path / "other").mkdir()
    (tmp_path / "train/5.png").rename(tmp_path / "other/5.png")
    document = clean()
    for number, record in enumerate(document["images"]):
        del record["file_name"]
        folder = "other" if number == 5 else "elsewhere"
        record["coco_url"] = f"http://example.org/{folder}/{number}.png"
    (tmp_path / "train/other").symlink_to(tmp_path / "other")
    checked = check_raw(load_raw(write(document, tmp_path / "train.json"), tmp_path / "train"), inspect=inspect_images)
    assert names_of(checked) == [f"{number}.png" for number in range(6)]
    assert [finding.kind for finding in checked.findings] == ["file_name_from_url"]


def test_a_document_that_is_too_deep_or_too_large_a_number_is_refused(tmp_path):
    for content in ("[" * 100_000, '{"images": ' + "9" * 5000 + "}", b"\xff\xfe\x00", json.dumps({"images": {}})):
        with pytest.raises(ValueError, match="a.json: expected"):
            read_annotations(text(tmp_path / "a.json", content))


def test_a_file_name_of_300_letters_is_a_missing_file(tmp_path):
    xml(tmp_path / "Annotations/a.xml", "x" * 300 + ".png")
    xml(tmp_path / "Annotations/b.xml")
    image(tmp_path / "JPEGImages/b.png")
    checked = check(tmp_path)
    assert names_of(checked) == ["b.png"] and kinds_of(checked) == {"image_file_missing"}
