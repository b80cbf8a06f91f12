"""A short storm; `make storm` is the long one."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tiny import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "kills"), [(1, 4), (2, 2)])
def test_interrupted_runs_equal_the_undisturbed_one(ranks, kills):
    command = [sys.executable, str(ROOT / "tools" / "storm.py"), f"ranks=[{ranks}]", f"kills={kills}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    assert f"{ranks} rank(s): equal to the bit after {kills} kills" in ended.stdout
