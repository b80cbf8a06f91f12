"""Images of four channels and 16 bits through the commands: checked, trained on, resumed, evaluated, predicted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from test_tools_resume import check_resume, metrics
from tiny import TINY

from fpn_det import api
from fpn_det.composition import compose


@pytest.fixture(scope="module")
def bands(shapes_dataset: Path, tmp_path_factory) -> Path:
    """The shapes as .npy files of four channels: RGB times 16, and their sum."""
    folder = tmp_path_factory.mktemp("bands") / "shapes"
    shutil.copytree(shapes_dataset, folder)
    for file in (folder / "annotations").glob("*.json"):
        document = json.loads(file.read_text())
        images = folder / file.stem.removeprefix("instances_")
        for image in document["images"]:
            rgb = cv2.imread(str(images / image["file_name"]))[..., ::-1].astype(np.uint16) * 16
            (images / image["file_name"]).unlink()
            image["file_name"] = f"{Path(image['file_name']).stem}.npy"
            np.save(
                images / image["file_name"],
                np.concatenate([rgb, rgb.sum(axis=2, keepdims=True, dtype=np.uint16)], axis=2),
            )
        file.write_text(json.dumps(document))
    return folder


def words_of(bands: Path) -> list[str]:
    return [*TINY, f"data.root={bands}", "data.channels=4", "data.dtype=uint16", "data.keep_empty=true"]


def all_pixels(bands: Path) -> np.ndarray:
    return np.concatenate([np.load(path).reshape(-1, 4) for path in sorted((bands / "train2017").glob("*.npy"))])


def test_a_run_measures_its_channels_and_resumes_to_the_bit(run_tool, bands, tmp_path):
    check_resume(
        run_tool, tmp_path, [*words_of(bands), "trainer.max_steps=4", "trainer.ema=0.9", "trainer.report=true"]
    )
    state = torch.load(tmp_path / "resumed/checkpoints/last.pt", weights_only=True)
    assert state["model"]["backbone.conv1.weight"].shape[1] == 4
    log = (tmp_path / "straight/log.txt").read_text()
    assert "measured on 8 training images" in log and "measured on" not in (tmp_path / "resumed/log.txt").read_text()
    pixels = all_pixels(bands).astype(np.float64)
    for name in ("straight", "resumed"):
        settings = api.load(tmp_path / name, device="cpu").model
        assert settings.pixel_mean.flatten().tolist() == pytest.approx(pixels.mean(axis=0).tolist(), rel=1e-5)
        assert settings.pixel_std.flatten().tolist() == pytest.approx(pixels.std(axis=0).tolist(), rel=1e-5)
    assert (tmp_path / "straight/report/index.html").is_file()

    saved = metrics(tmp_path / "straight")
    evaluation = api.evaluate(tmp_path / "straight/checkpoints/step_00000004.pt")
    assert evaluation.metrics == {name: saved[name] for name in evaluation.metrics}

    files = sorted((bands / "val2017").glob("*.npy"))[:2]
    predictor = api.load(tmp_path / "straight", device="cpu")
    of_files = predictor.predict(files, score=0.0)
    of_arrays = predictor.predict([np.load(file) for file in files], score=0.0)
    for one, other in zip(of_files, of_arrays, strict=True):
        assert len(one) and torch.equal(one.boxes, other.boxes) and torch.equal(one.scores, other.scores)
        assert one.size == (96, 128) and np.array_equal(np.asarray(one.plot()), np.asarray(other.plot()))
    with pytest.raises(
        ValueError, match=r"expected paths or arrays \[h, w, 4\] of uint16, .* got uint8 \[96, 128, 3\]"
    ):
        predictor.predict(np.zeros((96, 128, 3), np.uint8))
    predicted = run_tool("predict.py", "run=straight", f"source={bands / 'val2017'}", "score=0", "device=cpu")
    assert predicted.returncode == 0, predicted.stderr
    assert len(list((tmp_path / "predictions/pictures").iterdir())) == 8
    refused = run_tool("eval.py", "run=straight", "data.channels=3")
    assert refused.returncode == 2
    exported = run_tool("export.py", "run=straight")
    assert exported.returncode == 2
    assert exported.stderr.startswith(
        "export: expected a detector of RGB pictures of 8 bits, got one of 4 channels of 16"
    )
    assert refused.stderr.startswith("data.channels: expected 4, which model.backbone takes, got 3.")


def test_check_data_counts_channels_and_says_what_does_not_fit(run_tool, bands, tmp_path):
    sound = run_tool("check_data.py", *words_of(bands))
    assert sound.returncode == 0, sound.stdout
    assert "image_channels" in sound.stdout and "8 image(s) have 4 channels of 16 bits" in sound.stdout
    assert (tmp_path / "data_report/data_report.html").read_text().count("data:image/jpeg") >= 8
    refused = run_tool("check_data.py", *TINY, f"data.root={bands}")
    assert refused.returncode == 1 and "image_unreadable (8)" in refused.stdout
    assert "got 4 channels of 16 bits. Set data.channels=4 data.dtype=uint16" in " ".join(refused.stdout.split())


def test_show_data_draws_them(run_tool, bands, tmp_path):
    shown = run_tool("show_data.py", *words_of(bands), "steps=1")
    assert shown.returncode == 0, shown.stderr
    assert (tmp_path / "data_shown/step_000000_0.png").is_file()


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (["model.pixel_mean=[1,2,3]", "model.pixel_std=[1,1,1]"], "model.pixel_mean: expected 4 values, one for each channel"),
        (["model.backbone.in_channels=3"], "data.channels: expected 3, which model.backbone takes, got 4."),
        (["+data.train_transforms.hue={_target_:albumentations.HueSaturationValue}"], "HueSaturationValue: expected images of 8"),
        (["ch=4"], "ch: there is no setting of that name. It is called data.channels here."),
        (["in_channels=4"], "It is called data.channels here."),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(bands, words, refusal):
    from fpn_det.runtime import Ranks
    from fpn_det.training.trainer import Trainer

    with pytest.raises(ValueError) as caught:
        Trainer(compose([*words_of(bands), *words]), Ranks(), torch.device("cpu"))
    assert refusal in str(caught.value)
