from __future__ import annotations

import os
from pathlib import Path

import pytest
from broken import as_jpeg, write_pictures

from fpn_det.annotations import image_inspection
from fpn_det.annotations.image_inspection import inspect_images, is_mislabeled


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_pictures(tmp_path / "set")
    return tmp_path / "set"


@pytest.fixture
def looked_at(monkeypatch) -> list[str]:
    """Names of the files that were opened."""
    names: list[str] = []
    look = image_inspection._look

    def record(path: str) -> image_inspection.ImageInfo:
        names.append(Path(path).name)
        return look(path)

    monkeypatch.setattr(image_inspection, "_look", record)
    return names


def paths_in(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.iterdir())]


def test_looks_are_remembered_until_a_file_changes(folder, looked_at):
    first = inspect_images(paths_in(folder), folder)
    assert len(looked_at) == 6 and not any(look.fault for look in first.values())
    assert inspect_images(paths_in(folder), folder) == first
    assert inspect_images(paths_in(folder)[:2], folder) == dict(list(first.items())[:2])
    assert len(looked_at) == 6
    (folder / "3.png").write_bytes(b"")
    again = inspect_images(paths_in(folder), folder)
    assert looked_at[6:] == ["3.png"]
    assert again[str(folder / "3.png")].fault == "the file is empty (0 bytes)"
    os.utime(folder / "1.png", ns=(0, 0))
    inspect_images(paths_in(folder), folder)
    assert looked_at[7:] == ["1.png"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"seen_with": 3}', '{"seen_with": "?", "looks": {}}'])
def test_a_memory_that_cannot_be_read_is_written_anew(folder, looked_at, content):
    first = inspect_images(paths_in(folder), folder)
    (memory,) = (folder.parent / "cache" / "fpn_det").iterdir()
    memory.write_text(content)
    assert inspect_images(paths_in(folder), folder) == first
    assert len(looked_at) == 12
    assert inspect_images(paths_in(folder), folder) == first
    assert len(looked_at) == 12


def test_looks_go_on_where_nothing_can_be_remembered(folder, monkeypatch, looked_at):
    (folder.parent / "cache").write_text("a file where the folder should be")
    assert len(inspect_images(paths_in(folder), folder)) == 6
    assert len(inspect_images([*paths_in(folder), str(folder / "gone.png")], folder)) == 6
    assert len(looked_at) == 12


def test_copies_have_the_same_digest_and_another_format_is_seen(folder):
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "jpeg.png").write_bytes(as_jpeg((folder / "0.png").read_bytes()))
    looks = {Path(path).name: look for path, look in inspect_images(paths_in(folder), folder).items()}
    assert looks["copy.png"] == looks["0.png"]
    assert looks["1.png"].digest != looks["0.png"].digest != looks["jpeg.png"].digest
    assert (looks["0.png"].kind, looks["jpeg.png"].kind) == ("PNG", "JPEG")
    assert [is_mislabeled(name, looks[name]) for name in ("0.png", "jpeg.png")] == [False, True]
    assert not is_mislabeled("a.jpeg", looks["jpeg.png"]) and not is_mislabeled("no_ending", looks["0.png"])
