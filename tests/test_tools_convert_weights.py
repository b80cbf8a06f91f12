from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fpn_det import api
from fpn_det.composition import compose
from fpn_det.inference.predictor import Predictor
from fpn_det.interop.coco_classes import NAMES
from fpn_det.interop.conversion import convert
from fpn_det.interop.loading import read_as_ours

SMALL = ["model.backbone.depth=18", "model.backbone.weights=null"]


@pytest.fixture(scope="module")
def torchvision_file(tmp_path_factory) -> Path:
    """Weights of a ResNet-18 detector as torchvision writes them, for its 91 outputs, that are sure of what they see."""
    torch.manual_seed(0)
    model = compose(["experiment=compat/torchvision_r50_fpn", *SMALL]).build_model(90)
    torch.nn.init.normal_(model.roi_head.predictor.class_logits.weight, std=1.0)
    path = tmp_path_factory.mktemp("weights") / "checkpoint.pth"
    torch.save({"model": convert(model.state_dict(), "fpn_det", "torchvision").state, "epoch": 3}, path)
    return path


def load_small(*sources: Path, **options: Path) -> Predictor:
    """A predictor for images of 160 px, which takes less time than 800."""
    predictor = api.load(*sources, **options, device="cpu")
    (resize,) = predictor.preprocessing.transform.deferred
    resize.sides, resize.max_side = [160], 200
    return predictor


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)


def test_weights_go_around_all_projects_and_come_back(torchvision_file, tmp_path, run_tool):
    files = [torchvision_file, *(tmp_path / name for name in ("model.pkl", "epoch_1.pth", "ours.pt", "back.pth"))]
    for file, target, output in zip(
        files[:-1], ("detectron2", "mmdet", "fpn_det", "torchvision"), files[1:], strict=True
    ):
        result = run_tool("convert_weights.py", "source=auto", f"target={target}", f"input={file}", f"output={output}")
        assert result.returncode == 0, result.stderr
        assert "ResNet-18" in result.stdout and f"written: {output}" in result.stdout
    (dropped,) = (line for line in result.stdout.splitlines() if line.endswith(": not weights of the model"))
    assert dropped.startswith("  dropped format, versions, ")  # one line for all
    before, after = (torch.load(file, weights_only=True) for file in (files[0], files[-1]))
    for name, value in before["model"].items():
        assert torch.equal(after[name], value), name
    assert torch.load(files[2], weights_only=True)["meta"]["dataset_meta"]["classes"][11] == "N/A 12"


def test_a_file_loads_by_itself_by_its_experiment_and_converted(torchvision_file, tmp_path, run_tool, picture):
    result = run_tool("convert_weights.py", "target=fpn_det", f"input={torchvision_file}", "output=ours.pt")
    assert result.returncode == 0, result.stderr
    image = Image.fromarray(picture)
    (expected,) = load_small(tmp_path / "ours.pt").predict([picture])
    assert len(expected.scores) == 100
    assert all(
        name == NAMES.get(label + 1, f"N/A {label + 1}")
        for name, label in zip(expected.names, expected.labels.tolist(), strict=True)
    )
    for predictor in (load_small(torchvision_file), load_small(tmp_path / "ours.pt", weights=torchvision_file)):
        (prediction,) = predictor.predict([image])
        assert torch.equal(prediction.boxes, expected.boxes) and torch.equal(prediction.scores, expected.scores)
        assert prediction.names == expected.names


def test_load_names_what_is_missing(torchvision_file, tmp_path):
    with pytest.raises(ValueError, match="expected weights for the experiment r50_fpn, got none. Pass weights=<file>"):
        api.load("r50_fpn")
    with pytest.raises(ValueError, match="expected weights of this model, got others"):
        api.load("r50_fpn", weights=torchvision_file)  # a ResNet-18
    with pytest.raises(
        ValueError, match="expected a run folder, .* or an experiment, got demoo, .* Did you mean demo?"
    ):
        api.load("demoo")
    torch.save(read_as_ours(torchvision_file).state, tmp_path / "bare.pth")
    with pytest.raises(
        ValueError, match="expected a checkpoint, got weights without settings. Name an experiment as well"
    ):
        api.load(tmp_path / "bare.pth")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["target=fpn_det", "output=a.pt"], "expected a value for input, got none"),
        (
            ["target=caffe", "input=a.pth", "output=a.pt"],
            "target: expected one of fpn_det, torchvision, detectron2, mmdet or safetensors, got 'caffe'",
        ),
        (
            ["target=fpn_det", "input=a.pth", "output=a.pt"],
            "weights: expected a file of weights, got a.pth, which does not exist",
        ),
        (
            ["target=fpn_det", "input=a.pth", "ouput=a.pt"],
            "ouput: there is no setting of that name. Did you mean output?",
        ),
    ],
)
def test_a_wrong_command_line_is_refused(run_tool, words: list[str], message: str):
    result = run_tool("convert_weights.py", *words)
    assert result.returncode != 0 and message in result.stderr


def test_weights_for_raw_ids_score_with_the_ids_of_the_file(torchvision_file, tmp_path, run_tool):
    """91 outputs on real COCO annotations: results carry category ids as COCO has them."""
    data = Path(os.environ.get("FPN_DET_DATA", "nowhere")) / "coco128"
    if not data.is_dir():
        pytest.skip("FPN_DET_DATA names no folder with coco128")
    run_tool("convert_weights.py", "target=fpn_det", f"input={torchvision_file}", "output=ours.pt")
    small = ["data.max_images=2", "data.eval_transforms.resize.sides=[160]", "data.eval_transforms.resize.max_side=200"]
    result = run_tool("eval.py", "checkpoint=ours.pt", f"data.root={data}", "device=cpu", "data.num_workers=0", *small)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "eval" / "ours" / "predictions.json").read_text())
    val = json.loads((data / "annotations" / "instances_val2017.json").read_text())
    file = {image["id"]: data / "val2017" / image["file_name"] for image in val["images"]}
    predictor = load_small(tmp_path / "ours.pt")
    images = sorted({row["image_id"] for row in rows})
    assert len(images) == 2
    for image_id, prediction in zip(images, predictor.predict([file[image_id] for image_id in images]), strict=True):
        ids = [row["category_id"] for row in rows if row["image_id"] == image_id]
        assert ids == [label + 1 for label in prediction.labels.tolist()]
        assert max(ids) <= 90
