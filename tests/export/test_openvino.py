"""OpenVINO files in float32, float16 and int8 beside torch. In a process of its own: openvino keeps handlers on the test's streams."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT

PROGRAM = """
import json, sys
from dataclasses import asdict, replace
from pathlib import Path
sys.path[:0] = sys.argv[2:]
import openvino, torch
from test_detector import make_batch
from test_parts import METADATA, make
from fpn_det.export.exported import ExportedDetector, ExportedFile
from fpn_det.export.graph import Graph
from fpn_det.export.proof import cases, compare
from fpn_det.export.quantization import in_float
from fpn_det.export.writing import write_onnx, write_openvino

model, folder = make(), Path(sys.argv[1])
write_onnx(Graph(model).trace(None, torch.uint8), folder / 'model.onnx', METADATA)
batches = [make_batch((1,), (100, 160)), make_batch((2,), (160, 224))]
inputs = [(batch.pixels.permute(0, 2, 3, 1).contiguous(), batch.sizes) for batch in batches]
results = {}

def logits_and_deltas(path, precision):  # of the RPN on all levels, in an order that does not depend on their values
    network = openvino.Core().read_model(path)
    names = in_float(network) if precision == "fp32" else last
    found = [item for item in network.get_ordered_ops() if item.get_type_name() == "Convolution" and item.get_friendly_name() in names]
    outputs = network.add_outputs([(item.get_friendly_name(), 0) for item in found])
    last.update(item.get_friendly_name() for item in found)
    run = openvino.Core().compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})  # as ExportedFile opens them
    values = list(run([part.numpy() for part in inputs[0]]).values())[-len(outputs):]
    return [torch.tensor(value).double() for value in values]

last, expected = set(), None
for precision in ("fp32", "fp16", "int8"):
    path = folder / f"{precision}.xml"
    write_openvino(folder / "model.onnx", path, replace(METADATA, precision=precision), inputs)
    found = compare(model, ExportedDetector(ExportedFile(path), model), cases(batches))
    kinds = [operator.get_type_name() for operator in openvino.Core().read_model(path).get_ops()]
    size = path.with_suffix(".bin").stat().st_size
    values = logits_and_deltas(path, precision)
    expected = expected or values
    error = max(float((value - other).norm() / other.norm()) for value, other in zip(values, expected, strict=True))
    results[precision] = asdict(found) | {"error": error, "size": size, "fake": kinds.count("FakeQuantize"), "ok": found.is_within_tolerance}
network = openvino.Core().read_model(folder / "fp32.xml")
names = in_float(network)
results["in_float"] = sorted(item.get_type_name() for item in network.get_ops() if item.get_friendly_name() in names)
results["quantized"] = sorted({item.get_type_name() for item in network.get_ops() if item.get_friendly_name() not in names})
print(json.dumps(results))
"""


@pytest.mark.slow
def test_openvino_files_detect_what_torch_detects(tmp_path: Path):
    for library in ("onnx", "onnxscript", "openvino", "nncf"):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    places = [str(ROOT / "tests" / folder) for folder in ("", "export", "models")]
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), *places]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr[-3000:]
    results = json.loads(ended.stdout.splitlines()[-1])
    assert results["fp32"]["ok"] and results["fp32"]["detections"] > 20, results["fp32"]
    # Random weights detect something else with less precision, because proposals change places: the maps are compared.
    assert results["fp16"]["error"] < 0.005 and 0 < results["int8"]["error"] < 0.1, results
    assert all(results[precision]["images"] == results["fp32"]["images"] for precision in ("fp16", "int8"))
    assert results["fp16"]["size"] < 0.6 * results["fp32"]["size"]
    assert results["int8"]["size"] < 0.4 * results["fp32"]["size"] and results["int8"]["fake"] > 20
    assert {"ROIAlign", "TopK", "Exp"} < set(results["in_float"])
    # the last layers: of the RPN on five levels, and of the box head
    assert [results["in_float"].count(name) for name in ("Convolution", "MatMul")] == [5, 2]
    assert {"Convolution", "MatMul"} < set(results["quantized"])
    assert not {"ROIAlign", "TopK", "Exp"} & set(results["quantized"])
