"""The distribution: sdist and wheel are built, and the installed wheel trains, evaluates and predicts without a checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest
from tiny import ROOT

BUILT = ("fpn_det", "configs", "setup.py", "pyproject.toml", "README.md", "LICENSE")
BUILD = """
import sys
from setuptools import build_meta

output = sys.argv[1]  # setuptools changes it
build_meta.build_sdist(output)
build_meta.build_wheel(output)
"""
PREDICT = """
import sys
from pathlib import Path
import fpn_det
from fpn_det import api
assert Path(fpn_det.__file__).is_relative_to(sys.prefix), fpn_det.__file__
(run,) = Path("runs/small").iterdir()
(prediction,) = api.predict(run, [sys.argv[1]], device="cpu")
print("predicted", len(prediction.boxes))
"""


def call(command: list[str | Path], folder: Path) -> str:
    """Run a program without the checkout on its path; returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """A folder with the sdist and the wheel."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in BUILT:
        item = ROOT / name
        if item.is_dir():
            shutil.copytree(item, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(item, source / name)
    call([sys.executable, "-c", BUILD, output], source)
    return output


@pytest.fixture(scope="module")
def environment(dist, tmp_path_factory) -> Path:
    """The programs of an environment that has the wheel, and the dependencies of this one."""
    folder = tmp_path_factory.mktemp("environment")
    call([sys.executable, "-m", "venv", folder], folder)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    (wheel,) = dist.glob("*.whl")
    call([programs / "python", "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", wheel], folder)
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(call([programs / "python", "-c", purelib], folder).strip())
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return programs


@pytest.mark.slow
def test_sdist_has_everything_that_the_wheel_is_built_from(dist):
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fpn_det").rglob("*.py")}
    configs = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    assert sources | configs | {"setup.py", "README.md", "LICENSE"} <= names


@pytest.mark.slow
def test_installed_wheel_trains_evaluates_and_predicts_without_the_checkout(environment, shapes_dataset, tmp_path):
    data = tmp_path / "data set"
    work = tmp_path / "work"
    work.mkdir()
    program = environment / "fpn-det"
    settings = ["experiment=small", "data=yolo", f"data.root={data}", "device=cpu", "data.num_workers=0"]
    assert "fpn-det train" in call([program, "--help"], work)
    assert "data=yolo" in call(
        [program, "convert-data", "source=coco", "target=yolo", f"input={shapes_dataset}", f"output={data}"], work
    )
    assert "Sound." in call([program, "check-data", *settings], work)
    call([program, "train", *settings, "trainer.max_steps=1", "trainer.batch_size=2"], work)
    (run,) = (work / "runs" / "small").iterdir()
    assert "AP" in call([program, "eval", f"run={run}"], work)
    assert run.name in call([program, "runs"], work)
    picture = next((data / "images" / "val").iterdir())
    assert "predicted" in call([environment / "python", "-c", PREDICT, picture], work)
