from __future__ import annotations

import os
import subprocess
import sys

import torch
import torchvision
from tiny import ROOT

from fpn_det import doctor


def test_doctor_finds_nothing_wrong_here(capsys):
    assert doctor.main() == 0
    screen = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in screen and "Everything works." in screen


def test_doctor_names_both_versions_and_a_remedy_when_an_operator_fails(monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(torchvision.ops, "nms", fail)
    assert doctor.main() == 1
    screen = capsys.readouterr().out
    assert "operator torchvision::nms does not exist" in screen
    assert f"torch {doctor.versions()['torch']} and torchvision {doctor.versions()['torchvision']} do not fit" in screen


def test_doctor_notices_wrong_results(monkeypatch):
    monkeypatch.setattr(torchvision.ops, "nms", lambda *_: torch.tensor([0, 1]))
    assert "results are wrong" in doctor.try_operators(torch.device("cpu"))


def test_doctor_names_missing_packages(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "versions", lambda: dict.fromkeys(doctor.PACKAGES, "1.0") | {"pycocotools": "missing"})
    assert doctor.main() == 1
    assert "pip install pycocotools" in capsys.readouterr().out


def test_doctor_reads_resizes_draws_trains_and_evaluates(capsys):
    assert doctor.try_everything() == []
    screen = capsys.readouterr().out
    for part in ("read images", "transform and resize", "draw", "train one step", "evaluate"):
        assert f"{part:22} works" in screen


def test_doctor_finds_an_opencv_that_reads_nothing(monkeypatch, capsys):
    import cv2

    from fpn_det import image_io

    def fail(*_):
        raise AttributeError("module 'cv2' has no attribute 'IMREAD_COLOR_RGB'")

    monkeypatch.setattr(cv2, "imdecode", fail)
    monkeypatch.setattr(image_io, "_decode_opencv", fail, raising=False)
    assert doctor.main() == 1
    screen = capsys.readouterr().out
    assert "read images            fails: AttributeError: module 'cv2' has no attribute" in screen
    assert "pip install --upgrade opencv-python-headless" in screen


def test_doctor_names_packages_that_cannot_be_imported(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)  # an import of it fails
    assert doctor.main() == 1
    screen = capsys.readouterr().out
    assert "pycocotools.mask       cannot be imported: ModuleNotFoundError" in screen and "--force-reinstall" in screen


def test_doctor_names_packages_below_the_bounds(monkeypatch):
    monkeypatch.setattr(doctor, "requires", lambda _: ["torch>=999.1", "numpy>=1.26", "ruff==1; extra == 'dev'"])
    assert doctor.outdated() == ["torch>=999.1"]


def test_doctor_starts_without_any_package_of_others(tmp_path):
    """As in an environment where the installation was interrupted."""
    command = [sys.executable, "-S", "-c", "from fpn_det import doctor; raise SystemExit(doctor.main())"]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert ended.returncode == 1 and "Missing: torch, torchvision" in ended.stdout and not ended.stderr
