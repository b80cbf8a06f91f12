"""Hand-made files, as the projects' tools write them, and files that nobody should trust."""

from __future__ import annotations

import argparse
import os
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fpn_det.interop.conversion import convert
from fpn_det.interop.loading import read_as_ours
from fpn_det.interop.reading import read_weights

CLASSES = ("square", "disk", "triangle")


class HistoryBuffer:
    """Stands for mmengine's: arrays, and methods by name."""

    def __init__(self) -> None:
        self.history = np.array([1.0, 2.0])
        self.statistics = {"min": HistoryBuffer.minimum}

    def minimum(self) -> float:
        return self.history.min()


@pytest.fixture
def foreign_class(monkeypatch: pytest.MonkeyPatch) -> type:
    """A class that exists while a file is written, under a name that nobody can import later."""
    module = types.ModuleType("somewhere.history_buffer")
    module.HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "somewhere", types.ModuleType("somewhere"))
    monkeypatch.setitem(sys.modules, "somewhere.history_buffer", module)
    monkeypatch.setattr(HistoryBuffer, "__module__", "somewhere.history_buffer")
    return HistoryBuffer


def assert_same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


@pytest.mark.parametrize("zipped", [True, False])
def test_a_plain_state_dict_is_read(tmp_path: Path, ours: dict[str, Tensor], zipped: bool):
    state = OrderedDict(convert(ours, "fpn_det", "torchvision").state)
    torch.save(state, tmp_path / "published.pth", _use_new_zipfile_serialization=zipped)
    weights = read_as_ours(tmp_path / "published.pth")
    assert_same(weights.state, ours)
    assert (weights.project, weights.class_names, weights.dropped) == ("torchvision", None, {})


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_of_torchvisions_references_is_read(tmp_path: Path, ours: dict[str, Tensor], zipped: bool):
    state = {f"module.{name}": value for name, value in convert(ours, "fpn_det", "torchvision").state.items()}
    args = argparse.Namespace(lr=0.02, data_path=Path("coco"))
    content = {"model": state, "optimizer": {"state": {}}, "args": args, "epoch": 25}
    torch.save(content, tmp_path / "model_25.pth", _use_new_zipfile_serialization=zipped)
    weights = read_as_ours(tmp_path / "model_25.pth")
    assert_same(weights.state, ours)
    assert "argparse.Namespace" in weights.dropped["args"]
    assert weights.dropped["optimizer"] == "not weights of the model"


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_of_detectron2s_model_zoo_is_read(tmp_path: Path, ours: dict[str, Tensor], protocol: int):
    arrays = {name: value.numpy() for name, value in convert(ours, "fpn_det", "detectron2").state.items()}
    arrays["proposal_generator.anchor_generator.cell_anchors.0"] = np.zeros((3, 4), np.float32)
    content = {"model": arrays, "__author__": "Detectron2 Model Zoo", "matching_heuristics": True}
    (tmp_path / "model_final.pkl").write_bytes(pickle.dumps(content, protocol))
    weights = read_as_ours(tmp_path / "model_final.pkl")
    assert_same(weights.state, ours)
    assert weights.project == "detectron2"
    assert set(weights.dropped) == {
        "__author__",
        "matching_heuristics",
        "proposal_generator.anchor_generator.cell_anchors.0",
    }


def test_a_training_checkpoint_of_detectron2_is_read(tmp_path: Path, ours: dict[str, Tensor]):
    trainer = {
        "iteration": 9,
        "hooks": {"LRScheduler": {"base_lrs": [np.float64(0.02)], "last_epoch": 9}},
        "_trainer": {"optimizer": {}},
    }
    content = {"model": convert(ours, "fpn_det", "detectron2").state, "trainer": trainer, "iteration": 9}
    torch.save(content, tmp_path / "model_0000009.pth")
    weights = read_as_ours(tmp_path / "model_0000009.pth")
    assert_same(weights.state, ours)
    assert "numpy" in weights.dropped["trainer.hooks.LRScheduler.base_lrs"]


@pytest.mark.parametrize("meta", [{"dataset_meta": {"classes": CLASSES, "palette": [(1, 2, 3)]}}, {"CLASSES": CLASSES}])
def test_a_checkpoint_of_mmdetection_is_read_with_its_classes(
    tmp_path: Path, ours: dict[str, Tensor], foreign_class: type, meta: dict
):
    state = OrderedDict(convert(ours, "fpn_det", "mmdet").state)
    content = {
        "meta": {"epoch": 12, "iter": 90, "cfg": "model = dict()", "time": "20240101", **meta},
        "state_dict": state,
        "message_hub": {
            "log_scalars": {"train/lr": foreign_class(), "count": np.float32(1)},
            "runtime_info": {"epoch": 12},
        },
        "ema_state_dict": {f"module.{name}": torch.zeros_like(value) for name, value in state.items()}
        | {"steps": torch.tensor(3)},
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.02}]},
        "param_schedulers": [{"last_step": 12}],
    }
    torch.save(content, tmp_path / "epoch_12.pth")
    weights = read_as_ours(tmp_path / "epoch_12.pth")
    assert_same({name: value for name, value in weights.state.items() if name in ours}, ours)
    assert (weights.project, weights.class_names) == ("mmdet", CLASSES)
    assert "history_buffer.HistoryBuffer" in weights.dropped["message_hub.log_scalars.train/lr"]
    assert weights.dropped["ema_state_dict"] == "the weights of the last step; state_dict holds their moving average"


def test_an_own_checkpoint_gives_its_moving_average(tmp_path: Path, ours: dict[str, Tensor]):
    zeros = {name: torch.zeros(1) for name in ours}
    content = {
        "format": "fpn_det checkpoint 1",
        "class_names": list(CLASSES),
        "config": "seed: 0",
        "model": zeros,
        "ema": ours,
    }
    torch.save(content, tmp_path / "best.pt")
    weights = read_as_ours(tmp_path / "best.pt")
    assert_same(weights.state, ours)
    assert (weights.project, weights.class_names, weights.config) == ("fpn_det", CLASSES, "seed: 0")
    assert weights.dropped["model"] == "the weights of the last step; ema holds their moving average"
    torch.save(content | {"ema": None, "model": ours}, tmp_path / "raw.pt")
    assert_same(read_as_ours(tmp_path / "raw.pt").state, ours)


class Malice:
    """Asks for a call when it is unpickled."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.system, exec, eval, __import__, os.remove, pickle.loads])
@pytest.mark.parametrize("kind", ["torch", "old torch", "pickle"])
def test_malice_runs_nothing_and_ends_in_one_sentence(tmp_path: Path, ours: dict[str, Tensor], function, kind: str):
    victim = tmp_path / "victim"
    victim.touch()
    argument = (
        str(victim)
        if function is os.remove
        else f"touch {tmp_path}/ran"
        if function is os.system
        else f"open({str(tmp_path / 'ran')!r}, 'w')"
    )
    content = {"model": convert(ours, "fpn_det", "torchvision").state, "args": [Malice(function, argument)]}
    file = tmp_path / "weights"
    if kind == "pickle":
        content["model"] = {name: value.numpy() for name, value in content["model"].items()}
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=kind == "torch")
    with pytest.raises(ValueError) as refusal:
        read_weights(file)
    assert str(refusal.value).startswith(f"{file}: expected ") and "\n" not in str(refusal.value)
    assert function.__name__ in str(refusal.value)
    assert refusal.value.__cause__ is None
    assert victim.exists() and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "damaged or holds more than that"),
        (b"hello", "damaged or holds more than that"),
        (pickle.dumps([1, 2]), "expected a state dict or a checkpoint, got a list"),
        (pickle.dumps({"model": {"a": "text"}}), "expected weights, got none"),
        (pickle.dumps({}), "expected weights, got none (the file is empty)"),
        (pickle.dumps({"model": {"a": np.array([None])}}), "expected weights, got none (a: a ndarray, not a tensor)"),
        (
            pickle.dumps({"model": {"a": np.zeros(3)}}),
            "expected a Faster R-CNN with FPN of fpn_det, torchvision, detectron2, mmdet",
        ),
    ],
)
def test_other_files_are_refused_in_words(tmp_path: Path, content: bytes, words: str):
    file = tmp_path / "file.pth"
    file.write_bytes(content)
    with pytest.raises(ValueError) as refusal:
        read_as_ours(file)
    assert words in str(refusal.value)


def test_a_missing_and_a_truncated_file_are_refused(tmp_path: Path, ours: dict[str, Tensor]):
    with pytest.raises(ValueError, match="got no such file"):
        read_weights(tmp_path / "nothing.pth")
    torch.save(ours, tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged or holds more than that"):
        read_weights(tmp_path / "half.pth")


def test_an_object_in_place_of_a_state_dict_is_refused(tmp_path: Path, foreign_class: type):
    torch.save(foreign_class(), tmp_path / "object.pth")
    with pytest.raises(ValueError, match="expected a state dict or a checkpoint, got an object of a foreign class"):
        read_weights(tmp_path / "object.pth")
