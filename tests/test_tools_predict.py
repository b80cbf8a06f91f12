from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import TINY

from fpn_det import api
from fpn_det.cli.main import INTERRUPTED
from fpn_det.composition import literal, parse_words
from fpn_det.evaluation.coco import score
from fpn_det.evaluation.detection_table import DetectionTable
from fpn_det.inference import folder as folders
from fpn_det.inference.folder import JOURNAL, picture_names


@pytest.fixture(scope="module")
def run(tmp_path_factory, shapes_dataset) -> Path:
    """A detector of two steps whose detections are many."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    low = "model.roi_head.test_filter.score_threshold=0.01"
    api.train([*TINY, f"data.root={shapes_dataset}", f"run_dir={folder}", "data.eval_batch_size=3", low])
    return folder


def predict(run_tool, run: Path, *words: str):
    return run_tool("predict.py", f"run={run}", "device=cpu", *words)


def test_predictions_of_the_validation_folder_score_the_ap_of_the_evaluation(run, run_tool, shapes_dataset, tmp_path):
    expected = api.evaluate(run)
    result = predict(run_tool, run, f"source={shapes_dataset / 'val2017'}", "score=0", "draw=false")
    assert result.returncode == 0, result.stderr
    settings = api._eval_config(run, [])
    annotations = settings.data.read_split("val", list(expected.per_class), 0)
    row_of = {annotations.path(row).name: row for row in range(len(annotations))}
    images = json.loads((tmp_path / "predictions" / "images.json").read_text())["images"]
    ids = {image["id"]: int(annotations.image_ids[row_of[Path(image["file_name"]).name]]) for image in images}
    rows = json.loads((tmp_path / "predictions" / "predictions.json").read_text())
    for detection in rows:
        detection["image_id"] = ids[detection["image_id"]]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    table = DetectionTable.from_results(tmp_path / "results.json", annotations)
    found = score(annotations, table, np.arange(len(annotations)), settings.evaluation)
    assert len(rows) > 100
    for name, value in expected.metrics.items():
        assert found.metrics[name] == (None if value is None else pytest.approx(value, abs=1e-6)), name


def test_broken_files_are_listed_and_the_others_predicted(run, run_tool, shapes_dataset, tmp_path):
    source = tmp_path / "mixed"
    shutil.copytree(shapes_dataset / "val2017", source / "deep")
    pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(source / "rgba.png")
    Image.fromarray(pixels).convert("CMYK").save(source / "cmyk.jpg")
    Image.fromarray(pixels[..., 0]).save(source / "grey.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 256).save(source / "deep.png")
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels[..., :3]).save(source / "turned.jpg", exif=exif)
    (source / "empty.jpg").touch()
    (source / "text.png").write_text("no image")
    (source / "cut.jpg").write_bytes((source / "cmyk.jpg").read_bytes()[:500])
    (source / "notes.md").write_text("not asked for")
    result = predict(run_tool, run, f"source={source}", "score=0")
    assert result.returncode == 0 and "3 of 16 files could not be read" in result.stdout, result.stdout + result.stderr
    out = tmp_path / "predictions"
    assert {line.split("\t")[0].rpartition("/")[2] for line in (out / "unreadable.txt").read_text().splitlines()} == {
        "empty.jpg", "text.png", "cut.jpg",
    }  # fmt: skip
    images = {Path(one["file_name"]).name: one for one in json.loads((out / "images.json").read_text())["images"]}
    assert len(images) == 13 and (images["turned.jpg"]["height"], images["turned.jpg"]["width"]) == (80, 60)
    drawn = [file for file in (out / "pictures").rglob("*.jpg")]
    assert len(drawn) == 13 and (out / "pictures" / "deep").is_dir()
    with (out / "predictions.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["file", "class", "score", "x1", "y1", "x2", "y2"]
    assert len(rows) - 1 == len(json.loads((out / "predictions.json").read_text()))
    assert not (out / JOURNAL).exists()


def test_only_broken_files_end_in_one_sentence(run, run_tool, tmp_path):
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "empty.jpg").touch()
    result = predict(run_tool, run, f"source={tmp_path / 'mixed'}")
    assert result.returncode == 2 and "expected images, got 1 files that cannot be read" in result.stderr


def test_an_interrupted_command_continues_with_the_same_results(run, run_tool, shapes_dataset, tmp_path, monkeypatch):
    words = f"source={shapes_dataset / 'val2017'}", "score=0", "draw=false"
    assert predict(run_tool, run, *words, "out=calm").returncode == 0
    add = folders.PredictionFolder.add

    def interrupted(self, entries):
        add(self, entries)
        if len(self.entries) == 4:  # within the second batch
            raise KeyboardInterrupt

    monkeypatch.setattr(folders.PredictionFolder, "add", interrupted)
    assert predict(run_tool, run, *words, "out=storm").returncode == INTERRUPTED
    journal = tmp_path / "storm" / JOURNAL
    journal.write_text(journal.read_text() + '{"number": 7, "si')  # cut off by the interruption
    monkeypatch.setattr(folders.PredictionFolder, "add", add)
    other = predict(run_tool, run, *words[:2], "draw=false", "out=storm", "max_detections=3")
    assert other.returncode == 2 and "unfinished predictions of others" in other.stderr
    result = predict(run_tool, run, *words, "out=storm")
    assert result.returncode == 0 and "3 images are done already" in result.stdout, result.stderr
    for name in ("predictions.json", "predictions.csv", "images.json"):
        assert (tmp_path / "calm" / name).read_bytes() == (tmp_path / "storm" / name).read_bytes()


def test_the_console_says_which_score_applies(run, run_tool, shapes_dataset):
    result = predict(run_tool, run, f"source={shapes_dataset / 'val2017'}", "score=0.5", "draw=false")
    assert "Kept: score >= 0.5." in result.stdout
    result = predict(run_tool, run, f"source={shapes_dataset}/val2017/[!x]*", "draw=false", "out=again")
    assert result.returncode == 0 and "Kept: " in result.stdout, result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "source"),
        (("source=nowhere",), "source: expected a file, folder or pattern, got nowhere, which does not exist"),
        (("source=.", "classes=[stone]"), "expected images in the folder ., got none"),
        (("source=.", "conf=0.5"), "conf: there is no setting of that name"),
    ],
)
def test_wrong_input_ends_in_one_sentence(run, run_tool, words, message):
    result = predict(run_tool, run, *words)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr


def test_pictures_of_all_files_have_names_of_their_own():
    files = [Path("in/a.png"), Path("in/a.jpg"), Path("in/deep/a.jpg")]
    assert picture_names(files) == [Path("a.jpg"), Path("a_jpg.jpg"), Path("deep/a.jpg")]
    assert picture_names(files[:1]) == [Path("a.jpg")]


@pytest.mark.parametrize("text", ["a b", "it's", "[x]*", "back\\", "q\\'", "${a}", "x=y,z"])
def test_a_literal_word_keeps_every_character(text):
    assert parse_words([literal("source", text)])[0].value() == text
