"""Fixtures and settings of all tests. Each worker computes on one core, so that two of them fill two cores and no more."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch when it is imported, which comes after this line

import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny import ROOT

pytest_plugins = ["pictures"]


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory) -> None:
    """Files that are remembered from run to run stay in the folder of the tests."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shapes_dataset(tmp_path_factory) -> Path:
    """8 + 8 images of 96 x 128 px in COCO's layout."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    script = ROOT / "datasets" / "make_shapes.py"
    arguments = ["--out", str(folder), "--train", "8", "--val", "8", "--size", "96", "128", "--workers", "1"]
    subprocess.run([sys.executable, str(script), *arguments], check=True, capture_output=True)
    return folder


@dataclass
class Result:
    """The output of a program, and its exit code."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run_tool(tmp_path, monkeypatch, capsys) -> Callable[..., Result]:
    """Run a tool with these arguments in the folder of the test, in this process: starting Python takes longer than the test."""

    def run(tool: str, *arguments: str) -> Result:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # restores it afterwards
        monkeypatch.setattr(sys, "argv", [str(ROOT / "tools" / tool), *arguments])
        monkeypatch.syspath_prepend(ROOT / "tools")  # as Python does for a script
        code = 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        printed = capsys.readouterr()
        return Result(code, printed.out, printed.err)

    return run
