from __future__ import annotations

import errno
import os
import resource
import signal
import threading
import time

import pytest
import torch
from test_trainer import log_of, make_run
from torch.utils.data import DataLoader

from fpn_det.errors import SystemFault, translate_system_errors
from fpn_det.runs.checkpoint import load_checkpoint
from fpn_det.runs.folder import RunFolder
from fpn_det.runs.log import RunLog
from fpn_det.runtime import Ranks


@pytest.fixture
def file_limit():
    """A way to let no file grow beyond some bytes: the kernel refuses it like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_ends_the_run_in_one_sentence_and_leaves_what_was_saved(tmp_path, file_limit):
    run = make_run(tmp_path / "run", eval_every=None)
    save = run.checkpoints.save

    def save_on_a_full_disk(state, step, *rest):
        if step == 9:
            file_limit(4000)
        return save(state, step, *rest)

    run.checkpoints.save = save_on_a_full_disk
    with pytest.raises(
        SystemFault,
        match=r"^system: expected to write .*step_00000009.pt, got: File too large. .* Last good checkpoint: .*last.pt",
    ):
        with translate_system_errors(RunFolder(tmp_path / "run").resume_advice):
            run.train()
    assert load_checkpoint(tmp_path / "run/checkpoints/last.pt")["progress"]["step"] == 6
    assert not (tmp_path / "run/checkpoints/unfinished.tmp").exists()


@pytest.mark.parametrize("write", ["info", "scalars"])
def test_full_disk_is_noticed_by_the_log(tmp_path, file_limit, write, capsys):
    size = 2000
    with (
        pytest.raises(SystemFault, match="expected to write the files of the run, got: File too large"),
        translate_system_errors(),
    ):
        with RunLog(tmp_path, Ranks()) as log:
            log.begin(make_pace())
            file_limit(size)
            for step in range(1000):
                if write == "info":
                    log.info("a line")
                else:
                    log.scalars(step, {"loss": 1.0})
    assert "Traceback" not in capsys.readouterr().err


def make_pace():
    from fpn_det.runs.meters import Pace

    return Pace(0, 1000, 4, 0)


def test_read_only_folder_is_refused(tmp_path, monkeypatch):
    refused = OSError(errno.EROFS, os.strerror(errno.EROFS), "runs/x/metrics.json")
    with (
        pytest.raises(
            SystemFault, match=r"expected to write runs/x/metrics.json, got: Read-only file system\. Choose a folder"
        ),
        translate_system_errors(),
    ):
        raise refused


def test_bugs_keep_their_trace():
    for bug in (FileNotFoundError(errno.ENOENT, "no such file"), RuntimeError("shapes differ"), OSError("no number")):
        with pytest.raises(type(bug)) as caught, translate_system_errors():
            raise bug
        assert caught.value is bug


class Sleepy(torch.utils.data.Dataset):
    def __getitem__(self, index: int) -> int:
        time.sleep(60)
        return index


def test_killed_worker_is_named():
    loader = DataLoader(Sleepy(), sampler=range(2), batch_size=None, num_workers=1)
    with pytest.raises(
        SystemFault,
        match=r"data: expected the data loader workers to keep running, got: DataLoader worker .* Killed.* lower data.num_workers",
    ):
        with translate_system_errors():
            batches = iter(loader)
            worker = batches._workers[0]
            threading.Timer(0.2, lambda: os.kill(worker.pid, signal.SIGKILL)).start()
            next(batches)


def test_log_keeps_the_trace_of_a_fault(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(SystemFault), translate_system_errors(), run.log:
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "Traceback" in log_of(run)
