from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny import TINY
from videos import RATE, write_sound, write_video

from fpn_det import api
from fpn_det.cli import predict as command
from fpn_det.cli.main import INTERRUPTED
from fpn_det.composition import literal, parse_words
from fpn_det.data.transforms import Pipeline, ResizeShortestSide
from fpn_det.evaluation.coco import score
from fpn_det.evaluation.detection_table import DetectionTable
from fpn_det.export.exported import ExportedDetector
from fpn_det.image_io import image_size
from fpn_det.inference import folder as folders
from fpn_det.inference import predictor, video
from fpn_det.inference.folder import JOURNAL, PredictionFolder, drawing_names
from fpn_det.inference.video import read_frames, read_header


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


def test_images_with_all_detections_that_the_model_gives_are_told(run, run_tool, shapes_dataset, tmp_path):
    words = f"source={shapes_dataset / 'val2017'}", "score=0", "draw=false"
    result = predict(run_tool, run, *words, "model.roi_head.test_filter.max_detections=5")
    assert "An image has 5 detections, which is all that the model gives." in " ".join(result.stdout.split())
    rows = json.loads((tmp_path / "predictions" / "predictions.json").read_text())
    assert max(Counter(row["image_id"] for row in rows).values()) == 5
    result = predict(run_tool, run, *words, "max_detections=500")
    assert result.returncode == 2 and "max_detections: expected at most 100" in result.stderr


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
        if len(self.done) == 4:  # within the second batch
            raise KeyboardInterrupt

    monkeypatch.setattr(folders.PredictionFolder, "add", interrupted)
    assert predict(run_tool, run, *words, "out=storm").returncode == INTERRUPTED
    journal = tmp_path / "storm" / JOURNAL
    journal.write_text(journal.read_text() + '{"number": 7, "si')  # cut off by the interruption
    monkeypatch.setattr(folders.PredictionFolder, "add", add)
    other = predict(run_tool, run, *words[:2], "draw=false", "out=storm", "max_detections=3")
    assert other.returncode == 2 and "unfinished predictions of others" in other.stderr
    result = predict(run_tool, run, *words, "out=storm")
    assert result.returncode == 0 and "3 files are done already" in result.stdout, result.stderr
    for name in ("predictions.json", "predictions.csv", "images.json"):
        assert (tmp_path / "calm" / name).read_bytes() == (tmp_path / "storm" / name).read_bytes()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, shapes_dataset) -> Path:
    """A folder of two images, a video of 7 frames of 3 images, and three broken videos, one of them truncated."""
    pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("mixed")
    files = sorted((shapes_dataset / "val2017").glob("*"))[:3]
    for file in files[:2]:
        shutil.copy(file, folder)
    frames = [np.asarray(Image.open(files[number % 3]).convert("RGB").resize((128, 96))) for number in range(7)]
    write_video(folder / "clip.mp4", frames)
    random = np.random.default_rng(0)
    noise = [random.integers(0, 256, (96, 128, 3), dtype=np.uint8) for _ in range(40)]
    cut = write_video(folder / "cut.mov", noise)
    cut.write_bytes(cut.read_bytes()[:100_000])
    (folder / "empty.mp4").touch()
    write_sound(folder / "sound.mp4")
    return folder


def test_a_folder_mixes_images_and_videos(run, run_tool, mixed, tmp_path):
    result = predict(run_tool, run, f"source={mixed}", "score=0", "max_detections=3", "data.eval_batch_size=4")
    assert result.returncode == 0, result.stderr
    assert "2 images, 4 videos" in result.stdout and "3 of 6 files could not be read" in result.stdout
    out = tmp_path / "predictions"
    reasons = (out / "unreadable.txt").read_text().splitlines()
    assert [Path(line.split("\t")[0]).name for line in reasons] == ["cut.mov", "empty.mp4", "sound.mp4"]
    assert "expected a complete video, got" in reasons[0] and "without pictures" in reasons[2]
    described = json.loads((out / "images.json").read_text())["images"]
    frames = [image for image in described if Path(image["file_name"]).name == "clip.mp4"]
    assert [image["frame_id"] for image in frames] == list(range(7))
    assert len({image["id"] for image in described}) == len(described)
    name_of = {image["id"]: Path(image["file_name"]).name for image in described}
    rows = json.loads((out / "predictions.json").read_text())
    assert {name_of[row["image_id"]] for row in rows} == set(name_of.values()) and len(rows) == 3 * len(described)
    with (out / "predictions.csv").open() as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["file", "frame", "class", "score", "x1", "y1", "x2", "y2"] and len(table) == len(rows)
    assert {row["frame"] for row in table if row["file"].endswith("clip.mp4")} == set("0123456")
    assert {row["frame"] for row in table if row["file"].endswith((".jpg", ".png"))} == {""}
    assert len(list((out / "pictures").iterdir())) == 2
    drawn = list(read_frames(out / "videos" / "clip.mp4"))
    assert [pixels.shape for pixels in drawn] == [(96, 128, 3)] * 7
    assert read_header(out / "videos" / "clip.mp4").rate == RATE
    plain = list(read_frames(mixed / "clip.mp4"))
    assert all(abs(one.astype(int) - other).max() > 60 for one, other in zip(drawn, plain, strict=True))
    assert sorted(file.name for file in (out / "videos").iterdir()) == ["clip.mp4", "cut.mp4"]


def test_an_interrupted_video_starts_again_with_the_same_results(run, run_tool, mixed, tmp_path, monkeypatch):
    words = f"source={mixed}", "score=0", "max_detections=3", "data.eval_batch_size=2"
    assert predict(run_tool, run, *words, "out=calm").returncode == 0
    add = folders.PredictionFolder.add

    def interrupted(self, entries):
        add(self, entries)
        if entries[0].frame == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(folders.PredictionFolder, "add", interrupted)
    assert predict(run_tool, run, *words, "out=storm").returncode == INTERRUPTED
    monkeypatch.setattr(folders.PredictionFolder, "add", add)
    result = predict(run_tool, run, *words, "out=storm")
    assert result.returncode == 0 and "clip.mp4 was interrupted, and starts again" in result.stdout, result.stderr
    assert "4 files are done already" in result.stdout  # two images, and two videos that cannot be opened
    files = [file.relative_to(tmp_path / "calm") for file in (tmp_path / "calm").rglob("*") if file.is_file()]
    assert len(files) == 8
    for name in files:
        assert (tmp_path / "calm" / name).read_bytes() == (tmp_path / "storm" / name).read_bytes(), name


def test_only_broken_videos_end_in_one_sentence(run, run_tool, mixed):
    result = predict(run_tool, run, f"source={mixed / 'sound.mp4'}")
    assert result.returncode == 2 and "got a file without pictures: audio" in result.stderr
    assert "Traceback" not in result.stderr


def test_videos_without_their_library_end_in_one_sentence(run, run_tool, tmp_path, monkeypatch):
    monkeypatch.setattr(video, "av", None)
    (tmp_path / "clip.mp4").touch()
    result = predict(run_tool, run, "source=clip.mp4")
    assert result.returncode == 2 and "pip install 'fpn_det[video]'" in result.stderr


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


def test_a_refused_command_does_not_stand_in_the_way_of_the_next(run, run_tool, shapes_dataset, tmp_path):
    source = f"source={next((shapes_dataset / 'val2017').glob('*'))}"
    refused = predict(run_tool, run, source, "classes=[stone]")
    assert refused.returncode == 2 and "classes: expected some of" in refused.stderr
    assert not (tmp_path / "predictions").exists()
    PredictionFolder(tmp_path / "predictions", [Path("other.jpg")], {})  # refused while it detects, by another
    done = predict(run_tool, run, source)
    assert done.returncode == 0, done.stderr


def test_images_larger_than_the_canvas_of_an_exported_file_are_refused_at_the_start():
    file = SimpleNamespace(size=(160, 192), metadata=SimpleNamespace(class_names=["a"]))
    model = ExportedDetector(file, SimpleNamespace(stride=32, assigner=None, max_detections=100))
    job = SimpleNamespace(
        predictor=SimpleNamespace(model=model),
        preprocessing=SimpleNamespace(transform=Pipeline([ResizeShortestSide([96], 1000)]), max_pixels=10**6),
        folder=SimpleNamespace(files=[Path("a.jpg"), Path("b.jpg"), Path("c.jpg")]),
    )
    refuse = command._refuse_larger_than_canvas
    refuse(job, {0: (100, 200)})  # 96 x 192 px in the input
    with pytest.raises(ValueError, match=r"at most 160 x 192 px .* got 1 of 2 .* The first: b\.jpg, 192 x 96\."):
        refuse(job, {0: (100, 200), 1: (48, 24)})
    file.size = None
    refuse(job, {1: (48, 24)})


def test_pictures_of_all_files_have_names_of_their_own():
    files = [Path("in/a.png"), Path("in/a.jpg"), Path("in/deep/a.jpg")]
    assert drawing_names(files) == [Path("a.jpg"), Path("a_jpg.jpg"), Path("deep/a.jpg")]
    assert drawing_names(files[:1]) == [Path("a.jpg")]
    assert drawing_names([Path("../b/a.jpg"), Path("c.jpg")]) == [Path("b/a.jpg"), Path(f"{Path.cwd().name}/c.jpg")]


def test_own_drawings_are_neither_predicted_nor_replaced(run, run_tool, shapes_dataset, tmp_path):
    for file in sorted((shapes_dataset / "val2017").glob("*"))[:2]:
        shutil.copy(file, tmp_path)
    first = predict(run_tool, run, "source=.", "score=0.02")
    again = predict(run_tool, run, "source=.", "score=0.02")
    assert first.returncode == again.returncode == 0, again.stderr
    assert (
        "2 images" in again.stdout and "2 drawings of earlier predictions in predictions are left out" in again.stdout
    )
    assert len(list((tmp_path / "predictions").rglob("*.jpg"))) == 2
    (tmp_path / "pictures").mkdir()
    original = shutil.copy(next(tmp_path.glob("*.*g")), tmp_path / "pictures")
    content = Path(original).read_bytes()
    onto_itself = predict(run_tool, run, "source=pictures", "out=.")
    assert onto_itself.returncode == 2 and "Set another out" in onto_itself.stderr
    assert Path(original).read_bytes() == content


def test_the_header_of_an_image_is_read_once(run, run_tool, shapes_dataset, monkeypatch):
    read = []

    def size(path: Path) -> tuple[int, int] | None:
        read.append(path)
        return image_size(path)

    for module in (predictor, folders):
        monkeypatch.setattr(module, "image_size", size, raising=False)
    result = predict(run_tool, run, f"source={shapes_dataset / 'val2017'}", "draw=false")
    assert result.returncode == 0 and len(read) == len(set(read)) > 0, result.stderr


@pytest.mark.parametrize("text", ["a b", "it's", "[x]*", "back\\", "q\\'", "${a}", "x=y,z"])
def test_a_literal_word_keeps_every_character(text):
    assert parse_words([literal("source", text)])[0].value() == text
