"""Every kind of detector in every format beside torch: one dynamic file for batches of 1 and 3, and for two image sizes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from matrix_case import CASES, QUANTIZED
from tiny import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_files_of_a_detector_detect_what_torch_detects(name: str, tmp_path: Path):
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    command = [sys.executable, str(Path(__file__).parent / "matrix_case.py"), name, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr[-3000:]
    results = json.loads(ended.stdout.splitlines()[-1])
    assert results.pop("most") == 100 and results.pop("other weights are noticed")
    formats = {"torch", "onnx", *(["openvino"] if importlib.util.find_spec("openvino") else [])}
    quantized = results.pop("int8", None)
    assert results.keys() == formats
    for format, found in results.items():
        assert found["images"] >= 8 and found["empty"] >= 1 and found["detections"] > 200, (format, found)
        assert found["ok"], (format, found)
    if name == QUANTIZED and importlib.util.find_spec("nncf"):
        # it can be opened and run; with random weights, 8 bits change the order of the proposals and so everything
        assert quantized["images"] == 8 and quantized["score"] > 0
