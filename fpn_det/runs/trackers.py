"""Experiment trackers beside TensorBoard: MLflow, Weights & Biases, Trackio. Each is an extra, imported when it is asked for.

Where they write is theirs to configure: MLFLOW_TRACKING_URI, WANDB_MODE=offline, TRACKIO_DIR. A run keeps its id in `trackers.json`,
so that a resumed one continues there. Trackers cannot take back the points that a killed run wrote after its checkpoint.
"""

from __future__ import annotations

import importlib.util
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

LoggerName = Literal["tensorboard", "mlflow", "wandb", "trackio"]

IDS = "trackers.json"  # file of the run folder: id of the run in each tracker
PROJECT = "fpn_det"
OFFLINE = {
    "mlflow": "Set MLFLOW_TRACKING_URI to a server, or to sqlite:///<file> for a local store.",
    "wandb": "Log in with `wandb login`, or set WANDB_MODE=offline.",
    "trackio": "See its documentation.",
}


class Tracker(Protocol):
    """Interface by which a run writes to a tracker. Rank 0 only."""

    run_id: str

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step."""

    def image(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        """Write an RGB image [h, w, 3]."""

    def close(self) -> None:
        """Write what is pending."""


class MLflow:
    """A run of MLflow's experiment `fpn_det`."""

    def __init__(self, run_id: str | None, name: str, settings: Mapping[str, Any]) -> None:
        import mlflow

        self._client = mlflow.MlflowClient()
        if run_id is None:
            found = self._client.get_experiment_by_name(PROJECT)
            experiment = self._client.create_experiment(PROJECT) if found is None else found.experiment_id
            run_id = self._client.create_run(experiment, run_name=name).info.run_id
            for key, value in settings.items():
                self._client.log_param(run_id, _plain_key(key), str(value)[:500])  # the limit of older servers
        self.run_id = run_id

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._client.log_metric(self.run_id, _plain_key(name), value, step=step)

    def image(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        self._client.log_image(self.run_id, image, artifact_file=f"{name}/step_{step:08}.png")

    def close(self) -> None:
        self._client.set_terminated(self.run_id)


class _WandbInterface:
    """Methods of Weights & Biases and of Trackio, which has the same interface."""

    _run: Any
    _image: Any

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        self._run.log({name: self._image(image)}, step=step)

    def close(self) -> None:
        self._run.finish()


class Wandb(_WandbInterface):
    """A run of the project `fpn_det` of Weights & Biases. Points of steps that it has already are dropped by it."""

    def __init__(self, run_id: str | None, name: str, settings: Mapping[str, Any]) -> None:
        import wandb

        self.run_id = run_id or uuid.uuid4().hex
        self._run = wandb.init(project=PROJECT, id=self.run_id, name=name, config=dict(settings), resume="allow")
        self._image = wandb.Image


class Trackio(_WandbInterface):
    """A run of Trackio's local project `fpn_det`, which continues runs by their names."""

    def __init__(self, run_id: str | None, name: str, settings: Mapping[str, Any]) -> None:
        import trackio

        self.run_id = run_id or f"{name}_{uuid.uuid4().hex[:8]}"
        self._run = trackio.init(project=PROJECT, name=self.run_id, config=dict(settings), resume="allow")
        self._image = trackio.Image


TRACKERS: dict[str, Callable[[str | None, str, Mapping[str, Any]], Tracker]] = {
    "mlflow": MLflow,
    "wandb": Wandb,
    "trackio": Trackio,
}


def check_installed(names: Sequence[LoggerName]) -> None:
    """Refuse trackers whose package is not installed.

    Raises:
        ValueError: names the extra.
    """
    for name in names:
        if name in TRACKERS and importlib.util.find_spec(name) is None:
            raise ValueError(
                f"logger: expected an installed {name}, got none. Install it with pip install 'fpn_det[{name}]'."
            )


def start_trackers(names: Sequence[LoggerName], folder: Path, settings: Mapping[str, Any]) -> dict[str, Tracker]:
    """Start the trackers of a run, or continue those of its earlier life.

    Raises:
        ValueError: one of them cannot start, for lack of a network or a login.
    """
    file = folder / IDS
    ids = json.loads(file.read_text()) if file.is_file() else {}
    started: dict[str, Tracker] = {}
    for name in names:
        if name not in TRACKERS:
            continue
        try:
            tracker = TRACKERS[name](ids.get(name), "/".join(folder.absolute().parts[-2:]), settings)
        except Exception as error:  # of any kind: it is theirs
            reason = (str(error).splitlines() or [""])[0]
            raise ValueError(f"logger: {name} cannot start: {reason} {OFFLINE[name]}") from error
        started[name], ids[name] = tracker, tracker.run_id
    if started:
        file.write_text(json.dumps(ids), encoding="utf-8")
    return started


def _plain_key(name: str) -> str:
    """The name with the characters that MLflow admits."""
    return "".join(letter if letter.isalnum() or letter in "/_-. " else "_" for letter in name)
