from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from fpn_det.composition import compose
from fpn_det.runtime import _adopt_slurm_variables, process_group

STEP = {"SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "1234567"}
OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    """Sets variables for a test; those that it makes are removed afterwards."""
    for name in (*OURS, "SLURM_LAUNCH_NODE_IPADDR", "SLURM_NNODES"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def set_all(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


def test_tasks_of_srun_become_ranks(environment):
    environment(**STEP, SLURM_NNODES="4", SLURM_LAUNCH_NODE_IPADDR="10.0.0.7")
    _adopt_slurm_variables()
    assert [os.environ[name] for name in OURS] == ["5", "8", "1", "10.0.0.7", str(20000 + 1234567 % 20000)]


def test_tasks_on_one_node_meet_there(environment):
    environment(**STEP, SLURM_NNODES="1")
    _adopt_slurm_variables()
    assert os.environ["MASTER_ADDR"] == "localhost"


def test_tasks_without_a_known_address_are_refused(environment):
    environment(**STEP, SLURM_NNODES="2")
    with pytest.raises(ValueError, match=r"distributed: expected the address of the first node of 8 tasks, got none"):
        _adopt_slurm_variables()


@pytest.mark.parametrize("variables", [{}, {**STEP, "SLURM_NTASKS": "1"}, {**STEP, "RANK": "0"}])
def test_other_launchers_keep_their_variables(environment, variables):
    environment(**variables)
    before = {name: os.environ.get(name) for name in OURS}
    _adopt_slurm_variables()
    assert {name: os.environ.get(name) for name in OURS} == before


FREES = """
import resource, torch
from fpn_det.runtime import keep_freed_memory

keep_freed_memory(torch.device("cpu"))
faults = []
for _ in range(12):
    for size in (40, 90, 60):
        torch.zeros(size << 18)  # MiB of float32
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[3])  # after the heap has grown
"""


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc only")
def test_freed_memory_is_used_again_without_being_mapped_anew():
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", FREES], capture_output=True, text=True, env=environment, check=True)
    mapped_anew = 8 * 190 * (1 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert int(done.stdout) < 0.05 * mapped_anew


def test_a_gpu_chosen_by_number_is_the_current_one(environment, monkeypatch: pytest.MonkeyPatch):
    """Libraries allocate on the current device, which is the first GPU unless it is set."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    with process_group("cuda:1", 1.0) as (ranks, device):
        assert ranks.world_size == 1 and device == torch.device("cuda:1")
        assert current == [device]


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", False), ("tf32", True), ("bf16", True)])
def test_precision_decides_about_tf32(precision: str, allowed: bool):
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = not allowed
        compose([f"precision={precision}"]).set_precision()
        assert [backend.allow_tf32 for backend in backends] == [allowed, allowed]
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value
