"""Programs of torch.export in .pt2 files: written with operators of torch and torchvision alone, read without running what they hold.

torch.export.load would run code of a hostile file: pickles, expressions of shapes, guards, and names that become source
code. So a file is read by torch only if it is made of what `write_program` writes.
"""

from __future__ import annotations

import ast
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.export import ExportedProgram

from fpn_det.weight_files import check_archive

METADATA_FILE = "fpn_det.json"  # within the archive
RECORDS = re.compile(
    r"archive_format|archive_version|version|byteorder|\.data/\w+|models/model\.json|extra/fpn_det\.json|"
    r"data/(weights|constants)/((weight|tensor)_\d+|model_(weights|constants)_config\.json)|data/sample_inputs/model\.pt"
)
CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
PLAIN_TEXT = re.compile(r"[\w.:+-]*")  # no text of this kind is more than a name
OPERATORS = re.compile(
    r"torch\.ops\.(aten(?!\.from_file)|torchvision)\.\w+\.\w+|torch\.sym_\w+|math\.\w+|"
    r"_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|pos|abs|getitem|eq|ne|lt|le|gt|ge|and_|or_|not_)"
)
SHAPE_TERMS = {
    *("Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Min", "Max", "Mod", "PythonMod", "FloorDiv"),
    *("CleanDiv", "CeilToInt", "FloorToInt", "TruncToInt", "ToFloat", "IntTrueDiv", "FloatTrueDiv"),
    *("Equality", "Unequality", "GreaterThan", "LessThan", "StrictGreaterThan", "StrictLessThan", "And", "Or", "Not"),
}
ASSERTIONS = (torch.ops.aten._assert_scalar.default, torch.ops.aten._assert_tensor_metadata.default)
CONTAINERS = {"builtins.tuple", "builtins.list", "builtins.dict"}


def write_program(program: ExportedProgram, path: Path, metadata: dict[str, Any]) -> None:
    """Write a .pt2 file.

    Args:
        program: see `Graph.trace`.
        metadata: plain values by name.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torchvision's own operators
        plain = program.run_decompositions({torch.ops.fpn_det.suppress.default: _suppress})
    for node in list(plain.graph.nodes):
        # traces and names of modules have the paths of this machine
        node.meta = {name: value for name, value in node.meta.items() if name in ("val", "unbacked_bindings")}
        if node.target in ASSERTIONS:
            plain.graph.erase_node(node)
    plain.graph.eliminate_dead_code()
    plain._guards_code = []  # the sizes of inputs are checked by `ExportedFile`
    torch.export.save(plain, path, extra_files={METADATA_FILE: json.dumps(metadata)})


def read_program(path: Path) -> tuple[nn.Module, dict[str, str]]:
    """Read a .pt2 file. Returns its program and the JSON texts of its metadata by name.

    Raises:
        ValueError: the file has other content than `write_program` writes; nothing of it was run.
    """
    metadata = _check(path)
    log = logging.getLogger("torch._export.serde.serialize")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of symbols that a simplified graph no longer needs
    try:
        program = torch.export.load(path)
    finally:
        log.setLevel(level)
    return program.module(check_guards=False), metadata


def _check(path: Path) -> dict[str, str]:
    """Refuse a file that torch would run a part of; by torch's own reader, so that both see the same. Returns the metadata."""
    check_archive(path)
    archive = torch._C.PyTorchFileReader(str(path))
    names = archive.get_all_records()
    _expect(all(RECORDS.fullmatch(name) for name in names), "parts of a program", sorted(names))
    _expect("models/model.json" in names and "extra/fpn_det.json" in names, "a program of this version", sorted(names))
    for config in CONFIGS:
        for payload in json.loads(archive.get_record(config))["config"].values():
            _expect(payload["use_pickle"] is False, "tensors", payload)
            _expect(re.fullmatch(r"(weight|tensor)_\d+", payload["path_name"]), "tensors", payload)
    torch.load(io.BytesIO(archive.get_record("data/sample_inputs/model.pt")), weights_only=True)
    for name, value in _walk(json.loads(archive.get_record("models/model.json"))):
        if name == "expr_str":
            _check_expression(value)
        elif name == "target":
            _expect(OPERATORS.fullmatch(value), "operators of torch", value)
        elif name in ("in_spec", "out_spec"):
            kinds = [text for key, text in _walk(json.loads(value)) if key == "type"]
            _expect(CONTAINERS.issuperset(kinds), "plain containers", kinds)
        else:
            _expect(PLAIN_TEXT.fullmatch(value), "plain names", value)
    metadata = json.loads(archive.get_record("extra/fpn_det.json"))
    return {name: json.dumps(value) for name, value in metadata.items()}


def _walk(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All texts of nested containers with their names, and the names themselves under the name ''."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield "", key
            yield from _walk(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from _walk(item, name)
    elif isinstance(value, str):
        yield name, value


def _check_expression(text: str) -> None:
    """Refuse an expression of a shape that is not made of symbols, numbers and arithmetic."""
    for node in ast.walk(ast.parse(text, mode="eval")):
        if isinstance(node, ast.Constant):
            _expect(not isinstance(node.value, str) or PLAIN_TEXT.fullmatch(node.value), "plain names", text)
        elif isinstance(node, ast.Name):
            _expect(node.id in SHAPE_TERMS, "arithmetic", text)
        else:
            kinds = (ast.Expression, ast.Call, ast.keyword, ast.UnaryOp, ast.USub, ast.Load)
            _expect(isinstance(node, kinds), "arithmetic", text)


def _expect(holds: object, what: str, got: object) -> None:
    if not holds:
        raise ValueError(f"expected {what}, got {str(got)[:80]}")


def _suppress(
    boxes: Tensor, scores: Tensor, valid: Tensor, labels: Tensor | None, iou_threshold: float, batched: bool
) -> Tensor:
    """Suppression of all groups by one call of torchvision's operator; see `models.nms`.

    Groups are shifted apart in float64, where that costs no precision.
    """
    assert labels is None, "groups are images and classes"
    boxes = boxes.double()
    extent = torch.where(boxes.isfinite(), boxes, 0.0).amax() + 1
    group = torch.arange(valid.shape[0], device=valid.device)[:, None, None]
    apart = (boxes + group * extent).flatten(0, 1)
    (chosen,) = torch.where(valid.flatten())
    kept = chosen[torchvision.ops.nms(apart[chosen], scores.flatten()[chosen].double(), iou_threshold)]
    keep = torch.zeros_like(valid).flatten()
    return keep.index_put((kept,), torch.ones_like(kept, dtype=torch.bool)).view_as(valid)
