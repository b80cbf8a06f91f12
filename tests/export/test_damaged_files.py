"""Damaged, foreign and truncated files, and wrong inputs: one sentence each, in every format."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT

LIBRARIES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino"), "torch": ()}


@pytest.mark.slow
@pytest.mark.parametrize("format", LIBRARIES)
def test_damaged_files_and_wrong_inputs_end_in_one_sentence(format: str, tmp_path: Path):
    for library in LIBRARIES[format]:
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    command = [sys.executable, str(Path(__file__).parent / "damaged_case.py"), format, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr[-3000:]
    messages = json.loads(ended.stdout.splitlines()[-1])
    for name, message in messages.items():
        assert message and "\n" not in message and "expected" in message and "got" in message, (name, message)
        assert ("bad." in message) == (name not in INPUTS), (name, message)
    for name, words in INPUTS.items():
        assert words in messages[name]
    assert "metadata: expected class_names" in messages["stranger"]
    assert "metadata.category_ids.0: expected a whole number" in messages["other type"]


INPUTS = {
    "empty batch": "at least one image",
    "float images": "expected images of torch.uint8, got torch.float32",
    "other layout": "expected images [B, H, W, 3]",
    "float sizes": "expected sizes of torch.int64, got torch.float32",
    "sizes of one": "expected images [B, H, W, 3] and sizes [B, 2]",
}
