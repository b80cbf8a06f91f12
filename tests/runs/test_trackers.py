from __future__ import annotations

import json

import numpy as np
import pytest

from fpn_det.runs import trackers
from fpn_det.runs.log import RunLog
from fpn_det.runs.meters import Pace
from fpn_det.runs.trackers import check_installed, start_trackers
from fpn_det.runtime import Ranks


def test_trackers_that_are_not_installed_are_refused(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    check_installed(["tensorboard"])
    with pytest.raises(ValueError, match=r"logger: expected an installed wandb, got none. .*'fpn_det\[wandb\]'"):
        check_installed(["tensorboard", "wandb"])


def test_trackers_that_cannot_start_or_fail_are_told(tmp_path, monkeypatch, capsys):
    class Broken:
        run_id = "1"

        def __init__(self, run_id, name, settings):
            if settings["offline"]:
                raise OSError("no network")

        def scalars(self, step, values):
            raise OSError("connection lost")

        def close(self):
            raise AssertionError("left out before")

    monkeypatch.setitem(trackers.TRACKERS, "wandb", Broken)
    with pytest.raises(ValueError, match=r"logger: wandb cannot start: no network .*WANDB_MODE=offline"):
        start_trackers(["wandb"], tmp_path, {"offline": True})
    with RunLog(tmp_path, Ranks()) as log:
        log.begin(Pace(0, 10, 1, 0), ["wandb"], {"offline": False})
        log.scalars(1, {"lr": 0.5})
        log.scalars(2, {"lr": 0.5})
    assert capsys.readouterr().out == "logger: wandb failed and gets nothing more: OSError: connection lost\n"


def test_mlflow_gets_settings_curves_and_images_and_continues_its_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed (extra mlflow)")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    folder = tmp_path / "runs" / "demo"
    for first in (0, 2):
        with RunLog(folder, Ranks()) as log:
            log.begin(Pace(first, 10, 1, 0), ["mlflow"], {"optimizer.lr": 0.1})
            for step in (first + 1, first + 2):
                log.scalars(step, {"per_class_AP/a(b)": step / 8, "AP/APs": None})
            log.image(first + 2, "a.jpg", np.zeros((4, 6, 3), np.uint8))
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("fpn_det").experiment_id])
    assert run.info.run_name == "runs/demo" and run.data.params == {"optimizer.lr": "0.1"}
    assert json.loads((folder / "trackers.json").read_text()) == {"mlflow": run.info.run_id}
    points = client.get_metric_history(run.info.run_id, "per_class_AP/a_b_")
    assert [(point.step, point.value) for point in points] == [(k, k / 8) for k in (1, 2, 3, 4)]
    images = client.list_artifacts(run.info.run_id, "images/a.jpg")
    assert [image.path for image in images] == [f"images/a.jpg/step_{step:08}.png" for step in (2, 4)]
    assert not list(folder.glob("events.*"))
