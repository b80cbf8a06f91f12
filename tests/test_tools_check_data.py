"""tools/check_data.py, as a person uses it."""

from __future__ import annotations

import html
import json
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from compare import assert_close
from tiny import SCRATCH
from torchvision.ops import box_iou

from fpn_det.composition import compose
from fpn_det.data_report.anchor_coverage import measure_coverage

SETTINGS = (*SCRATCH, "model.neck.channels=32")


class Page(HTMLParser):
    """The tags and texts of a page, and the addresses that it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def shapes(shapes_dataset, tmp_path) -> Path:
    """A copy of the shapes that may be broken."""
    root = tmp_path / "shapes"
    for path in shapes_dataset.rglob("*.*"):
        target = root / path.relative_to(shapes_dataset)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return root


def break_it(root: Path) -> dict:
    """Four faults: an empty file, a box outside, a picture of the validation set among those of training, and a class in capitals."""
    path = root / "annotations" / "instances_train2017.json"
    document = json.loads(path.read_text())
    document["annotations"][-1]["bbox"][0] = -500
    _, second, third = document["images"][:3]
    (root / "train2017" / second["file_name"]).write_bytes(b"")
    (root / "train2017" / third["file_name"]).write_bytes(next((root / "val2017").iterdir()).read_bytes())
    path.write_text(json.dumps(document))
    path = root / "annotations" / "instances_val2017.json"
    text = path.read_text()
    name = document["categories"][0]["name"]
    path.write_text(text.replace(f'"{name}"', f'"{name.upper()}"'))
    return {"outside": document["annotations"][-1], "empty": second, "copy": third, "class": name}


def test_sound_data_has_a_report_and_exit_code_0(run_tool, shapes, tmp_path):
    result = run_tool("check_data.py", *SETTINGS, f"data.root={shapes}")
    assert result.returncode == 0, result.stderr
    assert "Sound." in result.stdout and "class" in result.stdout
    assert "\n  fpn-det train experiment=demo" in result.stdout and "output=" not in result.stdout
    report = json.loads((tmp_path / "data_report" / "data_report.json").read_text())
    assert report["sound"] and set(report["splits"]) == {"train", "val"}
    truth = json.loads((shapes / "annotations" / "instances_train2017.json").read_text())
    assert report["splits"]["train"]["images"] == len(truth["images"])
    assert (
        sum(report["splits"]["train"]["classes"].values())
        == report["splits"]["train"]["boxes"]
        == len(truth["annotations"])
    )
    page = Page((tmp_path / "data_report" / "data_report.html").read_text())
    assert {"svg", "table"} <= set(page.tags)
    assert all(address.startswith("data:") for address in page.addresses), "the page needs nothing but itself"
    for word in (
        "Levels of the pyramid",
        "P2",
        "Aspect ratios",
        *(category["name"] for category in truth["categories"]),
    ):
        assert word in page.text


def test_faults_are_in_the_report_with_exit_code_1_and_fix_goes_on(run_tool, shapes, tmp_path):
    faults = break_it(shapes)
    result = run_tool("check_data.py", *SETTINGS, f"data.root={shapes}", "output=report")
    assert result.returncode == 1
    assert "training would stop" in result.stdout and "Traceback" not in result.stdout + result.stderr
    (command,) = (line.strip() for line in result.stdout.splitlines() if line.strip().startswith("fpn-det"))
    words = shlex.split(command)[2:]
    assert words == [*SETTINGS, f"data.root={shapes}", "output=report", "data.on_error=fix"]
    report = json.loads((tmp_path / "report" / "data_report.json").read_text())
    found = {
        (finding["kind"], finding["image_id"], finding["annotation_id"])
        for finding in report["findings"]
        if finding["severity"] == "error"
    }
    outside = faults["outside"]
    assert ("box_outside", outside["image_id"], outside["id"]) in found
    assert ("image_unreadable", faults["empty"]["id"], None) in found
    assert ("image_copied_to_two_splits", faults["copy"]["id"], None) in found
    assert "class_spelling" in {kind for kind, _, _ in found}
    page = Page((tmp_path / "report" / "data_report.html").read_text())
    assert "img" in page.tags and faults["empty"]["file_name"] in page.text

    refused = run_tool("train.py", *SETTINGS, f"data.root={shapes}", "device=cpu", "data.num_workers=0")
    assert refused.returncode == 2 and "image_unreadable" in refused.stderr and "Traceback" not in refused.stderr
    fixed = run_tool("check_data.py", *words)
    assert fixed.returncode == 0
    after = json.loads((tmp_path / "report" / "data_report.json").read_text())
    assert 0 < after["training"]["images"] < report["splits"]["train"]["images"]  # the copy is left out
    numbers = f"{after['training']['images']} images with {after['training']['boxes']} boxes"
    assert numbers in " ".join(result.stdout.split())
    assert command in html.unescape(page.text) and numbers in page.text


def test_annotations_that_cannot_be_read_are_a_finding(run_tool, shapes, tmp_path):
    (shapes / "annotations" / "instances_val2017.json").write_text("{")
    result = run_tool("check_data.py", *SETTINGS, f"data.root={shapes}")
    assert result.returncode == 1
    report = json.loads((tmp_path / "data_report" / "data_report.json").read_text())
    (fatal,) = (finding for finding in report["findings"] if finding["severity"] == "fatal")
    assert fatal["split"] == "val" and "expected a JSON file" in fatal["message"]


def test_the_report_counts_the_training_images_that_the_seed_leaves(run_tool, shapes, tmp_path):
    path = shapes / "annotations" / "instances_train2017.json"
    document = json.loads(path.read_text())
    busy = {image["id"] for image in document["images"][:4]}  # the number that remains depends on the seed
    document["annotations"] = [one for one in document["annotations"] if one["image_id"] in busy]
    path.write_text(json.dumps(document))
    words = (*SETTINGS, f"data.root={shapes}", "data.val_fraction=0.5")
    data = compose(words).data
    counts = [len(data.read_train_and_val(seed).train) for seed in range(5)]
    seed, count = next((seed, count) for seed, count in enumerate(counts) if count != counts[0])
    assert run_tool("check_data.py", *words, f"seed={seed}").returncode == 0
    report = json.loads((tmp_path / "data_report" / "data_report.json").read_text())
    assert report["training"]["images"] == count


def test_best_anchor_of_every_object_is_that_of_all_anchors(shapes_dataset):
    resize = "{_target_: fpn_det.data.transforms.ResizeShortestSide, sides: [150], max_side: 220}"
    settings = compose([*SETTINGS, f"data.root={shapes_dataset}", f"data.eval_transforms.resize={resize}"])
    train = settings.data.check_split("train", None).annotations
    model = settings.build_model(train.num_classes)
    coverage = measure_coverage(train, model, settings.data.transforms(train=False))
    # 96 x 128 px become 150 x 200, on a canvas of 160 x 224
    expected = train.boxes * torch.tensor([200 / 128, 150 / 96, 200 / 128, 150 / 96])
    anchors = model.rpn.anchors([(-(-160 // stride), -(-224 // stride)) for stride in model.rpn.anchors.strides])
    assert_close(torch.from_numpy(coverage.boxes), expected, 1e-5)
    assert_close(torch.from_numpy(coverage.ious), box_iou(expected, anchors.double()).amax(dim=1), 1e-6)
    assert coverage.levels.tolist() == model.assigner(expected).tolist()
    assert (coverage.level_names, coverage.anchor_sizes, coverage.positive_iou) == (
        ["P2", "P3", "P4", "P5"],
        [16, 32, 64, 128, 256],
        0.7,
    )
