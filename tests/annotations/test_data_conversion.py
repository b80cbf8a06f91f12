"""Converted data sets hold the same annotations and images, and can be trained on."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fpn_det.annotations.conversion import Conversion, ConversionConfig, convert
from fpn_det.annotations.reading import read_annotations
from fpn_det.composition import compose
from fpn_det.structures import Annotations

CLASSES = ("zebra", "ant")  # an order that is not the alphabet's
SIZES = {"a.jpg": (48, 64), "b.png": (57, 31), "empty.jpg": (10, 20)}  # (h, w)


def draw(folder: Path, sizes: dict[str, tuple[int, int]], seed: int = 0) -> None:
    """Images of these sizes with different content."""
    draws = np.random.default_rng(seed)
    for name, (height, width) in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / name)


def document(sizes: dict[str, tuple[int, int]]) -> dict:
    """Four objects on the first image, the second of them a crowd, and two on the second."""
    corners = np.random.default_rng(0).uniform(0, 20, (6, 2)).tolist()
    return {
        "images": [
            {"id": n, "file_name": name, "height": h, "width": w}
            for n, (name, (h, w)) in enumerate(sizes.items(), start=1)
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


@pytest.fixture
def start(tmp_path) -> Path:
    """A data set in COCO's layout whose validation images have the names of the training images."""
    folder = tmp_path / "start"
    (folder / "annotations").mkdir(parents=True)
    for seed, split in enumerate(("train", "val")):
        draw(folder / f"{split}2017", SIZES, seed)
        (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(document(SIZES)))
    return folder


def run(source: str, target: str, path: Path, output: Path, **options) -> Conversion:
    return convert(ConversionConfig(source, target, str(path), str(output), **options))


def read(folder: Path, format: str, split: str) -> Annotations:
    """The data set of a folder as the command that is printed reads it."""
    words = [f"data.root={folder}"] if format == "coco" else [f"data={format}", f"data.root={folder}"]
    config = compose(["experiment=small", *words]).data
    return config.read_split(split, CLASSES, seed=0)


def contents(annotations: Annotations) -> dict[str, list[tuple]]:
    """For each image its size and (class, crowd) of the objects, by name."""
    found = {}
    for row in range(len(annotations)):
        objects = annotations.rows(row)
        kinds = zip(annotations.labels[objects].tolist(), annotations.iscrowd[objects].tolist(), strict=True)
        classes = [(annotations.class_names[label], crowd) for label, crowd in kinds]
        found[annotations.path(row).name] = [tuple(annotations.sizes[row].tolist()), *classes]
    return found


def pixels(annotations: Annotations) -> dict[str, bytes]:
    return {annotations.path(row).name: annotations.path(row).read_bytes() for row in range(len(annotations))}


def assert_same(found: Annotations, expected: Annotations, with_crowd: bool) -> None:
    wanted = contents(expected)
    if not with_crowd:
        wanted = {name: [kinds[0], *(kind for kind in kinds[1:] if not kind[1])] for name, kinds in wanted.items()}
    assert contents(found) == wanted
    kept = slice(None) if with_crowd else ~expected.iscrowd
    np.testing.assert_allclose(found.boxes, expected.boxes[kept], atol=1e-8)
    assert pixels(found) == pixels(expected)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("target", ["coco", "voc", "yolo", "csv"])
def test_round_trip_keeps_splits_boxes_and_images(start, tmp_path, target, offset):
    """There and back through each format, and each step can be trained on as printed."""
    if offset == 0 and target != "voc":
        pytest.skip("only VOC counts pixels")
    there = run("coco", target, start, tmp_path / "there", pixel_offset=offset)
    run(target, "coco", tmp_path / "there", tmp_path / "back", pixel_offset=offset, classes=list(CLASSES))
    assert bool(there.remarks) == (target in ("yolo", "csv"))  # two crowd regions are left out
    for split in ("train", "val"):
        expected = read(start, "coco", split)
        assert_same(read(tmp_path / "back", "coco", split), expected, with_crowd=not there.remarks)
        if offset == 1:  # the standard is what is read without a word about it
            assert_same(read(tmp_path / "there", target, split), expected, with_crowd=not there.remarks)


def test_all_formats_in_a_row_keep_everything_but_crowds(start, tmp_path):
    formats = ["coco", "voc", "csv", "yolo", "voc", "yolo", "csv", "coco"]
    path = start
    for number, (source, target) in enumerate(itertools.pairwise(formats)):
        run(source, target, path, tmp_path / str(number), classes=list(CLASSES))
        path = tmp_path / str(number)
    for split in ("train", "val"):
        assert_same(read(path, "coco", split), read(start, "coco", split), with_crowd=False)
    assert all(item.resolve().is_relative_to(start) for item in path.rglob("*.jpg"))  # not links to links


def test_coco_written_has_ids_from_one_and_areas(tmp_path):
    content = document(SIZES)
    content["annotations"] = [
        {"id": 70, "image_id": 1, "category_id": 30, "bbox": [1, 2, 3.5, 4], "area": 11, "iscrowd": 0}
    ]
    content["categories"] = [{"id": 9, "name": "zebra"}, {"id": 30, "name": "ant"}]
    (tmp_path / "start.json").write_text(json.dumps(content))
    run("coco", "coco", tmp_path / "start.json", tmp_path / "end", pictures="none")
    found = json.loads((tmp_path / "end/annotations/instances_train2017.json").read_text())
    assert found["images"] == content["images"]
    assert found["annotations"] == [
        {"id": 1, "image_id": 1, "category_id": 2, "bbox": [1.0, 2.0, 3.5, 4.0], "area": 11.0, "iscrowd": 0}
    ]
    assert found["categories"] == [{"id": 1, "name": "zebra"}, {"id": 2, "name": "ant"}]
    assert sorted(path.name for path in (tmp_path / "end").iterdir()) == ["annotations"]


@pytest.mark.parametrize("pictures", ["link", "copy"])
def test_images_are_linked_or_copied(start, tmp_path, pictures):
    run("coco", "yolo", start, tmp_path / "end", pictures=pictures)
    image = tmp_path / "end/images/val/a.jpg"
    assert image.is_symlink() == (pictures == "link")
    assert image.read_bytes() == (start / "val2017/a.jpg").read_bytes()


def test_images_are_copied_where_links_are_not_possible(start, tmp_path, monkeypatch):
    def refuse(self, target):
        raise OSError(errno.EPERM, "Operation not permitted", str(self))

    monkeypatch.setattr(Path, "symlink_to", refuse)
    result = run("coco", "csv", start, tmp_path / "end")
    assert any("copied: links are not possible" in remark for remark in result.remarks)
    assert (tmp_path / "end/images/val/a.jpg").read_bytes() == (start / "val2017/a.jpg").read_bytes()


@pytest.fixture
def many(tmp_path) -> Path:
    """20 images in one folder: six are copies of one, two of another."""
    sizes = {f"{number:02}.png": (16, 16 + number) for number in range(20)}
    draw(tmp_path / "many", sizes)
    for original, copies in {"00.png": range(1, 6), "07.png": [13]}.items():
        for number in copies:
            shutil.copy(tmp_path / "many" / original, tmp_path / "many" / f"{number:02}.png")
            sizes[f"{number:02}.png"] = sizes[original]
    content = document(sizes)
    content["annotations"] = [
        {"id": n, "image_id": n, "category_id": 1, "bbox": [1, 1, 8, 8], "area": 64, "iscrowd": 0} for n in range(1, 21)
    ]
    (tmp_path / "many" / "all.json").write_text(json.dumps(content))
    return tmp_path / "many" / "all.json"


def names_by_split(result: Conversion) -> dict[str, set[str]]:
    parts = {split: dataset.annotations for split, dataset in result.splits.items()}
    return {split: {part.path(row).stem for row in range(len(part))} for split, part in parts.items()}


def test_shares_are_drawn_by_the_seed_and_keep_equal_files_together(many, tmp_path):
    draws = []
    for number in range(8):
        result = run("coco", "yolo", many, tmp_path / f"end{number}", val="0.25", test="0.2", seed=number // 2)
        names = names_by_split(result)
        assert {split: len(found) for split, found in names.items()} == {"train": 11, "val": 5, "test": 4}
        assert set.union(*names.values()) == {f"{n:02}" for n in range(20)}
        for same in ({f"{n:02}" for n in range(6)}, {"07", "13"}):
            assert sum(bool(found & same) for found in names.values()) == 1
        draws.append(names)
    assert all(draws[n] == draws[n + 1] for n in range(0, 8, 2))
    assert any(draws[0] != other for other in draws[2::2])
    assert {path.name for path in (tmp_path / "end0/images").iterdir()} == {"train", "val", "test"}


def test_a_list_takes_equal_files_along(many, tmp_path):
    (tmp_path / "val.txt").write_text("images/07.png\n\n09\n")
    names = names_by_split(run("coco", "voc", many, tmp_path / "end", val=str(tmp_path / "val.txt"), test="0.1"))
    assert names["val"] == {"07", "09", "13"} and len(names["test"]) == 2 and len(names["train"]) == 15
    assert (tmp_path / "end/ImageSets/Main/val.txt").read_text() == "07\n09\n13\n"


@pytest.mark.parametrize(
    ("val", "test", "words"),
    [
        ("0.001", None, "val: expected an image at least, got none of 14 different images"),
        ("0.6", "0.4", "train: expected an image at least"),
        ("1.5", None, "val: expected a share between 0 and 1 or a file, got 1.5"),
        ("list:07.png", "list:13", "val: expected images that no other split has, got 07.png, which is in test too"),
        ("list:7.png", None, r"got '7.png': there are none \(near: .*07.png"),
        ("list: ", None, "expected a name in each line, got an empty list"),
    ],
)
def test_impossible_splits_are_refused_before_anything_is_written(many, tmp_path, val, test, words):
    def part(split: str, text: str | None) -> str | None:
        if text is None or not text.startswith("list:"):
            return text
        (tmp_path / f"{split}.txt").write_text(text.removeprefix("list:"))
        return str(tmp_path / f"{split}.txt")

    with pytest.raises(ValueError, match=words):
        run("coco", "yolo", many, tmp_path / "end", val=part("val", val), test=part("test", test))
    assert not (tmp_path / "end").exists()


def test_an_image_of_two_splits_is_refused_or_leaves_training(start, tmp_path):
    shutil.copy(start / "train2017/a.jpg", start / "val2017/a.jpg")
    with pytest.raises(ValueError, match=r"image_copied_to_two_splits(.|\n)*val has a copy with the same bytes"):
        run("coco", "yolo", start, tmp_path / "end")
    names = names_by_split(run("coco", "yolo", start, tmp_path / "end", on_error="fix"))
    assert names == {"train": {"b", "empty"}, "val": {"a", "b", "empty"}}


def test_a_validation_set_that_is_the_training_set_is_left_out(many, tmp_path):
    result = run("coco", "yolo", many, tmp_path / "end", val=str(many))
    assert list(result.splits) == ["train"] and "val has the images of train" in result.describe()


def test_a_split_that_the_source_has_is_not_replaced(start, tmp_path):
    with pytest.raises(ValueError, match="val: the data set has this split already"):
        run("coco", "yolo", start, tmp_path / "end", val="0.1")


def test_an_existing_folder_stays_as_it_is(start, tmp_path):
    (tmp_path / "end").mkdir()
    (tmp_path / "end" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="output: expected a new or empty folder, got .*end. Choose another one"):
        run("coco", "yolo", start, tmp_path / "end")
    assert [path.name for path in (tmp_path / "end").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("pictures", ["link", "copy"])
def test_an_interruption_leaves_nothing_and_a_kill_does_not_matter(start, tmp_path, monkeypatch, pictures):
    (tmp_path / ".end.unfinished").mkdir()  # of a conversion that was killed
    (tmp_path / ".end.unfinished" / "old").touch()
    before = set(tmp_path.rglob("*")) - {tmp_path / ".end.unfinished", tmp_path / ".end.unfinished" / "old"}
    calls = []

    def interrupt(*arguments) -> None:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        place(*arguments)

    place = shutil.copyfile if pictures == "copy" else Path.symlink_to
    monkeypatch.setattr(*((shutil, "copyfile") if pictures == "copy" else (Path, "symlink_to")), interrupt)
    with pytest.raises(KeyboardInterrupt):
        run("coco", "yolo", start, tmp_path / "end", pictures=pictures)
    assert set(tmp_path.rglob("*")) == before
    monkeypatch.undo()
    run("coco", "yolo", start, tmp_path / "end", pictures=pictures)
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "end", *(tmp_path / "end").rglob("*")}
    assert not list((tmp_path / "end").rglob("old"))


@pytest.mark.parametrize("target", ["voc", "yolo", "csv", "coco"])
def test_images_in_folders_of_any_name_keep_their_labels(tmp_path, target):
    """The last `images` of a path is where YOLO's readers put `labels`; a.jpg is in two folders."""
    sizes = {"x/images/a.jpg": (48, 64), "x/images/deep/a.jpg": (57, 31), "x/b.jpg": (10, 20)}
    draw(tmp_path, sizes)
    (tmp_path / "start.json").write_text(json.dumps(document(sizes)))
    run("coco", target, tmp_path / "start.json", tmp_path / "end")
    found = read(tmp_path / "end", target, "train")
    counts = {
        tuple(found.path(row).relative_to(tmp_path / "end").parts[-2:]): len(found.boxes[found.rows(row)])
        for row in range(len(found))
    }
    last = {"voc": "JPEGImages", "coco": "train2017"}.get(target, "train")
    crowd = target in ("voc", "coco")
    assert counts == {("images", "a.jpg"): 3 + crowd, ("deep", "a.jpg"): 2, (last, "b.jpg"): 0}


@pytest.mark.parametrize("target", ["voc", "yolo"])
def test_two_images_that_differ_by_their_ending_are_refused(tmp_path, target):
    sizes = {"a.jpg": (48, 64), "a.png": (57, 31)}
    draw(tmp_path, sizes)
    (tmp_path / "start.json").write_text(json.dumps(document(sizes)))
    with pytest.raises(ValueError, match="got 'a' more than once: a.jpg and a.png"):
        run("coco", target, tmp_path / "start.json", tmp_path / "end")
    assert not (tmp_path / "end").exists()


@pytest.mark.parametrize("name", ["/etc/a.jpg", "../../a.jpg", "x/../../a.jpg"])
@pytest.mark.parametrize("target", ["voc", "yolo"])
def test_nothing_is_written_outside_of_the_output(tmp_path, target, name):
    content = document(SIZES)
    content["images"][0]["file_name"] = name
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "start.json").write_text(json.dumps(content))
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="which would be outside of the output"):
        run("coco", target, tmp_path / "in" / "start.json", tmp_path / "out" / "deep", pictures="none")
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("names", [("no", "1e3"), ("012", "null"), ("a: b", "#c"), ("M\u00e4use", "M\u00f6use")])
@pytest.mark.parametrize("target", ["yolo", "csv", "voc"])
def test_class_names_survive_every_format(tmp_path, target, names):
    content = document(SIZES)
    for record, name in zip(content["categories"], names, strict=True):
        record["name"] = name
    draw(tmp_path, SIZES)
    (tmp_path / "start.json").write_text(json.dumps(content))
    run("coco", target, tmp_path / "start.json", tmp_path / "end")
    output = tmp_path / "end" / "train.csv" if target == "csv" else tmp_path / "end"
    assert set(read_annotations(output, format=target).class_names) == set(names)


def test_classes_of_all_splits_are_written(tmp_path):
    """The tables of a CSV set name the classes that occur, which need not be all in each."""
    draw(tmp_path, {"a.jpg": (10, 20)}, seed=1)
    draw(tmp_path, {"b.jpg": (10, 20)}, seed=2)
    for split, row in {"train": "a.jpg,1,1,9,9,cat", "val": "b.jpg,1,1,9,9,dog"}.items():
        (tmp_path / f"{split}.csv").write_text(f"file,x1,y1,x2,y2,class\n{row}\n")
    result = run("csv", "yolo", tmp_path, tmp_path / "end")
    assert result.splits["val"].annotations.class_names == ("cat", "dog")
    assert (tmp_path / "end/data.yaml").read_text() == (
        "train: images/train\nval: images/val\nnames:\n  0: cat\n  1: dog\n"
    )
    assert (tmp_path / "end/labels/val/b.txt").read_text() == "1 0.25 0.5 0.4 0.8\n"  # (1 + 9) / 2 / 20, ... / 10


def test_faults_end_the_conversion_or_are_repaired_in_what_is_written(run_tool, tmp_path):
    content = document(SIZES)
    content["annotations"][0]["bbox"] = [60, 40, 10, 20]
    content["annotations"][2]["category_id"] = 3
    (tmp_path / "start.json").write_text(json.dumps(content))
    words = ["source=coco", "target=csv", "input=start.json", "output=end", "pictures=none"]
    failed = run_tool("convert_data.py", *words)
    assert failed.returncode == 2 and not (tmp_path / "end").exists()
    assert "box_partly_outside" in failed.stderr and " on_error=fix" in failed.stderr
    assert "annotation 3: expected the id of a category" in failed.stderr
    assert run_tool("convert_data.py", *words, "on_error=fix").returncode == 0
    lines = (tmp_path / "end/train.csv").read_text().splitlines()
    assert lines[1] == "a.jpg,64,48,60.0,40.0,64.0,48.0,zebra"


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["classes=[Zebra,ant]"], "class 'Zebra' of the training set is 'zebra' here"),
        (["pixel_offset=0"], "pixel_offset: has no effect here"),
        (["input=nowhere"], "input: expected a path that exists"),
        (["input=start"], "input: expected a folder with annotations/instances_train.json"),
    ],
)
def test_options_that_do_not_fit_are_refused(run_tool, tmp_path, words, answer):
    (tmp_path / "start").mkdir()
    (tmp_path / "start.json").write_text(json.dumps(document(SIZES)))
    failed = run_tool(
        "convert_data.py", "source=coco", "target=csv", "input=start.json", "output=end", "pictures=none", *words
    )
    assert failed.returncode == 2 and answer in failed.stderr and not (tmp_path / "end").exists()


@pytest.mark.parametrize("target", ["coco", "voc", "yolo", "csv"])
def test_the_printed_command_names_data_that_can_be_trained_on(run_tool, many, tmp_path, target):
    words = ["source=coco", f"target={target}", f"input={many}", "output=my set", "val=0.25"]
    printed = run_tool("convert_data.py", *words)
    assert printed.returncode == 0, printed.stderr
    command = shlex.split(printed.stdout.splitlines()[-1])
    assert command[:2] == ["fpn-det", "train"]
    data = compose(command[2:]).data.read_train_and_val(seed=0)
    assert (len(data.train), len(data.val)) == (15, 5) and not any(data.findings.values())


@pytest.mark.skipif("FPN_DET_DATA" not in os.environ, reason="FPN_DET_DATA names no folder with real pictures")
@pytest.mark.slow
def test_real_pictures_go_round_all_formats(tmp_path):
    path = Path(os.environ["FPN_DET_DATA"]) / "bccd"
    formats = ["voc", "yolo", "csv", "coco", "voc"]
    for source, target in itertools.pairwise(formats):
        result = run(source, target, path, tmp_path / target, on_error="fix" if source == "voc" else "fail")
        path = tmp_path / target
        counts = {split: (len(d.annotations), len(d.annotations.boxes)) for split, d in result.splits.items()}
        assert counts == {"train": (205, 2804), "val": (87, 1137), "test": (72, 945)}  # 4,888 boxes, less two
