"""Weights as safetensors with what describes them: written, read back, and refused where damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import TINY, state_of

from fpn_det import api
from fpn_det.cli.convert_weights import ConvertWeightsConfig, convert_weights
from fpn_det.composition import compose
from fpn_det.interop.loading import load_weights, read_as_ours
from fpn_det.runs.checkpoint import find_checkpoint, save_checkpoint

NAMES, IDS = ["cat", "dog", "cow"], [7, 3, 11]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint, and the same as safetensors."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    config = compose(TINY)
    model = config.build_model(3)
    torch.nn.init.normal_(model.roi_head.predictor.class_logits.weight, std=0.5)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    raw = {name: torch.zeros_like(value) for name, value in average.items()}
    save_checkpoint(folder / "best.pt", state_of(config, model, NAMES, IDS) | {"model": raw, "ema": average})
    output = folder / "model.safetensors"
    convert_weights(ConvertWeightsConfig(target="safetensors", input=str(folder / "best.pt"), output=str(output)))
    return folder / "best.pt", output


def test_a_file_of_weights_predicts_as_its_checkpoint_does(files):
    picture = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    ours, theirs = (api.load(file, device="cpu") for file in files)
    expected, found = (predictor.predict(picture, score=0.01)[0] for predictor in (ours, theirs))
    assert len(expected) > 5
    assert torch.equal(found.boxes, expected.boxes) and torch.equal(found.scores, expected.scores)
    assert found.names == expected.names
    assert theirs.class_names == tuple(NAMES) and theirs.category_ids == tuple(IDS)
    assert theirs.score_thresholds == ours.score_thresholds


def test_a_file_of_weights_holds_no_code_and_is_evaluated_as_a_checkpoint(files):
    with safe_open(files[1], framework="pt") as file:
        assert file.metadata()["category_ids"] == "[7, 3, 11]"
    path, state = find_checkpoint(None, str(files[1]))
    assert path == files[1] and state["class_names"] == NAMES and state["category_ids"] == IDS
    assert state["ema"] is None and state["config"].startswith("model:")
    model = compose(TINY).build_model(3)
    report = load_weights(model, files[1], NAMES)
    assert report.share == 1.0 and not report.replaced


def test_weights_of_another_project_are_read_from_safetensors(tmp_path):
    from fpn_det.interop.conversion import convert

    model = compose(["experiment=compat/torchvision_r50_fpn", "model.backbone.depth=18"]).build_model(4)
    save_file(convert(model.state_dict(), "fpn_det", "torchvision").state, tmp_path / "theirs.safetensors")
    weights = read_as_ours(tmp_path / "theirs.safetensors")
    assert weights.project == "torchvision" and weights.num_classes == 4 and weights.class_names is None


def test_damaged_weights_and_wrong_names_are_refused(files, tmp_path):
    damaged = tmp_path / "model.safetensors"
    damaged.write_bytes(files[1].read_bytes()[:-100])
    with pytest.raises(ValueError, match="expected a file of weights, got one that is damaged"):
        api.load(damaged)
    with pytest.raises(ValueError, match="expected a checkpoint of fpn_det, got a damaged or foreign file"):
        find_checkpoint(None, str(damaged))
    with pytest.raises(ValueError, match="expected a name that ends in .safetensors"):
        convert_weights(ConvertWeightsConfig(target="safetensors", input=str(files[0]), output="model.pt"))
