from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fpn_det.runs.checkpoint import (
    CheckpointFolder,
    assert_plain,
    load_checkpoint,
    run_folder_of,
    save_checkpoint,
)


def state(step: int) -> dict:
    return {"model": {"weight": torch.full((1000,), float(step))}, "progress": {"step": step}, "best": {"value": None}}


def step_of(checkpoint: dict) -> int:
    return checkpoint["progress"]["step"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def test_save_and_load_round_trip(tmp_path):
    save_checkpoint(tmp_path / "a.pt", state(3))
    loaded = load_checkpoint(tmp_path / "a.pt")
    assert loaded.pop("format") == "fpn_det checkpoint 1"
    assert torch.equal(loaded["model"]["weight"], state(3)["model"]["weight"])
    assert names(tmp_path) == ["a.pt"]


def test_save_refuses_types_that_would_not_load(tmp_path):
    for value in (np.float64(0.5), Path("x"), {1.5: {"a": object()}}, [np.zeros(2)]):
        with pytest.raises(AssertionError, match=r"checkpoint\.value"):
            save_checkpoint(tmp_path / "a.pt", {"value": value})
    assert_plain({"a": [1, 2.0, "x", None, True, (torch.zeros(1),)]})
    assert names(tmp_path) == []


def test_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "a.pt", state(1))

    def interrupted(value, file):
        file.write(b"half a")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "a.pt", state(2))
    assert step_of(load_checkpoint(tmp_path / "a.pt")) == 1


def test_load_describes_the_problem(tmp_path):
    with pytest.raises(ValueError, match=r"none.pt: expected a checkpoint, got no such file"):
        load_checkpoint(tmp_path / "none.pt")
    (tmp_path / "best.onnx").write_bytes(b"a graph")
    with pytest.raises(
        ValueError, match=r"best.onnx: expected a checkpoint, got an exported file. Name the checkpoint"
    ):
        load_checkpoint(tmp_path / "best.onnx")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match=r"text.pt: .* got a damaged or foreign file"):
        load_checkpoint(tmp_path / "text.pt")
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match=r"foreign.pt: expected 'fpn_det checkpoint 1', got None.*init_from"):
        load_checkpoint(tmp_path / "foreign.pt")
    save_checkpoint(tmp_path / "short.pt", state(1))
    truncate(tmp_path / "short.pt")
    with pytest.raises(ValueError, match=r"short.pt: .* got a damaged or foreign file"):
        load_checkpoint(tmp_path / "short.pt")


def test_load_notices_a_flipped_bit(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, state(7))
    (tensor,) = [item for item in zipfile.ZipFile(path).infolist() if item.file_size == 4000]
    content = bytearray(path.read_bytes())
    content[tensor.header_offset + 2000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="has a wrong checksum"):
        load_checkpoint(path)


def test_load_runs_no_code(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    torch.save({"format": "fpn_det checkpoint 1", "x": Malicious()}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="damaged or foreign file"):
        load_checkpoint(tmp_path / "bad.pt")
    assert not (tmp_path / "touched").exists()


def test_the_run_folder_of_a_checkpoint_is_found_from_everywhere(tmp_path, monkeypatch):
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    monkeypatch.chdir(checkpoints)
    assert run_folder_of(Path("best.pt")) == run_folder_of(checkpoints / "best.pt") == tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    assert run_folder_of(Path("run/checkpoints/best.pt")) == Path("run")
    assert run_folder_of(Path("model.pt")) == tmp_path


def test_folder_keeps_the_last_and_the_best(tmp_path):
    folder = CheckpointFolder(tmp_path, keep_last=2)
    for step, is_best in [(10, False), (20, True), (30, False), (40, False)]:
        folder.save(state(step), step, is_best, finished=step == 40)
    assert names(tmp_path) == ["best.pt", "index.json", "last.pt", "step_00000030.pt", "step_00000040.pt"]
    assert step_of(load_checkpoint(tmp_path / "last.pt")) == 40
    assert step_of(load_checkpoint(tmp_path / "best.pt")) == 20
    assert folder.is_finished()


def test_folder_deletes_only_listed_files(tmp_path):
    folder = CheckpointFolder(tmp_path, keep_last=1)
    save_checkpoint(tmp_path / "step_00000005.pt", state(5))
    for step in (10, 20):
        folder.save(state(step), step, is_best=False, finished=False)
    assert "step_00000005.pt" in names(tmp_path)
    assert "step_00000010.pt" not in names(tmp_path)


def test_folder_keeps_all_on_request(tmp_path):
    folder = CheckpointFolder(tmp_path, keep_last=0)
    for step in (1, 2, 3):
        folder.save(state(step), step, is_best=False, finished=False)
    assert len(names(tmp_path)) == 5  # three steps, last, index


def test_folder_falls_back_to_the_one_before(tmp_path):
    folder = CheckpointFolder(tmp_path, keep_last=2)
    warnings: list[str] = []
    assert folder.load(warnings.append) is None
    for step in (10, 20):
        folder.save(state(step), step, is_best=False, finished=False)
    assert step_of(folder.load(warnings.append)) == 20
    assert warnings == []
    truncate(tmp_path / "step_00000020.pt")  # and `last`, which is the same file
    assert step_of(folder.load(warnings.append)) == 10
    assert warnings and "damaged" in warnings[0]
    truncate(tmp_path / "step_00000010.pt")
    with pytest.raises(ValueError, match="damaged"):
        folder.load(warnings.append)


def test_folder_resumes_from_the_last_written_after_falling_back(tmp_path):
    folder = CheckpointFolder(tmp_path, keep_last=2)
    for step in (10, 20, 30):
        folder.save(state(step), step, is_best=False, finished=False)
    assert step_of(folder.load(print, first=tmp_path / "step_00000020.pt")) == 20
    folder.save(state(25), 25, is_best=False, finished=False)
    assert step_of(folder.load(print)) == 25
    assert "step_00000025.pt" in names(tmp_path)


@pytest.mark.parametrize("call", ["save", "replace", "link"])
def test_folder_survives_a_kill_anywhere(tmp_path, monkeypatch, call):
    """Kill the save of step 30 at its first, second, ... system call of each kind; the newest file must always be complete."""
    target = {"save": torch, "replace": Path, "link": os}[call]
    original = getattr(target, call)
    for deadly in range(1, 6):
        folder = CheckpointFolder(tmp_path / str(deadly), keep_last=1)
        for step in (10, 20):
            folder.save(state(step), step, is_best=True, finished=False)
        calls = 0

        def dying(*arguments, deadly=deadly):
            nonlocal calls
            calls += 1
            if calls == deadly:
                raise KeyboardInterrupt
            return original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(target, call, dying)
            try:
                folder.save(state(30), 30, is_best=True, finished=False)
            except KeyboardInterrupt:
                pass
        assert step_of(folder.load(print)) in (20, 30)
        folder.save(state(40), 40, is_best=True, finished=False)
        assert names(tmp_path / str(deadly)) == ["best.pt", "index.json", "last.pt", "step_00000040.pt"]


def test_folder_copies_where_links_do_not_exist(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    CheckpointFolder(tmp_path, keep_last=1).save(state(10), 10, is_best=True, finished=False)
    assert step_of(load_checkpoint(tmp_path / "best.pt")) == 10


def test_folder_survives_a_damaged_index(tmp_path):
    folder = CheckpointFolder(tmp_path, keep_last=1)
    folder.save(state(10), 10, is_best=False, finished=False)
    (tmp_path / "index.json").write_text('{"steps": [')
    assert step_of(folder.load(print)) == 10
    folder.save(state(20), 20, is_best=False, finished=False)
    assert "step_00000010.pt" in names(tmp_path)  # listed no more
