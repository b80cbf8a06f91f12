from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image
from tiny import TINY


@pytest.fixture
def run(run_tool, shapes_dataset, tmp_path):
    trained = run_tool("train.py", *TINY, f"data.root={shapes_dataset}", "trainer.max_steps=1", "run_dir=run")
    assert trained.returncode == 0, trained.stderr
    return tmp_path / "run"


def test_pictures_of_the_split_and_of_a_file(run, run_tool, shapes_dataset, tmp_path):
    shown = run_tool("show_pyramid.py", "run=run", "count=2")
    assert shown.returncode == 0, shown.stderr
    pictures = sorted((run / "pyramid").glob("*.png"))
    page = (run / "pyramid" / "index.html").read_text()
    assert len(pictures) == 2 and all(
        f'<a href="{picture.name}"><img src="{picture.name}"' in page for picture in pictures
    )
    assert Image.open(pictures[0]).size[0] > 6 * 240  # all levels together, and five of them

    one = run_tool(
        "show_pyramid.py", "run=run", f"image={shapes_dataset}/val2017/val2017_000003.jpg", "output=elsewhere"
    )
    assert one.returncode == 0, one.stderr
    assert [path.name for path in (tmp_path / "elsewhere").glob("*.png")] == ["val2017_000003.png"]


@pytest.mark.parametrize(
    ("word", "refusal"), [("tta.flip=true", "tta: expected"), ("tile.size=50", "tile.size: expected")]
)
def test_views_and_tiles_that_are_not_drawn_are_refused(run, run_tool, word, refusal):
    refused = run_tool("show_pyramid.py", "run=run", word)
    assert refused.returncode == 2 and refused.stderr.startswith(refusal)


def test_images_of_one_name_in_two_folders_have_pictures_of_their_own(run, run_tool, shapes_dataset, tmp_path):
    root = tmp_path / "cameras"
    shutil.copytree(shapes_dataset, root)
    file = root / "annotations" / "instances_val2017.json"
    document = json.loads(file.read_text())
    for number, image in enumerate(document["images"]):
        name = f"cam{number % 2}/{number // 2:04}.jpg"
        (root / "val2017" / name).parent.mkdir(exist_ok=True)
        (root / "val2017" / image["file_name"]).rename(root / "val2017" / name)
        image["file_name"] = name
    file.write_text(json.dumps(document))
    shown = run_tool("show_pyramid.py", "run=run", f"data.root={root}", "count=8")
    assert shown.returncode == 0, shown.stderr
    pictures = {path.relative_to(run / "pyramid").as_posix() for path in (run / "pyramid").rglob("*.png")}
    assert len(pictures) >= 4 and {"cam0/0000.png", "cam1/0000.png"} < pictures
    page = (run / "pyramid" / "index.html").read_text()
    assert all(f'<a href="{name}"><img src="{name}"' in page for name in pictures)


def test_a_mistake_ends_in_one_sentence(run_tool):
    refused = run_tool("show_pyramid.py", "checkpoint=nowhere.pt")
    assert refused.returncode == 2 and refused.stderr.strip() == "nowhere.pt: expected a checkpoint, got no such file."
