"""The drawn data set: exact boxes, honest labels, the same bytes every time."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import cv2
import make_shapes
import numpy as np
import pytest
from make_shapes import CONTOURS, draw_scene, draw_stamp, pose

SIZE = (192, 192)


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene(np.random.default_rng([7, index]), SIZE, tuple(CONTOURS)) for index in range(200)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def inside(contours, size, samples):
    """By the even-odd rule: which of `samples` points per pixel and axis a shape contains; bool [h * samples, w * samples]."""
    y, x = np.meshgrid(*((np.arange(side * samples) + 0.5) / samples for side in size), indexing="ij")
    result = np.zeros(x.shape, bool)
    for contour in contours:
        for (x1, y1), (x2, y2) in zip(contour, np.roll(contour, -1, axis=0), strict=True):
            if y1 != y2:
                result ^= ((y1 > y) != (y2 > y)) & (x < (x2 - x1) * (y - y1) / (y2 - y1) + x1)
    return result


@pytest.mark.parametrize(
    "corner", [(5.3, 8.7), (-6.2, 3.1), (27.9, 30.4)], ids=["inside", "over the left", "over the corner"]
)
@pytest.mark.parametrize("name", CONTOURS)
def test_stamp_covers_what_the_contours_enclose(name, corner):
    size, samples = (48, 44), 6
    contours = [contour + corner for contour in pose(name, side=23.0, rng=np.random.default_rng(3))]
    stamp = draw_stamp(contours, size)
    expected = inside(contours, size, samples)
    coverage = np.zeros(size)
    coverage[stamp.window] = stamp.coverage
    # cv2 counts a fine pixel in that an edge touches: half a fine pixel (1/8 px) more, all around
    exact = expected.reshape(size[0], samples, size[1], samples).mean(axis=(1, 3))
    assert np.abs(coverage - exact).max() < 0.4 and np.abs(coverage - exact).mean() < 0.02
    steps = np.linspace(0, 1, 1000)[:, None, None]
    edges = np.concatenate(
        [(contour + steps * (np.roll(contour, -1, axis=0) - contour)).reshape(-1, 2) for contour in contours]
    )
    visible = edges[((edges >= 0) & (edges <= size[::-1])).all(axis=1)]
    np.testing.assert_allclose(stamp.box, [*visible.min(axis=0), *visible.max(axis=0)], atol=0.26)
    assert stamp.area == pytest.approx(coverage.sum(), abs=0.5)


def test_stamp_box_is_tight_around_the_covered_pixels(scenes):
    for _, objects in scenes:
        for _, stamp in objects:
            rows, columns = stamp.window
            covered_rows, covered_columns = (np.flatnonzero(stamp.coverage.any(axis=axis)) for axis in (1, 0))
            x1, y1, x2, y2 = stamp.box
            assert (math.floor(x1), math.ceil(x2)) == (
                columns.start + covered_columns[0],
                columns.start + covered_columns[-1] + 1,
            )
            assert (math.floor(y1), math.ceil(y2)) == (rows.start + covered_rows[0], rows.start + covered_rows[-1] + 1)


def test_pose_has_the_requested_side():
    rng = np.random.default_rng(0)
    for name in CONTOURS:
        points = np.concatenate(pose(name, 37.0, rng))
        assert points.min() == pytest.approx(0) and points.max() == pytest.approx(37)


def test_scenes_leave_every_object_visible(scenes):
    for _, objects in scenes:
        topmost = np.full(SIZE, -1)
        for number, (_, stamp) in enumerate(objects):
            topmost[stamp.window][stamp.coverage >= 0.5] = number
        for number, (_, stamp) in enumerate(objects):
            assert (topmost == number).sum() >= make_shapes.MIN_VISIBLE * (stamp.coverage >= 0.5).sum()
            x1, y1, x2, y2 = stamp.box
            assert 0 <= x1 < x2 <= SIZE[1] and 0 <= y1 < y2 <= SIZE[0]


def test_scenes_span_four_octaves_with_all_classes(scenes):
    drawn = [objects for _, objects in scenes]
    sides = [max(stamp.box[2] - stamp.box[0], stamp.box[3] - stamp.box[1]) for objects in drawn for _, stamp in objects]
    octaves = Counter(int(math.log2(side / 8 + 1e-9)) for side in sides)
    assert all(octaves[octave] > 0.1 * len(sides) for octave in range(4)), octaves
    assert max(sides) > 144 and min(sides) < 9
    labels = Counter(label for objects in drawn for label, _ in objects)
    assert len(labels) == len(CONTOURS) and min(labels.values()) > 0.1 * len(sides)
    assert 0.03 < sum(not objects for objects in drawn) / len(drawn) < 0.15


def test_scenes_draw_every_object_with_contrast(scenes):
    for pixels, objects in scenes:
        for number, (_, stamp) in enumerate(objects):
            own = (stamp.coverage >= 0.99).astype(np.uint8)
            around = cv2.dilate((stamp.coverage > 0).astype(np.uint8), np.ones((3, 3))) - (stamp.coverage > 0)
            for _, other in objects[number + 1 :]:
                covered = np.zeros(SIZE, bool)
                covered[other.window] = other.coverage > 0
                own[covered[stamp.window]] = around[covered[stamp.window]] = 0
            if own.sum() >= 12 and around.sum() >= 12:
                patch = pixels[stamp.window].astype(float)
                # what lies beside an object is not what it was painted over, hence a weak bound
                assert np.abs(patch[own > 0].mean(axis=0) - patch[around > 0].mean(axis=0)).max() > 2


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "shapes"
    assert make_shapes.make_shapes(folder, num_train=6, num_val=2, size=(96, 128), seed=5)
    return folder


def test_make_shapes_writes_the_coco_layout(drawn):
    for split, count in (("train2017", 6), ("val2017", 2)):
        content = json.loads((drawn / "annotations" / f"instances_{split}.json").read_text())
        assert [row["id"] for row in content["images"]] == list(range(1, count + 1))
        assert [row["name"] for row in content["categories"]] == list(CONTOURS)
        assert [row["id"] for row in content["annotations"]] == list(range(1, len(content["annotations"]) + 1))
        for row in content["images"]:
            assert (
                cv2.imread(str(drawn / split / row["file_name"])).shape
                == (row["height"], row["width"], 3)
                == (96, 128, 3)
            )
        for row in content["annotations"]:
            x, y, width, height = row["bbox"]
            assert x >= 0 and y >= 0 and width > 0 and height > 0 and x + width <= 128 and y + height <= 96
            assert (
                0 < row["area"] <= width * height + 1e-9
                and 1 <= row["image_id"] <= count
                and 1 <= row["category_id"] <= len(CONTOURS)
            )


def test_make_shapes_draws_the_same_bytes_with_any_number_of_workers(drawn, tmp_path):
    command = [
        sys.executable,
        make_shapes.__file__,
        "--out",
        tmp_path / "again",
        "--train",
        "6",
        "--val",
        "2",
        "--size",
        "96",
        "128",
    ]
    subprocess.run([*map(str, command), "--seed", "5", "--workers", "2"], check=True)
    assert contents(tmp_path / "again") == contents(drawn)


def test_make_shapes_draws_image_i_independently_of_the_count(drawn, tmp_path):
    make_shapes.make_shapes(tmp_path / "fewer", num_train=3, num_val=0, size=(96, 128), seed=5)
    fewer, more = contents(tmp_path / "fewer" / "train2017"), contents(drawn / "train2017")
    assert len(fewer) == 3 and fewer.items() <= more.items()
    make_shapes.make_shapes(tmp_path / "other", num_train=3, num_val=3, size=(96, 128), seed=6)
    pictures = [
        *more.values(),
        *contents(tmp_path / "other" / "train2017").values(),
        *contents(tmp_path / "other" / "val2017").values(),
    ]
    assert len(set(pictures)) == len(pictures)


def test_make_shapes_does_not_change_a_finished_folder(drawn):
    before = {path: path.stat().st_mtime_ns for path in drawn.rglob("*")}
    assert not make_shapes.make_shapes(drawn, num_train=6, num_val=2, size=(96, 128), seed=5)
    assert before == {path: path.stat().st_mtime_ns for path in drawn.rglob("*")}
    with pytest.raises(ValueError, match=r"expected shapes made with these settings, got others"):
        make_shapes.make_shapes(drawn, num_train=6, num_val=2, size=(96, 128), seed=4)


def test_make_shapes_leaves_nothing_when_it_is_interrupted(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(make_shapes, "draw_scene", stop)
    with pytest.raises(KeyboardInterrupt):
        make_shapes.make_shapes(tmp_path / "shapes", num_train=2, num_val=0)
    assert not list(tmp_path.iterdir())


def test_make_shapes_refuses_what_it_cannot_draw(tmp_path):
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        make_shapes.make_shapes(tmp_path)
    with pytest.raises(ValueError, match=r"expected different classes out of disk, .*, got disk, heart"):
        make_shapes.make_shapes(tmp_path / "new", class_names=("disk", "heart"))
    with pytest.raises(ValueError, match=r"expected sides above 10 px, got 8x96"):
        make_shapes.make_shapes(tmp_path / "new", size=(8, 96))
