"""What the tests share. Each worker computes on one core, so that two of them fill two cores and no more."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch when it is imported, which comes after this line

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Settings that make the demo small enough for a test: steps of a fraction of a second.
TINY = (
    "experiment=demo",
    "device=cpu",
    "data.num_workers=0",
    "model.neck.channels=32",
    "model.roi_head.box_head.width=64",
    "trainer.max_steps=2",
    "trainer.batch_size=4",
)


@pytest.fixture(scope="session")
def shapes_dataset(tmp_path_factory) -> Path:
    """8 + 8 images of 96 x 128 px in COCO's layout."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    script = ROOT / "datasets" / "make_shapes.py"
    arguments = ["--out", str(folder), "--train", "8", "--val", "8", "--size", "96", "128", "--workers", "1"]
    subprocess.run([sys.executable, str(script), *arguments], check=True, capture_output=True)
    return folder


@pytest.fixture
def run_tool(tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """Run a tool in a folder of its own, as a person would, and give what it printed and its exit code."""

    def run(tool: str, *arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
        command = [sys.executable, *launcher, str(ROOT / "tools" / tool), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    return run
