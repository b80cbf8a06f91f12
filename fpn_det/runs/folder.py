"""Choose, create and lock the folder of a run, and write its settings."""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import os
import platform
import shlex
import shutil
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
from fpn_det.runs.settings_diff import setting_of
from fpn_det.runtime import current_ranks, run_on_main
from fpn_det.terminal import shown_path

LOCK = ".lock"
NAN_DUMP = "nan_dump"  # inputs of a step with non-finite losses, see `training.nonfinite`
PACKAGES = ("torch", "torchvision", "numpy", "pycocotools", "hotcoco", "hydra-core", "tensorboard", "albumentations")


@dataclass(frozen=True)
class RunFolder:
    """Folder of a run.

    Attributes:
        resume: continue the run of this folder.
        checkpoint: file to resume from; None is the newest of the folder.
        is_new: the folder was made for this start.
        earlier: new name of the folder that had this one's name; None if there was none.
    """

    path: Path
    resume: bool = False
    checkpoint: Path | None = None
    is_new: bool = False
    earlier: Path | None = None

    @contextmanager
    def discarded_on_failure(self, has_started: Callable[[], bool]) -> Iterator[None]:
        """Remove a new folder if the start of its run fails within this context, and give an earlier one its name back.

        Args:
            has_started: True once the folder may hold something of value; it is kept then.
        """
        try:
            yield
        except BaseException:
            if self.is_new and current_ranks().is_main and not (has_started() or self.checkpoints().files()):
                shutil.rmtree(self.path, ignore_errors=True)
                if self.earlier is not None:
                    self.earlier.rename(self.path)
            raise

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder within this context, so that no other process writes to it. All ranks must enter.

        The lock is a POSIX lock: it ends with the process and is not inherited by workers. On a file system without locks
        nothing is locked.

        Raises:
            ValueError: another process holds the lock.
        """
        with (self.path / LOCK).open("a+") if current_ranks().is_main else nullcontext() as file:

            def lock() -> None:
                assert file is not None, "only rank 0 locks"
                _lock(file, self.path)

            run_on_main(lock)
            yield

    def resume_advice(self) -> str:
        """Name the newest checkpoint and the command that resumes from it."""
        files = self.checkpoints().files()
        if not files:
            return "There is no checkpoint yet."
        return f"Last good checkpoint: {shown_path(files[0])}. To continue: {self.resume_command()}"

    def resume_command(self) -> str:
        """The command that continues the run, to be pasted into a shell."""
        return f"fpn-det train {shlex.quote(f'resume={shown_path(self.path)}')}"

    def checkpoints(self, keep_last: int = 0) -> CheckpointFolder:
        """Return the checkpoints of the run; `keep_last` applies when one is saved."""
        return CheckpointFolder(self.path / "checkpoints", keep_last)

    def load(self, warn: Callable[[str], None]) -> dict[str, Any] | None:
        """Load the checkpoint to resume from; None for a new run.

        Args:
            warn: called with a message for each damaged checkpoint that is skipped.

        Raises:
            ValueError: no checkpoint can be read, or it contains weights only.
        """
        if not self.resume:
            return None
        if self.checkpoint is None:
            state = self.checkpoints().load(warn)
        else:
            state = CheckpointFolder(self.checkpoint.parent, keep_last=0).load(warn, first=self.checkpoint)
        if state is not None and "optimizer" not in state:
            raise ValueError(
                f"resume: expected the checkpoint of a run, got weights only in {self.checkpoint}. Set init_from instead of resume."
            )
        return state


def choose_folder(
    experiment: str | None,
    run_dir: str | None,
    resume: str | None,
    set_aside: bool = False,
    root: Path = Path("runs"),
) -> RunFolder:
    """Find or create the folder of a run. Rank 0 chooses; all ranks must call.

    Args:
        experiment: name; new runs are created as `<root>/<experiment>/<date>_<time>`.
        run_dir: run folder, instead of a new one.
        resume: None starts a new run. `auto` continues `run_dir`, or without it the newest incomplete run of the experiment, and
            starts a new run if there is none. A checkpoint or a run folder resumes from it.
        set_aside: rename an existing `run_dir` (the date is appended) instead of refusing it.
        root: folder of all experiments.

    Raises:
        ValueError: the folder is in use or cannot be written, or there is nothing to resume.
    """

    def choose() -> RunFolder:
        try:
            return find()
        except OSError as error:
            raise ValueError(
                f"run_dir: expected a writable folder, got: {error}. Choose another one with run_dir=<folder>."
            ) from None

    def find() -> RunFolder:
        experiment_folder = root / (experiment or "default")
        if resume is None:
            path = _new_folder(experiment_folder) if run_dir is None else Path(run_dir)
            folder = RunFolder(path, is_new=True, earlier=_make_room(path, set_aside))
        elif resume == "auto":
            unfinished = None if run_dir is not None else _newest_unfinished(experiment_folder)
            path = Path(run_dir) if run_dir is not None else unfinished or _new_folder(experiment_folder)
            is_new = (run_dir is None and unfinished is None) or not path.exists()
            folder = RunFolder(path, resume=bool(RunFolder(path).checkpoints().files()), is_new=is_new)
        else:
            folder = _folder_of(Path(resume), run_dir)
        folder.path.mkdir(parents=True, exist_ok=True)
        (folder.path / ".writable").touch()
        (folder.path / ".writable").unlink()
        return folder

    return run_on_main(choose)


def write_settings(folder: Path, config: str, overrides: Sequence[str]) -> list[str]:
    """Write `config.yaml` (all settings), `overrides.txt` (of the command line) and `versions.json`. Rank 0 only.

    Returns:
        The words in `overrides.txt`: of a resumed run those that it was started with too, unless they were typed anew.
    """
    file = folder / "overrides.txt"
    earlier = file.read_text().splitlines() if file.is_file() else []
    named = {setting_of(word) for word in overrides}
    words = [*(word for word in earlier if setting_of(word) not in named), *overrides]
    (folder / "config.yaml").write_text(config)
    file.write_text("".join(f"{word}\n" for word in words))
    (folder / "versions.json").write_text(json.dumps({**versions(), "command": " ".join(sys.argv)}, indent=2) + "\n")
    return words


def versions() -> dict[str, str | None]:
    """Return the versions of Python and packages, the device, and the git revision (None outside of a git checkout)."""
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
    """Create a folder with a new name, also if several runs start in the same second."""
    name = f"{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}"
    for suffix in ("", *(f"_{number}" for number in range(2, 1000))):
        try:
            (experiment_folder / (name + suffix)).mkdir(parents=True)
            return experiment_folder / (name + suffix)
        except FileExistsError:
            continue
    raise ValueError(
        f"run_dir: expected an unused name in {experiment_folder}, got a thousand runs in one second. Repeat the command."
    )


def _lock(lock: IO[str], path: Path) -> None:
    """Lock the folder `path` by its open lock file, until the file is closed."""
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return  # the file system has no locks
        lock.seek(0)
        raise ValueError(
            f"run_dir: expected a folder that no other run uses, got {path}, in use by {lock.read()}. "
            "Wait until that run ends, or choose another folder with run_dir=<folder>."
        ) from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.datetime.now():%Y-%m-%d %H:%M:%S}")
    lock.flush()


def _make_room(path: Path, set_aside: bool) -> Path | None:
    """Rename what is at `path`. Returns its new name; None if nothing was there."""
    if not path.exists() or all(item.name == LOCK for item in path.iterdir()):
        return None
    if not set_aside:
        raise ValueError(
            f"run_dir: expected a new or empty folder, got {path}, which holds {', '.join(sorted(item.name for item in path.iterdir())[:5])}. "
            "To continue that run, set resume=auto; to start a new one, choose another folder."
        )
    with (path / LOCK).open("a+") as lock:
        _lock(lock, path)
    return path.rename(path.with_name(f"{path.name}_until_{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}"))


def newest_to_resume(root: Path) -> Path | None:
    """The run below `root`, of any experiment, that was written to last, among those with checkpoints that are not finished."""
    runs = [RunFolder(file.parent) for file in root.rglob("config.yaml")]
    paths = [run.path for run in runs if run.checkpoints().files() and not run.checkpoints().is_finished()]
    return max(paths, key=lambda path: path.stat().st_mtime, default=None)


def _newest_unfinished(experiment_folder: Path) -> Path | None:
    runs = [
        path
        for path in experiment_folder.glob("*")
        if path.is_dir() and not RunFolder(path).checkpoints().is_finished()
    ]
    return max(runs, key=lambda path: path.stat().st_mtime, default=None)


def _folder_of(resume: Path, run_dir: str | None) -> RunFolder:
    """Return the run of a checkpoint or run folder that is resumed."""
    if resume.is_dir():
        files = RunFolder(resume).checkpoints().files()
        if not files:
            raise ValueError(
                f"resume: expected a run folder with checkpoints, got {resume}. To start it again, set resume=auto."
            )
        resume = files[0]
    if not resume.is_file():
        raise ValueError(f"resume: expected auto, a checkpoint or a run folder, got {resume}, which does not exist.")
    if run_dir is None and resume.parent.name != "checkpoints":
        raise ValueError(
            f"resume: expected a checkpoint in a run folder, got {resume}. Set run_dir=<folder> to the folder of the resumed run."
        )
    return RunFolder(Path(run_dir) if run_dir is not None else resume.parent.parent, resume=True, checkpoint=resume)
