from __future__ import annotations

import http.server
import threading
from dataclasses import replace
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TINY
from videos import write_video

from fpn_det.annotations.subsets import select_images
from fpn_det.composition import compose
from fpn_det.config import TileConfig
from fpn_det.data.tiles import Tiling
from fpn_det.evaluation.evaluate import evaluate
from fpn_det.image_io import BadImage, read_image
from fpn_det.inference.predictor import Predictor, build_predictor
from fpn_det.inference.video import read_frames
from fpn_det.models.views import Views
from fpn_det.runtime import Ranks
from fpn_det.structures import Annotations, Batch, Detections, ScoreThresholds

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def settings(shapes_dataset):
    resize = (
        "data.eval_transforms.resize={_target_:fpn_det.data.transforms.ResizeShortestSide,sides:[112],max_side:160}"
    )
    return compose(
        [
            *TINY,
            f"data.root={shapes_dataset}",
            resize,
            "data.eval_batch_size=3",
            "model.roi_head.test_filter.score_threshold=0.01",
        ]
    )


@pytest.fixture(scope="module")
def annotations(settings) -> Annotations:
    return settings.data.read_train_and_val(0).val


@pytest.fixture(scope="module")
def predictor(settings, annotations) -> Predictor:
    torch.manual_seed(0)
    model = settings.build_model(annotations.num_classes)
    torch.nn.init.normal_(model.roi_head.predictor.class_logits.weight, std=1.0)
    return build_predictor(settings, model, annotations.class_names, CPU)


@pytest.mark.parametrize("tta", [None, Views((0.5, 1.0), flip=True)])
def test_predictions_equal_the_detections_of_evaluation(settings, annotations, predictor, tta, monkeypatch):
    monkeypatch.setattr(predictor, "tta", tta)
    loader = settings.eval_loader(annotations, predictor.model.stride, Ranks(), CPU)
    scored = evaluate(predictor.model, loader, annotations, settings.evaluation, tta=tta).detections
    predictions = predictor.predict([annotations.path(index) for index in range(len(annotations))])
    assert len(scored.scores) > 50
    for index, prediction in enumerate(predictions):
        rows = scored.images == index
        assert np.array_equal(scored.boxes[rows], prediction.boxes.numpy())
        assert np.array_equal(scored.scores[rows], prediction.scores.numpy())
        assert np.array_equal(scored.labels[rows], prediction.labels.numpy())
        assert prediction.names == tuple(annotations.class_names[label] for label in prediction.labels)


def test_tiles_are_those_of_the_evaluation(settings, annotations, predictor):
    in_tiles, few = replace(settings, tile=TileConfig(80, 0.2)), select_images(annotations, torch.arange(2))
    loader = settings.eval_loader(few, predictor.model.stride, Ranks(), CPU, tiling=in_tiles.tiling)
    scored = evaluate(predictor.model, loader, few, settings.evaluation).detections
    files = [few.path(index) for index in range(2)]
    by_option = predictor.predict(files, tile=80, overlap=0.2)
    same = build_predictor(in_tiles, predictor.model, annotations.class_names, CPU)
    plain = predictor.predict(files)
    assert len(scored.scores) > 50
    for index, (one, other, whole) in enumerate(zip(by_option, same.predict(files), plain, strict=True)):
        rows = scored.images == index
        assert np.array_equal(scored.boxes[rows], one.boxes.numpy()) and torch.equal(one.boxes, other.boxes)
        assert np.array_equal(scored.scores[rows], one.scores.numpy()) and torch.equal(one.scores, other.scores)
        assert not torch.equal(one.scores, whole.scores)
    for found, whole in zip(same.predict(files, tile=0), plain, strict=True):
        assert torch.equal(found.boxes, whole.boxes) and torch.equal(found.scores, whole.scores)


def test_proposals_of_an_rpn_alone_are_objects(shapes_dataset):
    words = ["model.roi_head=null", "evaluation=proposals", "trainer.best_metric=AR1000", f"data.root={shapes_dataset}"]
    config = compose([*TINY, *words])
    proposer = build_predictor(config, config.build_model(3), ["disk", "square", "triangle"], CPU, None, [7, 8, 9])
    (found,) = proposer.predict([np.zeros((64, 64, 3), np.uint8)], score=0.0)
    assert len(found.boxes) > 10 and not found.labels.any()
    assert found.class_names == ("object",) and {row["category_id"] for row in found.to_coco()} == {1}


def test_tiles_as_large_as_the_images_give_the_plain_result_to_the_bit(settings, annotations, predictor):
    side = int(annotations.sizes.max())
    loaders = [
        settings.eval_loader(annotations, predictor.model.stride, Ranks(), CPU, tiling=tiling)
        for tiling in (None, Tiling(side, 0.2))
    ]
    plain, tiled = (evaluate(predictor.model, loader, annotations, settings.evaluation) for loader in loaders)
    assert len(plain.detections.scores) > 50 and plain.metrics == tiled.metrics
    for name in ("images", "boxes", "scores", "labels"):
        assert np.array_equal(getattr(plain.detections, name), getattr(tiled.detections, name)), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": -1}, "tile: expected a side in px, or 0 for whole images only, got -1"),
        ({"tile": 64, "overlap": 1.0}, "overlap: expected a fraction from 0 to below 1 of a tile, got 1.0"),
        ({"overlap": 0.5}, "overlap: .* got 0.5 without tiles"),
    ],
)
def test_impossible_tiles_are_refused(predictor, annotations, options, message):
    with pytest.raises(ValueError, match=message):
        predictor.predict(annotations.path(0), **options)


def test_paths_pil_images_and_arrays_give_the_same(annotations, predictor):
    path = annotations.path(0)
    for kind in (str(path), Image.open(path), read_image(path)):
        (expected,), (found,) = predictor.predict([path]), predictor.predict([kind])
        assert torch.equal(found.boxes, expected.boxes) and torch.equal(found.scores, expected.scores)


def test_predictions_keep_order_and_frame_for_any_sizes(predictor):
    random = np.random.default_rng(0)
    sizes = [(40, 90), (300, 200), (90, 40), (120, 120)]
    images = [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    for (height, width), image, together in zip(sizes, images, predictor.predict(images), strict=True):
        limit = torch.tensor([width, height, width, height])
        assert (together.boxes >= 0).all() and (together.boxes <= limit).all()
        (alone,) = predictor.predict([image])
        assert len(alone.scores) and abs(len(alone.scores) - len(together.scores)) < 100
    assert predictor.predict([]) == []


def test_predict_refuses_other_types(predictor, tmp_path):
    with pytest.raises(ValueError, match=r"arrays \[h, w, 3\] RGB or \[h, w\] grey, got float64 \[4, 4, 3\]"):
        predictor.predict([np.zeros((4, 4, 3))])
    with pytest.raises(ValueError, match="got a int"):
        predictor.predict([7])
    with pytest.raises(ValueError, match=r"nothing.jpg, which does not exist"):
        predictor.predict([tmp_path / "nothing.jpg"])
    with pytest.raises(ValueError, match="source: expected a file, folder or pattern, got an empty text"):
        predictor.predict("")
    with pytest.raises(ValueError, match="predict: expected 8 or 16 bits per channel, got mode F"):
        predictor.predict(Image.new("F", (4, 4)))
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(ValueError, match=r"empty.jpg: expected an image, got an empty file"):
        predictor.predict(tmp_path / "empty.jpg")
    (tmp_path / "clip.mp4").touch()
    with pytest.raises(ValueError, match=r"expected images, got the video .*clip.mp4. Use predict_video, which"):
        predictor.predict(tmp_path / "clip.mp4")


def test_one_path_a_folder_a_pattern_and_a_list_name_the_same_images(annotations, predictor, tmp_path):
    files = [annotations.path(index) for index in range(3)]
    for file in files:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "notes.md").write_text("no image")
    (tmp_path / f"._{files[0].name}").write_text("what macOS leaves beside a file")
    (tmp_path / "list.txt").write_text("\n".join(file.name for file in files) + "\n")
    (tmp_path / "windows.txt").write_bytes("\r\n".join(file.name for file in files).encode("utf-8-sig"))
    expected = predictor.predict(files, score=0.02)
    for source in (tmp_path, str(tmp_path / "*g"), tmp_path / "list.txt", tmp_path / "windows.txt", [tmp_path]):
        found = predictor.predict(source, score=0.02)
        assert [one.path.name for one in found] == [file.name for file in files]
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.boxes, other.boxes) and torch.equal(one.scores, other.scores)
    (single,) = predictor.predict(files[1], score=0.02)
    assert single.path == files[1] and single.image_id == 1


def test_a_prediction_of_a_video_is_that_of_its_frames(annotations, predictor, tmp_path):
    pytest.importorskip("av")
    frames = [read_image(annotations.path(row))[:96, :96] for row in (0, 1, 2, 3, 4)]
    file = write_video(tmp_path / "clip.mp4", frames, rate=Fraction(5))
    decoded = list(read_frames(file))
    expected = predictor.predict(decoded, score=0.02)
    found = list(predictor.predict_video(file, score=0.02))
    assert sum(map(len, expected)) > 20
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one.boxes, other.boxes) and torch.equal(one.scores, other.scores)
        assert (one.path, one.frame, one.image_id) == (file, number, number + 1)
        assert one.plot().tobytes() == other.plot().tobytes()
    assert f"{file}, frame 4, 96 x 96 px" in repr(found[4])
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    stream = predictor.predict_video(file)
    assert next(stream).frame == 0
    with pytest.raises(BadImage, match="expected a complete video"):
        list(stream)
    with pytest.raises(ValueError, match="score: expected a number"):
        predictor.predict_video(file, score=2)


def test_a_source_without_images_is_refused(predictor, tmp_path):
    for source, message in (
        (tmp_path, "expected images in the folder .*, got none"),
        (tmp_path / "*.jpg", "expected files that match .*jpg, got none"),
        ("https://example.com/a.jpg", "got the URL https://example.com/a.jpg. Set download=True to fetch it"),
    ):
        with pytest.raises(ValueError, match=message):
            predictor.predict(source)
    (tmp_path / "list.txt").touch()
    with pytest.raises(ValueError, match="expected one path per line, got an empty file"):
        predictor.predict(tmp_path / "list.txt")


def test_a_url_is_fetched_if_asked(annotations, predictor, tmp_path):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_) -> None:
            pass

    path = annotations.path(0)
    (tmp_path / "text.jpg").write_text("<html>")
    (tmp_path / path.name).write_bytes(path.read_bytes())
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        (found,), (expected,) = predictor.predict(f"{url}/{path.name}", download=True), predictor.predict(path)
        assert torch.equal(found.boxes, expected.boxes)
        with pytest.raises(ValueError, match="expected an image at .*none.jpg, got"):
            predictor.predict(f"{url}/none.jpg", download=True)
        with pytest.raises(ValueError, match="text.jpg: expected an image"):
            predictor.predict(f"{url}/text.jpg", download=True)
        server.shutdown()


def test_options_select_by_score_class_and_number(annotations, predictor):
    path = annotations.path(0)
    (everything,) = predictor.predict(path)
    scores, names = everything.scores, np.array(everything.names)
    threshold = float(scores[5])
    (found,) = predictor.predict(path, score=threshold)
    assert torch.equal(found.scores, scores[scores >= threshold])
    name = names[0]
    (found,) = predictor.predict(path, classes=[name], max_detections=2)
    assert torch.equal(found.scores, scores[names == name][:2]) and set(found.names) == {name}
    (found,) = predictor.predict(path, classes=[])
    assert len(found) == 0 and "nothing" in repr(found)


def test_thresholds_of_the_checkpoint_apply_unless_a_score_is_given(annotations, predictor, monkeypatch):
    path, names = annotations.path(0), predictor.class_names
    (everything,) = predictor.predict(path, score=0)
    thresholds = ScoreThresholds(float(everything.scores[3]), {names[0]: float(everything.scores[1])})
    monkeypatch.setattr(predictor, "score_thresholds", thresholds)
    limits = torch.tensor(thresholds.of(names))
    (found,) = predictor.predict(path)
    assert torch.equal(found.scores, everything.scores[everything.scores >= limits[everything.labels]])
    assert len(predictor.predict(path, score=0)[0]) == len(everything)
    assert "the best F1" in predictor.thresholds().origin
    assert predictor.thresholds(0.25).origin == "score >= 0.25"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": 1.5}, r"score: expected a number in 0..1, got 1.5"),
        ({"classes": ["stone"]}, "classes: expected some of .*, got 'stone'"),
        ({"max_detections": 0}, "max_detections: expected at least 1, got 0"),
        ({"size": 0}, "size: expected a side of at least 1 px, got 0"),
    ],
)
def test_impossible_options_are_refused(annotations, predictor, options, message):
    with pytest.raises(ValueError, match=message):
        predictor.predict(annotations.path(0), **options)


def test_size_is_the_shorter_side(annotations, predictor, monkeypatch):
    seen = []
    detect = predictor.model.detect
    monkeypatch.setattr(predictor.model, "detect", lambda batch, tta: seen.append(batch.sizes) or detect(batch, tta))
    predictor.predict(annotations.path(0))  # 96 x 128 px
    predictor.predict(annotations.path(0), size=48)
    monkeypatch.setattr(predictor.preprocessing.transform, "transforms", [])
    predictor.predict(annotations.path(0), size=48)
    assert [sizes.tolist() for sizes in seen] == [[[112, 149]], [[48, 64]], [[48, 64]]]


def test_a_model_needs_nothing_but_detect(annotations, predictor):
    class Fixed:
        stride = 32

        def detect(self, batch: Batch, views: Views | None = None) -> Detections:
            boxes = batch.sizes.flip(1).repeat(1, 2)[:, None] * torch.tensor([0.25, 0.25, 0.5, 0.5])
            ones = torch.ones(len(batch), 1)
            return Detections(boxes, 0.5 * ones, ones.long(), ones.bool())

    fixed = Predictor(Fixed(), ["a", "b"], predictor.preprocessing, CPU)
    (found,) = fixed.predict(annotations.path(0))
    assert torch.allclose(found.boxes, torch.tensor([[32.0, 24.0, 64.0, 48.0]])) and found.names == ("b",)
