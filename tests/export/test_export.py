"""Files of `fpn-det export`: refusals, and the detections of an ONNX file beside those of torch."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import ROOT

from fpn_det.export.exported import ExportedDetector, ExportedFile
from fpn_det.export.graph import Graph
from fpn_det.export.proof import cases, compare
from fpn_det.export.writing import write

sys.path.insert(0, str(Path(__file__).parent.parent / "models"))
from test_detector import make_batch, make_model, spread_out
from test_parts import METADATA


def test_a_damaged_onnx_file_is_refused(tmp_path: Path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ValueError, match="got a damaged or foreign file"):
        ExportedFile(tmp_path / "model.onnx")


def test_a_damaged_openvino_file_is_refused(tmp_path: Path):
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("openvino is not installed")
    (tmp_path / "model.xml").write_bytes(b"no model")
    # in a process of its own: openvino keeps a log handler on the stream of the test, which is closed afterwards
    code = "import sys; from fpn_det.export.exported import ExportedFile; ExportedFile(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path / "model.xml")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 1 and "got a damaged or foreign file" in ended.stderr


def test_a_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="expected an exported model, got no such file"):
        ExportedFile(tmp_path / "model.onnx")


@pytest.mark.slow
def test_an_onnx_file_detects_what_torch_detects(tmp_path: Path):
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    model, path = spread_out(make_model()).eval(), tmp_path / "model.onnx"
    write(Graph(model).trace(None, torch.uint8), "onnx", path, METADATA)
    exported = ExportedDetector(ExportedFile(path), model)
    found = compare(model, exported, cases([make_batch((1,)), make_batch((2,), (160, 224))]))
    assert found.detections > 50 and found.is_within_tolerance
    for images, message in [
        (torch.zeros(0, 96, 96, 3, dtype=torch.uint8), "at least one image"),
        (torch.zeros(1, 96, 96, 3), "expected images of torch.uint8"),
    ]:
        with pytest.raises(ValueError, match=message):
            exported.file(images, torch.tensor([[96, 96]] * len(images)).view(-1, 2))
    one_pixel = exported.file(torch.zeros(1, 1, 1, 3, dtype=torch.uint8), torch.tensor([[1, 1]]))
    assert one_pixel.boxes.shape[2] == 4
