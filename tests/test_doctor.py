from __future__ import annotations

import torch
import torchvision

from fpn_det import doctor


def test_doctor_finds_nothing_wrong_here(capsys):
    assert doctor.main() == 0
    screen = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in screen and "All is well." in screen


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


def test_doctor_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "versions", lambda: dict.fromkeys(doctor.PACKAGES, "1.0") | {"pycocotools": "missing"})
    assert doctor.main() == 1
    assert "pip install pycocotools" in capsys.readouterr().out
