"""Files of `fpn-det export` that cannot be opened, in the quick suite; `test_damaged_files` has more."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT

from fpn_det.export.exported import ExportedFile


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
