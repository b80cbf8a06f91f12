"""Every experiment on small pictures: trains, evaluates, resumes to the bit, and exports or says why not."""

from __future__ import annotations

import json
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from test_composition import EXPERIMENTS, NEEDED
from test_tools_resume import metrics, weights_after

from fpn_det import api
from fpn_det.composition import compose, compose_as, read_saved
from fpn_det.export.export import ExportConfig, export, saved_settings

# compat/ and paper/ differ from these in numbers, and in conventions that tests of their own compare.
OWN = [name for name in EXPERIMENTS if "/" not in name]
STEPS = 2
SMALL = {
    "data.max_images": 4,
    "data.num_workers": 0,
    "data.eval_batch_size": 2,
    "data.train_transforms.resize": "{sides: [64], max_side: 96}",
    "data.eval_transforms.resize": "{sides: [64], max_side: 96}",
    "model.backbone.depth": 18,
    "model.backbone.weights": "null",
    "model.backbone.norm": "batch",
    "model.backbone.frozen_stages": 0,
    "model.neck.channels": 16,
    "model.rpn.sampler.num_samples": 16,
    "model.rpn.train_filter.post_nms": 50,
    "model.rpn.test_filter.post_nms": 50,
    "model.roi_head.sampler.num_samples": 16,
    "model.roi_head.box_head.width": 32,
    "model.roi_head.box_head.conv_channels": 16,
    "trainer.batch_size": 2,
    "trainer.max_steps": STEPS,
    "trainer.save_every": "1 steps",
    "trainer.eval_every": "1 steps",
    "trainer.keep_last": 0,
    "trainer.report": "false",
    "schedule.warmup_steps": 1,
}


def words_of(experiment: str, data: Path) -> list[str]:
    """The experiment on `data`, made small wherever it has such a setting."""
    choice = [f"experiment={experiment}", *NEEDED.get(experiment, [])]
    config = compose(choice)
    words = [*choice[:1], "data=coco", f"data.root={data}", "device=cpu", "logger=[]"]
    words += ["run_dir=run", "set_aside=false"]
    words += [f"{name}={value}" for name, value in SMALL.items() if has(config, name)]
    if config.model["backbone"].get("name", "").startswith("convnext"):
        words.append("model.backbone.name=convnext_atto")
    if config.data.proposals is not None:
        words += [f"data.proposals.{split}={data / f'proposals_{split}.json'}" for split in ("train", "val")]
    return words


def start_of(words: list[str], folder: Path) -> list[str]:
    """For an experiment that starts from a published detector: such a file of the small model instead."""
    config = compose(words)
    if config.init_from is None:
        return []
    torch.save(config.build_model(80).state_dict(), folder / "coco.pth")
    return [f"init_from={folder / 'coco.pth'}"]


def has(tree: Any, name: str) -> bool:
    """True if there is a setting of that name; a resize that is left out stays so."""
    first, _, rest = name.partition(".")
    tree = vars(tree) if is_dataclass(tree) else tree
    if not isinstance(tree, dict) or first not in tree:
        return False
    return has(tree[first], rest) if rest else first != "resize" or tree[first] is not None


@pytest.fixture(scope="module")
def data(shapes_dataset: Path) -> Path:
    """The shapes, and for each image its own boxes as proposals."""
    for split in ("train", "val"):
        objects = json.loads((shapes_dataset / f"annotations/instances_{split}2017.json").read_text())["annotations"]
        rows = [{"image_id": one["image_id"], "category_id": 1, "bbox": one["bbox"], "score": 0.9} for one in objects]
        (shapes_dataset / f"proposals_{split}.json").write_text(json.dumps(rows))
    return shapes_dataset


@pytest.mark.slow
@pytest.mark.parametrize("experiment", OWN)
def test_an_experiment_trains_evaluates_and_resumes_to_the_bit(experiment, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = words_of(experiment, data)
    api.train([*words, *start_of(words, tmp_path)])
    api.train([*words, "run_dir=resumed", f"resume=run/checkpoints/step_{STEPS - 1:08d}.pt"])
    one, other = weights_after(tmp_path / "run", STEPS), weights_after(tmp_path / "resumed", STEPS)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    first = weights_after(tmp_path / "run", STEPS - 1)
    moved = [name for name in one if name.endswith("weight") and not torch.equal(first[name], one[name])]
    assert any(name.startswith("backbone.") for name in moved) and any(name.startswith("neck.") for name in moved)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "resumed")
    checkpoint = f"checkpoint=run/checkpoints/step_{STEPS:08d}.pt"
    evaluation = api.evaluate(Path(checkpoint.partition("=")[2]))
    saved = metrics(tmp_path / "run")
    assert evaluation.metrics == {name: saved[name] for name in evaluation.metrics}


@pytest.mark.slow
@pytest.mark.parametrize("experiment", OWN)
def test_an_experiment_exports_or_says_why_not(experiment, data, tmp_path, monkeypatch):
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    config = compose(words_of(experiment, data))
    short = ["trainer.max_steps=1", "trainer.eval_every=null", "trainer.early_stop=null"]
    words = words_of(experiment, data)
    api.train([*words, *start_of(words, tmp_path), *short])
    said: list[str] = []
    word = "checkpoint=run/checkpoints/last.pt"
    settings = read_saved(saved_settings(None, "run/checkpoints/last.pt"))
    if config.model["rpn"] is None:
        with pytest.raises(ValueError, match="expected a detector that proposes its own boxes"):
            compose_as(ExportConfig, "export", [word], settings)
        return
    path = export(compose_as(ExportConfig, "export", [word, "size=[96,128]"], settings), said.append)
    assert path.is_file() and "boxes differ by at most" in said[0]
