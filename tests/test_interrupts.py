"""Ctrl-C at any moment of a start ends in one line and leaves nothing half-written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import ROOT, TINY

MOMENTS = 20
# Python itself reports an interruption while it starts. A shell without job control would leave SIGINT ignored.
PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
print("up", flush=True)
from fpn_det.cli.main import main
main()
"""


def start(folder: Path, data: Path) -> subprocess.Popen:
    """Start a training in a process group of its own, as a terminal does, and wait until its first line runs."""
    words = ["train", *TINY, f"data.root={data}", "run_dir=run", "data.num_workers=2", "trainer.max_steps=99"]
    words.append("trainer.log_every=1 steps")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    return process


def interrupt(process: subprocess.Popen) -> tuple[str, str]:
    """Press Ctrl-C, and return what was printed."""
    os.killpg(process.pid, signal.SIGINT)
    return process.communicate(timeout=300)


@pytest.fixture(scope="module")
def duration(shapes_dataset, tmp_path_factory) -> float:
    """Seconds from the first line of the program to the first step."""
    process, begin = start(tmp_path_factory.mktemp("whole"), shapes_dataset), time.monotonic()
    assert process.stdout is not None
    for line in process.stdout:
        if "1/99" in line.split():
            break
    seconds = time.monotonic() - begin
    interrupt(process)
    return seconds


@pytest.mark.slow
@pytest.mark.parametrize("number", range(MOMENTS))
def test_ctrl_c_at_a_random_moment_of_a_start(number, duration, shapes_dataset, tmp_path):
    process = start(tmp_path, shapes_dataset)
    time.sleep(duration * (number + np.random.default_rng(number).random()) / MOMENTS)
    output, errors = interrupt(process)
    said = output + errors
    assert process.returncode == 128 + signal.SIGINT, said
    assert "Traceback" not in said and "Exception ignored" not in errors, said
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    if "Stopped by SIGINT and saved" in output:
        assert not errors, said
        state = torch.load(tmp_path / "run/checkpoints/last.pt", weights_only=True)
        assert state["progress"]["step"] >= 1 and not [name for name in left if ".tmp" in name], said
    else:
        assert errors == "Interrupted.\n" and not left, said
