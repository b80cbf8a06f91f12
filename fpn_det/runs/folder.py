"""The folder of a run: which one it is, and what is written there before training starts."""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch

from fpn_det.runs.checkpoint import CheckpointFolder
from fpn_det.runs.log import shown_path
from fpn_det.runtime import current_ranks, run_on_main

LOCK = ".lock"
NAN_DUMP = "nan_dump"  # what a step that was not finite leaves, see `training.nonfinite`
PACKAGES = ("torch", "torchvision", "numpy", "pycocotools", "hotcoco", "hydra-core", "tensorboard", "albumentations")


@dataclass(frozen=True)
class RunFolder:
    """Where a run lives.

    Attributes:
        resume: go on with what is here.
        checkpoint: the file to go on from; None is the newest one here.
    """

    path: Path
    resume: bool = False
    checkpoint: Path | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within this context no other process writes here; all ranks enter together. Whatever ends the process ends it.

        The lock is the system's (POSIX), which workers do not inherit. On a network's file system without locks there
        is none.

        Raises:
            ValueError: another process holds it.
        """
        with (self.path / LOCK).open("a+") if current_ranks().is_main else nullcontext() as file:

            def take() -> None:
                assert file is not None, "rank 0 takes it for all"
                _take(file, self.path)

            run_on_main(take)
            yield

    def rescue(self) -> str:
        """What is safe, and how to go on with it."""
        files = self.checkpoints().files()
        if not files:
            return "There is no checkpoint yet."
        return f"Last good checkpoint: {shown_path(files[0])}. To go on, repeat the command with resume=auto run_dir={shown_path(self.path)}"

    def checkpoints(self, keep_last: int = 0) -> CheckpointFolder:
        """Its checkpoints."""
        return CheckpointFolder(self.path / "checkpoints", keep_last)

    def load(self, warn: Callable[[str], None]) -> dict[str, Any] | None:
        """The checkpoint to go on from; None to start from nothing. `warn` hears about broken ones.

        Raises:
            ValueError: no checkpoint is whole, or it holds weights alone.
        """
        if not self.resume:
            return None
        if self.checkpoint is None:
            state = self.checkpoints().load(warn)
        else:
            state = CheckpointFolder(self.checkpoint.parent, keep_last=0).load(warn, first=self.checkpoint)
        if state is not None and "optimizer" not in state:
            raise ValueError(
                f"resume: expected the checkpoint of a run, got weights alone in {self.checkpoint}. Say init_from instead of resume."
            )
        return state


def choose_folder(
    experiment: str | None,
    run_dir: str | None,
    resume: str | None,
    set_aside: bool = False,
    root: Path = Path("runs"),
) -> RunFolder:
    """Find or make the folder of a run. Rank 0 chooses for all; all ranks ask together.

    Args:
        experiment: its runs lie in `<root>/<experiment>/<date>_<time>`.
        run_dir: the folder itself, instead.
        resume: None for a new run; `auto` goes on with `run_dir`, or else with the newest run of the experiment that has
            not reached its end, or else starts a new one; a checkpoint or a run folder goes on from there.
        set_aside: move a `run_dir` that is in the way to a name with a date, instead of refusing it.
        root: of all experiments.

    Raises:
        ValueError: the folder is in use or cannot be written, or there is nothing to resume.
    """

    def choose() -> RunFolder:
        try:
            return find()
        except OSError as error:
            raise ValueError(
                f"run_dir: expected a folder to write in, got {error}. Choose another one with run_dir=<folder>."
            ) from None

    def find() -> RunFolder:
        experiment_folder = root / (experiment or "default")
        if resume is None:
            folder = RunFolder(_new_folder(experiment_folder) if run_dir is None else Path(run_dir))
            _make_room(folder.path, set_aside)
        elif resume == "auto":
            unfinished = None if run_dir is not None else _newest_unfinished(experiment_folder)
            path = Path(run_dir) if run_dir is not None else unfinished or _new_folder(experiment_folder)
            folder = RunFolder(path, resume=bool(RunFolder(path).checkpoints().files()))
        else:
            folder = _folder_of(Path(resume), run_dir)
        folder.path.mkdir(parents=True, exist_ok=True)
        (folder.path / ".writable").touch()
        (folder.path / ".writable").unlink()
        return folder

    return run_on_main(choose)


def write_settings(folder: Path, config: str, overrides: Sequence[str]) -> None:
    """Write down what this run is: `config.yaml` (complete), `overrides.txt`, `versions.json`. Rank 0 only."""
    (folder / "config.yaml").write_text(config)
    (folder / "overrides.txt").write_text("".join(f"{override}\n" for override in overrides))
    (folder / "versions.json").write_text(json.dumps({**versions(), "command": " ".join(sys.argv)}, indent=2) + "\n")


def versions() -> dict[str, str | None]:
    """What runs here: python, packages, GPU, and the revision of this code (None outside a git checkout)."""
    found: dict[str, str | None] = {
        "fpn_det": _version("fpn_det"),
        "git": _git_revision(),
        "python": platform.python_version(),
    }
    found |= {package: _version(package) for package in PACKAGES}
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _new_folder(experiment_folder: Path) -> Path:
    """A name that nobody has, also if several runs start in the same second."""
    name = f"{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}"
    for suffix in ("", *(f"_{number}" for number in range(2, 1000))):
        try:
            (experiment_folder / (name + suffix)).mkdir(parents=True)
            return experiment_folder / (name + suffix)
        except FileExistsError:
            continue
    raise ValueError(f"run_dir: expected a free name in {experiment_folder}, got a thousand runs in one second.")


def _take(lock: IO[str], path: Path) -> None:
    """Lock the folder `path` by its open file, until that is closed."""
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return  # the file system has no locks
        lock.seek(0)
        raise ValueError(
            f"run_dir: expected a folder that no other run writes in, got {path}, in use by {lock.read()}. "
            "Wait for its end, or choose another folder with run_dir=<folder>."
        ) from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.datetime.now():%Y-%m-%d %H:%M:%S}")
    lock.flush()


def _make_room(path: Path, set_aside: bool) -> None:
    if not path.exists() or all(item.name == LOCK for item in path.iterdir()):
        return
    if not set_aside:
        raise ValueError(
            f"run_dir: expected a new or empty folder, got {path}, which holds {', '.join(sorted(item.name for item in path.iterdir())[:5])}. "
            "To go on with that run, say resume=auto; to start another one, choose another folder."
        )
    with (path / LOCK).open("a+") as lock:
        _take(lock, path)
    path.rename(path.with_name(f"{path.name}_until_{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}"))


def _newest_unfinished(experiment_folder: Path) -> Path | None:
    runs = [
        path
        for path in experiment_folder.glob("*")
        if path.is_dir() and not RunFolder(path).checkpoints().is_finished()
    ]
    return max(runs, key=lambda path: path.stat().st_mtime, default=None)


def _folder_of(resume: Path, run_dir: str | None) -> RunFolder:
    """The run that a checkpoint, or a run folder, belongs to."""
    if resume.is_dir():
        files = RunFolder(resume).checkpoints().files()
        if not files:
            raise ValueError(
                f"resume: expected a run folder with checkpoints, got {resume}. To start it over, say resume=auto."
            )
        resume = files[0]
    if not resume.is_file():
        raise ValueError(f"resume: expected auto, a checkpoint or a run folder, got {resume}, which does not exist.")
    if run_dir is None and resume.parent.name != "checkpoints":
        raise ValueError(
            f"resume: expected a checkpoint in a run folder, got {resume}. Say with run_dir=<folder> where to go on."
        )
    return RunFolder(Path(run_dir) if run_dir is not None else resume.parent.parent, resume=True, checkpoint=resume)
