"""Two nodes of a cluster, played by two working directories of this machine: no file of one is seen by the other."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import ROOT, TINY

STEPS = 6


def start(node: int, port: int, folder: Path, data: Path) -> subprocess.Popen:
    """The task of a node, as `srun` starts it with one task on each of two nodes."""
    slurm = {"NTASKS": 2, "NNODES": 2, "PROCID": node, "LOCALID": 0, "JOB_ID": 1, "LAUNCH_NODE_IPADDR": "127.0.0.1"}
    environment = os.environ | {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    words = [*TINY, f"data.root={data}", "run_dir=run", "resume=auto", "set_aside=false"]
    words += [f"trainer.max_steps={STEPS}", "trainer.save_every=1 steps", "trainer.eval_every=null"]
    (folder / f"node{node}").mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "train.py"), *words],
        cwd=folder / f"node{node}",
        env=environment | {"MASTER_PORT": str(port)},
        stderr=subprocess.PIPE,
        text=True,
    )


def start_both(folder: Path, data: Path) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(node, port, folder, data) for node in (0, 1)]


@pytest.mark.slow
def test_two_nodes_lose_one_and_go_on(shapes_dataset, tmp_path):
    first, second = start_both(tmp_path, shapes_dataset)
    checkpoint = tmp_path / "node0/run/checkpoints/last.pt"
    while not checkpoint.exists():
        assert first.poll() is None and second.poll() is None
        time.sleep(0.02)
    second.send_signal(signal.SIGKILL)
    _, told = first.communicate(timeout=120)
    second.communicate(timeout=120)
    assert first.returncode not in (0, None) and "Traceback" not in told
    assert not (tmp_path / "node1/run/checkpoints").exists()  # rank 0 saves for all

    nodes = start_both(tmp_path, shapes_dataset)
    outcomes = [node.communicate(timeout=300)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outcomes
    assert "Resuming after step" in (tmp_path / "node0/run/log.txt").read_text()
    assert json.loads((tmp_path / "node0/run/metrics.json").read_text())["step"] == STEPS
