from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from fpn_det.runs.checkpoint import save_checkpoint
from fpn_det.runs.folder import choose_folder, versions, write_settings


def save(folder, step: int, finished: bool = False) -> None:
    folder.checkpoints(keep_last=2).save(
        {"progress": {"step": step}, "optimizer": {}}, step, is_best=False, finished=finished
    )


def test_new_run_gets_a_folder_of_its_own(tmp_path):
    folders = [choose_folder("demo", None, None, root=tmp_path) for _ in range(3)]
    assert len({folder.path for folder in folders}) == 3
    for folder in folders:
        assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(_\d+)?", folder.path.name)
        assert folder.path.parent == tmp_path / "demo" and folder.path.is_dir() and not folder.resume


def test_run_dir_must_be_empty(tmp_path):
    assert choose_folder(None, str(tmp_path / "mine"), None).path == tmp_path / "mine"
    (tmp_path / "mine" / "log.txt").touch()
    with pytest.raises(
        ValueError, match=r"run_dir: expected a new or empty folder, got .*mine, which holds log.txt\. .*resume=auto"
    ):
        choose_folder(None, str(tmp_path / "mine"), None)


def test_run_dir_is_set_aside_on_request(tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "log.txt").touch()
    assert choose_folder("demo", str(tmp_path / "demo"), None, set_aside=True).path == tmp_path / "demo"
    (aside,) = tmp_path.glob("demo_until_*")
    assert (aside / "log.txt").exists() and not any((tmp_path / "demo").iterdir())


def test_auto_takes_the_newest_unfinished_run(tmp_path):
    old, middle, new = (choose_folder("demo", None, None, root=tmp_path) for _ in range(3))
    for time, folder in enumerate((old, middle, new)):
        save(folder, 10, finished=folder is new)
        os.utime(folder.path, (time, time))
    found = choose_folder("demo", None, "auto", root=tmp_path)
    assert found.path == middle.path and found.resume
    assert found.load(print)["progress"]["step"] == 10


def test_auto_starts_a_run_where_there_is_none(tmp_path):
    found = choose_folder("demo", None, "auto", root=tmp_path)
    assert not found.resume and found.load(print) is None
    found = choose_folder("demo", str(tmp_path / "mine"), "auto", root=tmp_path)
    assert found.path == tmp_path / "mine" and not found.resume
    (found.path / "log.txt").touch()  # died before its first checkpoint
    again = choose_folder("demo", str(tmp_path / "mine"), "auto", root=tmp_path)
    assert again.path == found.path and not again.resume and not again.is_new


def test_resume_takes_a_checkpoint_or_a_run_folder(tmp_path):
    run = choose_folder("demo", None, None, root=tmp_path)
    save(run, 10)
    save(run, 20)
    found = choose_folder("demo", None, str(run.path / "checkpoints" / "step_00000010.pt"), root=tmp_path)
    assert found.path == run.path and found.load(print)["progress"]["step"] == 10
    found = choose_folder("demo", None, str(run.path), root=tmp_path)
    assert found.path == run.path and found.load(print)["progress"]["step"] == 20
    elsewhere = choose_folder("demo", str(tmp_path / "other"), str(run.path), root=tmp_path)
    assert elsewhere.path == tmp_path / "other" and elsewhere.load(print)["progress"]["step"] == 20


def test_resume_describes_missing_files(tmp_path):
    with pytest.raises(
        ValueError, match=r"resume: expected auto, a checkpoint or a run folder, got .*none.pt, which does not exist"
    ):
        choose_folder("demo", None, str(tmp_path / "none.pt"), root=tmp_path)
    with pytest.raises(ValueError, match="resume: expected a run folder with checkpoints"):
        choose_folder("demo", None, str(tmp_path), root=tmp_path)


def test_resume_refuses_weights_only(tmp_path):
    save_checkpoint(tmp_path / "converted.pt", {"model": {}})
    with pytest.raises(
        ValueError, match=r"resume: expected the checkpoint of a run, got weights only in .*converted.pt"
    ):
        choose_folder(None, str(tmp_path / "run"), str(tmp_path / "converted.pt")).load(print)


def test_folder_must_be_writable(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"run_dir: expected a writable folder, got: .*Choose another one"):
        choose_folder(None, str(tmp_path / "file" / "run"), None)


def test_settings_are_written(tmp_path):
    write_settings(tmp_path, "seed: 1\n", ["seed=1", "trainer.epochs=2"])
    assert (tmp_path / "config.yaml").read_text() == "seed: 1\n"
    assert (tmp_path / "overrides.txt").read_text().split() == ["seed=1", "trainer.epochs=2"]
    # a run that is resumed keeps the words that it was started with
    words = write_settings(tmp_path, "seed: 1\n", ["resume=auto", "trainer.epochs=3"])
    assert words == (tmp_path / "overrides.txt").read_text().split() == ["seed=1", "resume=auto", "trainer.epochs=3"]
    assert json.loads((tmp_path / "versions.json").read_text())["torch"] == versions()["torch"]


def holder_of(path) -> subprocess.Popen:
    """Start a process that holds the lock of the folder."""
    code = (
        "import sys; from pathlib import Path; from fpn_det.runs.folder import RunFolder",
        f"with RunFolder(Path({str(path)!r})).locked():",
        "    print(1, flush=True); sys.stdin.read()",
    )
    process = subprocess.Popen(
        [sys.executable, "-c", "\n".join(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "1\n"
    return process


def test_folder_is_locked_until_the_process_ends(tmp_path):
    run = choose_folder(None, str(tmp_path / "run"), None)
    other = holder_of(run.path)
    for attempt in (lambda: run.locked().__enter__(), lambda: choose_folder(None, str(run.path), None, set_aside=True)):
        (run.path / "log.txt").touch()
        with pytest.raises(ValueError, match=rf"no other run uses, got .*run, in use by process {other.pid} on "):
            attempt()
    other.kill()
    other.wait()
    with run.locked():
        pass


def test_folder_of_a_run_that_wrote_nothing_is_empty(tmp_path):
    with choose_folder(None, str(tmp_path / "run"), None).locked():
        pass
    assert choose_folder(None, str(tmp_path / "run"), None).path.is_dir()
