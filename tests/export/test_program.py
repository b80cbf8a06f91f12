"""Files of torch.export: read back, and refused where torch would run a part of them."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim

from fpn_det.export.exported import _open_program
from fpn_det.export.program import read_program, write_program
from fpn_det.models.nms import nms_keep

MODEL, SAMPLES = "models/model.json", "data/sample_inputs/model.pt"


class Suppression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(0.5))

    def forward(self, boxes, scores):
        return nms_keep(boxes + self.shift, scores, scores > 0.2, 0.5)


def boxes_of(groups: int, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(groups, count, 2, generator=generator) * 50
    boxes = torch.cat([corners, corners + 10 + torch.rand(groups, count, 2, generator=generator) * 30], dim=2)
    return boxes, torch.rand(groups, count, generator=generator)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    groups, count = Dim("groups", min=1, max=100), Dim("count", min=2, max=1000)
    shapes = ({0: groups, 1: count}, {0: groups, 1: count})
    program = torch.export.export(Suppression(), boxes_of(3, 20, 0), dynamic_shapes=shapes)
    path = tmp_path_factory.mktemp("program") / "model.pt2"
    write_program(program, path, {"class_names": ["a"], "step": 3})
    return path


def test_a_program_runs_in_its_own_precision(tmp_path):
    class Product(nn.Module):
        def forward(self, images, sizes):
            return images @ sizes, images, images, images, images

    images, sizes = torch.rand(3, 4), torch.rand(4, 5)
    write_program(torch.export.export(Product(), (images, sizes)), tmp_path / "model.pt2", {})
    run, _ = _open_program(tmp_path / "model.pt2", None, native=True)
    with torch.autocast("cpu", torch.bfloat16):  # as an evaluation in bf16 does
        assert (images @ sizes).dtype == torch.bfloat16
        (found, *_) = run(images.numpy(), sizes.numpy())
    assert torch.equal(found, images @ sizes)


def test_a_program_suppresses_as_the_detector_does(file):
    program, metadata = read_program(file)
    assert metadata == {"class_names": '["a"]', "step": "3"}
    for groups, count, seed in [(1, 25, 1), (4, 60, 2)]:
        boxes, scores = boxes_of(groups, count, seed)
        expected = Suppression()(boxes, scores)
        assert 0 < expected.sum() < (scores > 0.2).sum()
        assert torch.equal(program(boxes, scores), expected)
    assert not program(*boxes_of(2, 9, 3)[:1], torch.zeros(2, 9)).any()


def test_a_program_has_operators_of_torch_alone_and_no_paths(file):
    with zipfile.ZipFile(file) as archive:
        text = next(archive.read(name).decode() for name in archive.namelist() if name.endswith(MODEL))
    assert "fpn_det" not in text and "torch.ops.torchvision.nms" in text
    assert str(Path(__file__).parent) not in text


def rewritten(file: Path, target: Path, changes: dict[str, Callable[[bytes], bytes]]) -> Path:
    """A copy of an archive with some of its records changed."""
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(target, "w") as copy:
        for name in source.namelist():
            inner = name.split("/", 1)[1]
            content = source.read(name)
            copy.writestr(name, changes[inner](content) if inner in changes else content)
    return target


class Writes:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def with_pickle(content: bytes) -> bytes:
    buffer = io.BytesIO()
    torch.save(Writes(), buffer)
    return buffer.getvalue()


def with_text(old: str, new: str) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        assert old in content.decode()
        return content.decode().replace(old, new).encode()

    return change


def with_guard(content: bytes) -> bytes:
    return json.dumps(json.loads(content) | {"guards_code": ["__import__('os').mkdir('ran')"]}).encode()


def with_expression(content: bytes) -> bytes:
    model = json.loads(content)
    for value in model["graph_module"]["graph"]["sym_int_values"].values():
        value["as_expr"]["expr_str"] = "__import__('os').mkdir('ran')"
    return json.dumps(model).encode()


CHANGES = {
    "pickle": ({SAMPLES: with_pickle}, "Weights only load failed"),
    "pickled weights": (
        {"data/weights/model_weights_config.json": with_text('"use_pickle": false', '"use_pickle": true')},
        "expected tensors",
    ),
    "guard": ({MODEL: with_guard}, "expected plain names"),
    "expression": ({MODEL: with_expression}, "expected arithmetic"),
    "operator": ({MODEL: with_text("torch.ops.torchvision.nms.default", "torch.load")}, "expected operators of torch"),
    "name": ({MODEL: with_text('"name": "boxes"', '"name": "boxes=__import__(0)"')}, "expected plain names"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_program_that_would_run_code_is_refused_before_it_does(file, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    changes, message = CHANGES[kind]
    with pytest.raises((ValueError, pickle.UnpicklingError), match=message):
        read_program(rewritten(file, tmp_path / "hostile.pt2", changes))
    assert not (tmp_path / "ran").exists()


def test_an_unchanged_copy_is_read(file, tmp_path):
    read_program(rewritten(file, tmp_path / "copy.pt2", {}))
