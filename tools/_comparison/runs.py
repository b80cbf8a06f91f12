"""Train and evaluate every row with every seed, each in a process and a folder of its own.

An interrupted run continues from its last checkpoint when the command is repeated; a run with a `result.json` is done.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _comparison.rows import Row

ROOT = Path(__file__).parents[2]
SHAPES = ("--size", "128", "128")  # 3,000 images to train on, 300 to measure with


@dataclass(frozen=True)
class Job:
    """A row with a seed, and the folder where its result will be."""

    row: Row
    seed: int
    folder: Path

    @property
    def result_file(self) -> Path:
        """File that marks a finished job."""
        return self.folder / "result.json"


def jobs_of(rows: Iterable[Row], seeds: int, folder: Path) -> list[Job]:
    """All jobs: first seeds first, so that an interrupted comparison has every row. Rows that need weights of others come last."""
    rows = sorted(rows, key=lambda row: (row.weights_of is not None, row.seeds < seeds))
    return [
        Job(row, seed, folder / row.name / f"seed{seed}") for seed in range(seeds) for row in rows if seed < row.seeds
    ]


def make_data(folder: Path) -> None:
    """Draw the shapes, unless they are there."""
    _python("datasets/make_shapes.py", "--out", str(folder), *SHAPES)


def finish(
    jobs: Sequence[Job], overrides: Sequence[str], at_once: int, log: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Do what is not done yet, several jobs at once; the results of all.

    Args:
        jobs: to do; a row whose weights others need comes with them.
        overrides: settings of every run.
        at_once: number of jobs at a time.
        log: gets a line about each finished job.

    Raises:
        RuntimeError: a job failed; the others that had started were finished.
    """
    trained = [job for job in jobs if job.row.weights_of is None]
    scored = [job for job in jobs if job.row.weights_of is not None]
    for stage in (trained, scored):  # the second needs weights of the first
        open_jobs = [job for job in stage if not job.result_file.is_file()]
        with ThreadPoolExecutor(at_once) as pool:
            for job, result in zip(open_jobs, pool.map(lambda job: _do(job, overrides), open_jobs), strict=True):
                name, value = next(iter(result["metrics"].items()))
                log(f"{job.row.name}, seed {job.seed}: {name} {value:.3f}")
    return [json.loads(job.result_file.read_text()) for job in jobs]


def _do(job: Job, overrides: Sequence[str]) -> dict[str, Any]:
    if job.row.weights_of is None:
        _python(
            "tools/train.py", *job.row.settings, f"seed={job.seed}", f"run_dir={job.folder}", "resume=auto", *overrides
        )
        metrics = json.loads((job.folder / "metrics.json").read_text())
    else:
        run = job.folder.parents[1] / job.row.weights_of / job.folder.name
        checkpoint = job.folder / "weights.pt"
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.unlink(missing_ok=True)
        checkpoint.symlink_to((run / "checkpoints" / "last.pt").resolve())
        _python("tools/eval.py", f"checkpoint={checkpoint}", *job.row.settings, *overrides)
        metrics = json.loads((job.folder / "eval" / "weights" / "metrics.json").read_text())
    result = {
        "row": job.row.name,
        "seed": job.seed,
        "metrics": {name: value for name, value in metrics.items() if name.startswith(("AP", "AR"))},
        "num_images": metrics["num_images"],
        "load": os.getloadavg()[2],  # processes that wanted a core, mean of the last 15 minutes
        "cores": os.cpu_count(),
    }
    unfinished = job.result_file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(result, indent=2) + "\n")
    unfinished.replace(job.result_file)
    return result


def _python(script: str, *arguments: str) -> None:
    """Run one of our programs on one core.

    Raises:
        RuntimeError: it failed; the message is its output on stderr.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / script), *arguments]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command[1:])}: {ended.stderr.strip()}")
