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
def inspected(monkeypatch) -> list[str]:
    """Names of the files that were opened."""
    names: list[str] = []
    inspect = image_inspection._inspect

    def record(path: str, **options) -> image_inspection.ImageInfo:
        names.append(Path(path).name)
        return inspect(path, **options)

    monkeypatch.setattr(image_inspection, "_inspect", record)
    return names


def paths_in(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.iterdir())]


def test_results_are_cached_until_a_file_changes(folder, inspected):
    first = inspect_images(paths_in(folder), folder)
    assert len(inspected) == 6 and not any(info.fault for info in first.values())
    assert inspect_images(paths_in(folder), folder) == first
    assert inspect_images(paths_in(folder)[:2], folder) == dict(list(first.items())[:2])
    assert len(inspected) == 6
    (folder / "3.png").write_bytes(b"")
    again = inspect_images(paths_in(folder), folder)
    assert inspected[6:] == ["3.png"]
    assert again[str(folder / "3.png")].fault == "expected an image, got an empty file. Copy or download it again"
    os.utime(folder / "1.png", ns=(0, 0))
    inspect_images(paths_in(folder), folder)
    assert inspected[7:] == ["1.png"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"decoders": 3}', '{"decoders": "?", "images": {}}'])
def test_a_damaged_cache_is_written_again(folder, inspected, content):
    first = inspect_images(paths_in(folder), folder)
    (cache,) = (folder.parent / "cache" / "fpn_det").iterdir()
    cache.write_text(content)
    assert inspect_images(paths_in(folder), folder) == first
    assert len(inspected) == 12
    assert inspect_images(paths_in(folder), folder) == first
    assert len(inspected) == 12


def test_images_are_inspected_without_a_cache(folder, monkeypatch, inspected):
    (folder.parent / "cache").write_text("a file where the folder should be")
    assert len(inspect_images(paths_in(folder), folder)) == 6
    gone = str(folder / "gone.png")
    assert "No such file" in inspect_images([*paths_in(folder), gone], folder)[gone].fault
    assert len(inspected) == 13  # the missing file is looked for every time


def test_copies_have_the_same_digest_and_a_wrong_suffix_is_detected(folder):
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "jpeg.png").write_bytes(as_jpeg((folder / "0.png").read_bytes()))
    infos = {Path(path).name: info for path, info in inspect_images(paths_in(folder), folder).items()}
    assert infos["copy.png"] == infos["0.png"]
    assert infos["1.png"].digest != infos["0.png"].digest != infos["jpeg.png"].digest
    assert (infos["0.png"].kind, infos["jpeg.png"].kind) == ("PNG", "JPEG")
    assert [is_mislabeled(name, infos[name]) for name in ("0.png", "jpeg.png")] == [False, True]
    assert not is_mislabeled("a.jpeg", infos["jpeg.png"]) and not is_mislabeled("no_ending", infos["0.png"])


def test_images_damaged_inside_and_too_large_ones_have_a_fault(folder):
    sound = as_jpeg((folder / "0.png").read_bytes())
    (folder / "sound.jpg").write_bytes(sound)
    middle = sound.index(b"\xff\xda") + 40
    (folder / "hole.jpg").write_bytes(sound[:middle] + sound[-2:])
    infos = {Path(path).name: info for path, info in inspect_images(paths_in(folder), folder).items()}
    assert infos["hole.jpg"].fault.startswith("the pixels are damaged (Corrupt JPEG data: ")
    assert {name for name, info in infos.items() if info.fault} == {"hole.jpg"}
    limited = inspect_images(paths_in(folder), folder, max_pixels=100)
    assert all(info.fault.startswith("expected at most 100 pixels") for info in limited.values())
