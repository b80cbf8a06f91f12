"""Kill a run thirty times and compare its result with an undisturbed run: python tools/storm.py [kills=30] [ranks=[1,2]] ...

A small detector is trained twice: once undisturbed, once with interruptions by SIGKILL or SIGTERM during start, step, save or
evaluation. Weights, moving average, momentum, best evaluation and all metrics must be equal to the bit; every attempt must
resume from the newest checkpoint, and none may leave a process behind.

Attempts are forked from this process, because imports take longer than the training.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch when it is imported

import multiprocessing
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

import fpn_det.api  # noqa: F401  imported once, before the forks
from fpn_det.cli.arguments import run_command
from fpn_det.runs.checkpoint import load_checkpoint
from fpn_det.schema import Count, CountOrZero

ROOT = Path(__file__).parent.parent
MOMENTS = ("start", "step", "save", "evaluation")
EVAL_EVERY, SAVE_EVERY = 7, 3
STEPS_PER_KILL, STEPS_AFTER = 3, 10
DELAY_S = {"start": 2.0, "step": 0.3, "save": 0.2, "evaluation": 0.3}  # at most, from the moment to the kill
TIMEOUT_S = 60.0  # for all ranks of an attempt and their workers to end
POLL_S = 0.005
STEP = r"(?m)^\S+ \S+ +\d+/\d+ +(\d+)/\d+ "  # time, epoch and step of a line of log.txt
EXIT_CODES = {0, 1, 143, -signal.SIGKILL, -signal.SIGTERM}  # 1: the other rank is lost
SETTINGS = (
    "experiment=demo",
    "backbone=resnet",
    "model.backbone.depth=18",
    "model.backbone.weights=null",
    "device=cpu",
    "optimizer=sgd",
    "optimizer.lr=0.001",
    "resume=auto",
    "set_aside=false",
    "model.neck.channels=16",
    "model.roi_head.box_head.width=32",
    "data.num_workers=1",
    "trainer.batch_size=2",
    "trainer.log_every=1 step",
    "trainer.ema=0.9",
    f"trainer.eval_every={EVAL_EVERY} steps",
    f"trainer.save_every={SAVE_EVERY} steps",
)


@dataclass(frozen=True)
class Setting:
    """Options of the storm."""

    kills: CountOrZero = 30  # interruptions of a run
    ranks: tuple[Count, ...] = (1, 2)  # one storm for each number of ranks
    seed: CountOrZero = 0  # of the moments


class Attempt:
    """One attempt of a run: a process for each rank, in a process group of their own."""

    def __init__(self, words: Sequence[str], ranks: int, output: Path) -> None:
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        self.ranks = [
            multiprocessing.Process(target=_run_rank, args=(words, rank, ranks, port, output)) for rank in range(ranks)
        ]
        for process in self.ranks:
            process.start()
            os.setpgid(process.pid or 0, self.ranks[0].pid or 0)

    def is_running(self) -> bool:
        """True until a rank ends."""
        return all(process.is_alive() for process in self.ranks)

    def send(self, number: int, ranks: Sequence[BaseProcess]) -> None:
        """Send a signal to some of the ranks."""
        for process in ranks:
            if process.pid and process.is_alive():
                os.kill(process.pid, number)

    def end(self) -> list[int | None]:
        """Wait until all its processes have ended, as a launcher does; returns the exit codes, negative for signals."""
        while self.is_running():
            time.sleep(POLL_S)
        deadline = time.monotonic() + TIMEOUT_S
        if any(process.exitcode for process in self.ranks):
            self.send(signal.SIGTERM, self.ranks)
        for process in self.ranks:
            process.join(deadline - time.monotonic())
            assert process.exitcode is not None, f"a rank outlives the others by {TIMEOUT_S} s"
        while _exists(self.ranks[0].pid or 0):
            assert time.monotonic() < deadline, f"a worker outlives its run by {TIMEOUT_S} s"
            time.sleep(POLL_S)
        return [process.exitcode for process in self.ranks]


def _exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _run_rank(words: Sequence[str], rank: int, ranks: int, port: int, output: Path) -> None:
    """Run `python tools/train.py` with these words as one rank."""
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if ranks > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in names.items()}
    sys.argv = [str(ROOT / "tools" / "train.py"), *words]
    runpy.run_path(sys.argv[0], run_name="__main__")


class Observer:
    """Follows an attempt by the files of its run."""

    def __init__(self, run: Path) -> None:
        self._folder = run / "checkpoints"
        self._log = run / "log.txt"
        self._start = self._log.stat().st_size if self._log.is_file() else 0
        last = self._folder / "last.pt"
        names = [path.stem for path in self._folder.glob("step_*.pt") if path.samefile(last)]
        self.newest_checkpoint = int(names[0].removeprefix("step_")) if names else 0

    def numbers(self, pattern: str) -> list[int]:
        """Numbers that match `pattern` in the log of this attempt."""
        if not self._log.is_file():
            return []
        with self._log.open() as file:
            file.seek(self._start)
            return [int(number) for number in re.findall(pattern, file.read())]

    def is_at(self, moment: str) -> bool:
        """True while the run is at this moment."""
        if moment == "start":
            return True
        if moment == "save":
            return (self._folder / "unfinished.tmp").exists()
        steps = self.numbers(STEP)
        return bool(steps) and (moment == "step" or steps[-1] % EVAL_EVERY == 0)


def storm(folder: Path, words: Sequence[str], ranks: int, kills: int, chance: random.Random) -> str:
    """Train in `folder` undisturbed and then with interruptions, and compare. Returns a summary."""
    words = [*words, f"trainer.max_steps={kills * STEPS_PER_KILL + STEPS_AFTER}", "trainer.epochs=null"]
    start = time.monotonic()
    codes = Attempt([*words, f"run_dir={folder / 'calm'}"], ranks, folder / "calm.txt").end()
    assert not any(codes), f"the undisturbed run fails: {folder / 'calm.txt'}"
    calm_s = time.monotonic() - start

    deaths: Counter[str] = Counter()
    steps = 0
    codes = [None]
    while any(code != 0 for code in codes):
        observer = Observer(folder / "storm")
        attempt = Attempt([*words, f"run_dir={folder / 'storm'}"], ranks, folder / "storm.txt")
        if deaths.total() < kills:
            moment, number = MOMENTS[deaths.total() % len(MOMENTS)], chance.choice([signal.SIGKILL, signal.SIGTERM])
            while attempt.is_running() and not observer.is_at(moment):
                time.sleep(POLL_S)
            time.sleep(chance.uniform(0, DELAY_S[moment]))
            deaths[f"{number.name} at {moment}"] += attempt.is_running()
            attempt.send(number, chance.choice([attempt.ranks, [chance.choice(attempt.ranks)]]))
        codes = attempt.end()
        steps += len(observer.numbers(STEP))
        assert set(codes) <= EXIT_CODES, f"unexpected exit codes {codes}: {folder / 'storm.txt'}"
        resumed = observer.numbers(r"Going on after step (\d+)")
        assert resumed in ([], [observer.newest_checkpoint]), (
            f"expected to resume after step {observer.newest_checkpoint}, got {resumed}"
        )
    assert deaths.total() == kills, f"the run was over after {deaths.total()} kills"
    for name in ("last.pt", "best.pt"):
        compare(
            load_checkpoint(folder / "calm" / "checkpoints" / name),
            load_checkpoint(folder / "storm" / "checkpoints" / name),
            name,
        )
    for name in ("metrics.json", "metrics.jsonl", "predictions.json"):
        assert (folder / "calm" / name).read_bytes() == (folder / "storm" / name).read_bytes(), f"{name} differs"
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(deaths.items()))
    return (
        f"{ranks} rank(s): equal to the bit after {deaths.total()} kills ({kinds}). "
        f"{steps} steps done for {kills * STEPS_PER_KILL + STEPS_AFTER}, {time.monotonic() - start - calm_s:.0f} s instead of {calm_s:.0f}."
    )


def compare(one: Any, other: Any, where: str) -> None:
    """Assert that two checkpoints are equal to the bit, except for their settings, which contain paths."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one.keys() - {"config"}:
            compare(one[key], other[key], f"{where}: {key}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), f"{where} differs"
    else:
        assert one == other, f"{where}: {one} and {other}"


def main(setting: Setting) -> None:
    """Draw a data set, then run one storm for each number of ranks."""
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="storm_"))
    draw = [sys.executable, str(ROOT / "datasets" / "make_shapes.py"), "--out", str(folder / "data")]
    subprocess.run(
        [*draw, "--train", "16", "--val", "8", "--size", "64", "64", "--workers", "1"], check=True, capture_output=True
    )
    for ranks in setting.ranks:
        place = folder / f"{ranks}_ranks"
        place.mkdir()
        summary = storm(
            place, [*SETTINGS, f"data.root={folder / 'data'}"], ranks, setting.kills, random.Random(setting.seed)
        )
        print(summary, flush=True)
    shutil.rmtree(folder)  # kept after a failure, for inspection


if __name__ == "__main__":
    try:
        run_command(main, Setting)
    except AssertionError as error:
        print(f"storm: {error}", file=sys.stderr)
        sys.exit(1)
