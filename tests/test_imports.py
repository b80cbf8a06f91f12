"""The layers: who may import whom, read from the source itself."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "fpn_det").rglob("*.py"), *(ROOT / "tools").rglob("*.py")])

RANKS = {
    "": 0,
    **dict.fromkeys(
        [
            "structures",
            "caching",
            "runtime",
            "array_io",
            "image_io",
            "migration",
            "safe_yaml",
            "locations",
            "terminal",
            "synonyms",
            "pages",
        ],
        0,
    ),
    "weight_files": 0,
    **dict.fromkeys(["errors", "image_io", "boxes"], 1),
    "schema": 2,
    "annotations": 3,
    **dict.fromkeys(["models", "data"], 4),
    **dict.fromkeys(["evaluation", "interop"], 5),
    **dict.fromkeys(["visualization", "config"], 6),
    **dict.fromkeys(["inference", "runs"], 7),
    **dict.fromkeys(["training", "report"], 8),
    "composition": 9,
    "data_report": 7,
    **dict.fromkeys(["pretrained", "export", "run_report"], 10),
    **dict.fromkeys(["api", "benchmark", "doctor"], 11),
    "cli": 12,
    "tools": 13,
}

# A library that only some files may import.
IMPORTERS = {
    "hydra": {"fpn_det/composition.py", "fpn_det/cli/launch.py"},
    "omegaconf": {"fpn_det/composition.py", "fpn_det/cli/launch.py"},
    "pycocotools": {"fpn_det/evaluation/engines.py"},
    "hotcoco": {"fpn_det/evaluation/engines.py"},
    "torch.utils.tensorboard": {"fpn_det/runs/log.py"},
    "tensorboard": {"fpn_det/runs/log.py", "fpn_det/runs/scalars.py"},
    **{name: {"fpn_det/runs/trackers.py"} for name in ("mlflow", "wandb", "trackio")},
    "albumentations": {"fpn_det/data/transforms.py"},
    "torch.distributed": {"fpn_det/runtime.py"},
    "av": {"fpn_det/inference/video.py"},
    "tifffile": {"fpn_det/array_io.py"},
    "timm": {"fpn_det/models/timm_backbone.py", "fpn_det/weight_files.py"},
    "huggingface_hub": {"fpn_det/weight_files.py"},
    "safetensors": {"fpn_det/weight_files.py"},
}


def imports(path: Path) -> list[str]:
    """The full names of what a file imports, `from a import b` as `a.b`."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the full name, not a relative import."
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def part(path: Path) -> str:
    """The part of the table that a file belongs to: a module or a folder of fpn_det, or `tools`."""
    relative = path.relative_to(ROOT)
    if relative.parts[0] == "tools":
        return "tools"
    return relative.with_suffix("").parts[1].replace("__init__", "")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_to_lower_ranks(path):
    here = part(path)
    for name in imports(path):
        if name.split(".")[0] != "fpn_det":
            continue
        there = name.split(".")[1] if "." in name else ""
        there = there if there in RANKS else ""
        assert here == there or RANKS[there] < RANKS[here], f"{here} imports {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_of_a_library_stay_in_its_file(path):
    place = str(path.relative_to(ROOT))
    for name in imports(path):
        for library, importers in IMPORTERS.items():
            if name == library or name.startswith(library + "."):
                assert place in importers or part(path) in importers, f"{place} imports {name}"


def test_imports_table_names_every_part():
    parts = {part(path) for path in SOURCES}
    assert parts <= set(RANKS), f"not in the table: {parts - set(RANKS)}"
