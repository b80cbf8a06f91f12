"""Write and read checkpoints: files of plain types and tensors that load with `weights_only=True`.

A folder of checkpoints is consistent after a kill at any moment: a file gets its name after its content is on the disk,
`last.pt` and `best.pt` are hard links to the file of a step, and only files listed in `index.json` are deleted.

Content of a checkpoint:

    format, versions                                    file format, and versions of the libraries that wrote it
    model, ema, optimizer, schedule, scaler             tensors by name; `ema` is None without a moving average, `scaler` without fp16
    progress, best                                      number of completed steps; state of `BestMetric`
    rng                                                 the seed, from which and the step all random draws follow
    class_names, category_ids, preprocessing, config    metadata of the weights; config is YAML text
    data_digests                                        `Annotations.digest()` by split
    score_thresholds                                    `ScoreThresholds` of the last evaluation as a dict; None without one
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Literal

import torch
from torch import Tensor, nn

from fpn_det.config import is_exported
from fpn_det.runtime import broadcast_object, current_ranks, host_all_reduce_min, run_on_main
from fpn_det.weight_files import SAFETENSORS, check_archive, read_safetensors, safetensors_bytes

State = dict[str, Any]
FORMAT = "fpn_det checkpoint 1"
DESCRIPTION = ("class_names", "category_ids", "score_thresholds", "preprocessing", "config", "versions", "progress")
PLAIN = (str, int, float, bool, type(None))


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically: after a kill or on a full disk the previous file is intact.

    Raises:
        OSError: the file cannot be written.
    """
    state = {"format": FORMAT, **state}
    assert_plain(state)
    with _published(path) as file:
        try:
            torch.save(state, file)
        except (
            RuntimeError
        ) as error:  # torch raises its own error while it closes the file, in the context of the OSError
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def save_weights(path: Path, state: dict[str, Any]) -> None:
    """Write the weights of a checkpoint alone, with what describes them, as safetensors. It evaluates and predicts.

    Args:
        path: ends in .safetensors.
        state: content of a checkpoint; of its weights, the moving average if there is one.

    Raises:
        OSError: the file cannot be written.
    """
    description = {name: state[name] for name in DESCRIPTION if state.get(name) is not None}
    with _published(path) as file:
        file.write(safetensors_bytes(state["ema"] or state["model"], description))


def find_checkpoint(run: str | None, file: str | None) -> tuple[Path, dict[str, Any]]:
    """Find and load a checkpoint file, or that of a run folder, see `checkpoint_of`. Returns its path and content.

    Raises:
        ValueError: neither or both are given, or the file cannot be read.
    """
    if (run is None) == (file is None):
        raise ValueError("checkpoint: expected either run=<folder> or checkpoint=<file>.")
    if file and Path(file).is_dir():
        raise ValueError(f"checkpoint: expected a file, got the folder {file}. Set run=<folder> for the best of a run.")
    path = Path(file) if file else checkpoint_of(Path(run or ""))
    stat = path.stat() if path.is_file() else None
    return path, _load_once(path, stat and (stat.st_mtime_ns, stat.st_ino))


@lru_cache(maxsize=1)
def _load_once(path: Path, version: tuple[int, int] | None) -> dict[str, Any]:
    """Load and check a checkpoint; a command asks twice, for the settings and for the weights."""
    state = load_checkpoint(path)
    check_fields(path, state)
    return state


def checkpoint_of(run: Path) -> Path:
    """Return the best checkpoint of a run folder; of a run that was interrupted before its first evaluation, the last one.

    Raises:
        ValueError: there is no such folder, or no checkpoint in it yet.
    """
    if run.is_file():
        raise ValueError(f"run: expected the folder of a run, got the file {run}. Set checkpoint=<file> instead.")
    if not run.is_dir():
        raise ValueError(
            f"run: expected the folder of a run, got {run}, which does not exist. fpn-det runs lists all runs."
        )
    for name in ("best.pt", "last.pt"):
        if (run / "checkpoints" / name).is_file():
            return run / "checkpoints" / name
    raise ValueError(f"run: expected a run with a checkpoint, got {run}, which has none yet.")


def remark_on(checkpoint: Path) -> str:
    """Say that a run has no best checkpoint, if the last one was taken in its place; otherwise return an empty string."""
    if checkpoint.name != "last.pt" or (checkpoint.parent / "best.pt").exists():
        return ""
    return f"{run_folder_of(checkpoint)} has no best.pt yet: it was not evaluated. The last checkpoint is taken."


def run_folder_of(checkpoint: Path) -> Path:
    """Return the run folder of a checkpoint; for a file outside of a run folder, its parent folder."""
    folder = checkpoint.parent if checkpoint.parent.name else Path.cwd()  # `best.pt` in its own folder
    return folder.parent if folder.name == "checkpoints" else folder


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU and verify its checksums; or a file of `save_weights`, as one without a state of training.

    Raises:
        ValueError: the file is missing, damaged, or not a checkpoint of fpn_det.
    """
    if not path.is_file():
        raise ValueError(f"{path}: expected a checkpoint, got no such file.")
    if is_exported(path):
        raise ValueError(
            f"{path}: expected a checkpoint, got an exported file. Name the checkpoint that it was made from."
        )
    try:
        if path.suffix == SAFETENSORS:
            tensors, about = read_safetensors(path)
            return {"format": FORMAT, "model": tensors, "ema": None} | about
        check_archive(path)
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # verifies checksums, which torch.load does not
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} has a wrong checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind: a damaged pickle may ask for anything
        if isinstance(error, OSError) or str(error).startswith(f"{path}: expected"):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path}: expected a checkpoint of fpn_det, got a damaged or foreign file ({reason})."
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        got = repr(state.get("format")) if isinstance(state, dict) else f"a {type(state).__name__}"
        raise ValueError(f"{path}: expected '{FORMAT}', got {got}. To start from its weights, set init_from=<file>.")
    return state


# Type of each field of a checkpoint that readers rely on.
FIELDS: dict[str, type | tuple[type, ...]] = {
    "model": dict,
    "ema": (dict, type(None)),
    "progress": dict,
    "class_names": list,
    "config": str,
}


def check_fields(path: Path, state: dict[str, Any]) -> None:
    """Refuse a checkpoint that lacks what evaluation needs, or has it in another type.

    Raises:
        ValueError: a field is missing or of another type.
    """
    for name, kind in FIELDS.items():
        if name not in state or not isinstance(state[name], kind):
            got = type(state[name]).__name__ if name in state else "none"
            raise ValueError(f"{path}: expected a checkpoint with {name}, got {got}. The file is damaged.")
    names, step = state["class_names"], state["progress"].get("step")
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: expected the names of classes in the checkpoint, got {names!r:.80}.")
    if not isinstance(step, int):
        raise ValueError(f"{path}: expected the number of steps in the checkpoint, got {step!r:.80}.")
    if not all(isinstance(value, Tensor) for part in (state["model"], state["ema"] or {}) for value in part.values()):
        raise ValueError(f"{path}: expected tensors as the weights of the checkpoint, got other values.")


def fill_model(model: nn.Module, state: dict[str, Any], where: str, weights: str = "auto") -> Literal["ema", "raw"]:
    """Load the weights of a checkpoint into a model. Returns the kind of weights that was loaded.

    Args:
        model: modified in place.
        state: content of a checkpoint.
        where: its file, for messages.
        weights: `ema` (moving average), `raw`, or `auto`: the moving average if there is one.

    Raises:
        ValueError: the checkpoint belongs to another model, or has no moving average.
    """
    average = state["ema"] if weights != "raw" else None
    if weights == "ema" and average is None:
        raise ValueError(f"{where}: expected a moving average of the weights, got none. Set weights=raw.")
    try:
        model.load_state_dict(average or state["model"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{where}: expected weights of this model, got those of another: {reason}.") from None
    return "ema" if average else "raw"


def load_on_all_ranks(load: Callable[[], State | None]) -> State | None:
    """Load a checkpoint on rank 0, and the same one on all other ranks.

    A rank that sees no file or another one, as on machines without a shared file system, gets the state from rank 0.

    Args:
        load: reads the checkpoint to resume from; returns None to start a new run.

    Raises:
        ValueError: rank 0 cannot load; on all ranks.
    """
    ranks = current_ranks()
    if ranks.world_size == 1:
        return load()
    own: list[State | None] = [None]

    def load_on_main() -> tuple[int, int] | None:
        own[0] = load()
        return _fingerprint(own[0])

    expected = run_on_main(load_on_main)
    if expected is None:
        return None
    if not ranks.is_main:
        try:
            own[0] = load()
        except ValueError:  # a damaged copy; that of rank 0 is whole
            own[0] = None
    if host_all_reduce_min(int(ranks.is_main or _fingerprint(own[0]) == expected)):
        return own[0]
    return broadcast_object(own[0])


def _fingerprint(state: State | None) -> tuple[int, int] | None:
    """The step of a checkpoint and a checksum of its weights."""
    if state is None:
        return None
    checksum = 0
    for name, tensor in state["model"].items():
        checksum = zlib.crc32(
            tensor.contiguous().view(-1).view(torch.uint8).numpy(), zlib.crc32(name.encode(), checksum)
        )
    return state["progress"]["step"], checksum


def assert_plain(value: Any, where: str = "checkpoint") -> None:
    """Assert that `value` loads with `weights_only=True`: it consists of built-in types (not their subclasses) and tensors."""
    if isinstance(value, dict):
        for key, item in value.items():
            assert type(key) in PLAIN, f"{where}: key {key!r}"
            assert_plain(item, f"{where}.{key}")
    elif type(value) in (list, tuple):
        for number, item in enumerate(value):
            assert_plain(item, f"{where}.{number}")
    else:
        assert type(value) in PLAIN or isinstance(value, Tensor), f"{where}: {type(value)}"


class CheckpointFolder:
    """Checkpoints of one run.

    Args:
        folder: created with the first checkpoint.
        keep_last: number of step files to keep; 0 keeps all.
    """

    def __init__(self, folder: Path, keep_last: int) -> None:
        if keep_last < 0:
            raise ValueError(
                f"trainer.keep_last: expected the number of checkpoints to keep (0 keeps all), got {keep_last}."
            )
        self.folder = folder
        self.keep_last = keep_last
        self._index = folder / "index.json"

    def save(self, state: dict[str, Any], step: int, is_best: bool, finished: bool) -> Path:
        """Write the file of a step, link it as `last.pt` (and `best.pt` if `is_best`), and delete the oldest step files.

        Args:
            finished: the run is complete.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step_{step:08d}.pt"
        # The index is written first: a kill in between leaves a name without a file, not a file that is never deleted.
        steps = [*(name for name in self._read_index()["steps"] if name != path.name), path.name]
        self._write_index(steps, finished=False)
        save_checkpoint(path, state)
        for name in ("last.pt", "best.pt") if is_best else ("last.pt",):
            self._link(path, self.folder / name)
        kept = steps[-self.keep_last :]
        self._write_index(kept, finished)
        for name in steps:
            if name not in kept:
                (self.folder / name).unlink(missing_ok=True)
        return path

    def save_best(self, state: dict[str, Any]) -> None:
        """Write `best.pt` only, for an evaluation at a step without a checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save_checkpoint(self.folder / "best.pt", state)

    def is_finished(self) -> bool:
        """Return whether the run is complete."""
        return self._read_index()["finished"]

    def files(self) -> list[Path]:
        """Return the files from which a run can resume, newest first."""
        names = ["last.pt", *reversed(self._read_index()["steps"]), "best.pt"]
        return [self.folder / name for name in names if (self.folder / name).is_file()]

    def load(self, warn: Callable[[str], None], first: Path | None = None) -> dict[str, Any] | None:
        """Load the newest readable checkpoint; None if the folder has no checkpoints.

        Args:
            warn: called with a message for each damaged checkpoint that is skipped.
            first: file to try first, instead of the newest.

        Raises:
            ValueError: no checkpoint can be read.
        """
        files = self.files()
        if first is not None:
            files = files[files.index(first) :] if first in files else [first]
        for number, path in enumerate(files):
            try:
                return load_checkpoint(path)
            except ValueError as refusal:
                if path == files[-1]:
                    raise
                warn(f"{refusal} Falling back to {files[number + 1].name}.")
        return None

    def _link(self, path: Path, name: Path) -> None:
        unfinished = _unfinished(self.folder)
        try:
            os.link(path, unfinished)
        except OSError:  # the file system has no hard links
            shutil.copyfile(path, unfinished)
        unfinished.replace(name)

    def _read_index(self) -> dict[str, Any]:
        try:
            return json.loads(self._index.read_text())
        except (FileNotFoundError, ValueError):  # a new run; or a damaged file: what it listed is never deleted then
            return {"steps": [], "finished": False}

    def _write_index(self, steps: list[str], finished: bool) -> None:
        with _published(self._index) as file:
            file.write(json.dumps({"steps": steps, "finished": finished}, indent=2).encode())


def _unfinished(folder: Path) -> Path:
    """Return the path of the temporary file. It is always the same, so that kills leave one such file at most."""
    path = folder / "unfinished.tmp"
    path.unlink(missing_ok=True)  # not overwritten: it may be a hard link to a checkpoint
    return path


@contextmanager
def _published(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that is renamed to `path` after its content is on the disk, and deleted on failure."""
    unfinished = _unfinished(path.parent)
    try:
        with unfinished.open("wb", buffering=0) as file:
            yield file
            os.fsync(file.fileno())
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise type(error)(error.errno, error.strerror, str(path)) from error
    unfinished.replace(path)
