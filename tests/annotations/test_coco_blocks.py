"""COCO JSON read in blocks by msgspec gives what Python's parser gives, wherever the blocks end."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from broken import FAULTS, clean, write_pictures

from fpn_det.annotations.formats import coco
from fpn_det.annotations.raw import FIELDS
from fpn_det.annotations.reading import check_raw


def contents(raw) -> tuple:
    objects = [[raw.objects.value(key, row) for key in FIELDS] for row in range(len(raw.objects))]
    return raw.images, objects, raw.categories, raw.is_labeled, raw.findings


def same(path: Path, monkeypatch) -> bool:
    """Compare both readers; True if the file was read in blocks."""
    expected = coco._read_any(path, path.parent)
    monkeypatch.setattr(coco, "_read_any", lambda *_: None)
    try:
        raw = coco.load(path, path.parent)
    except AttributeError:  # handed over to `_read_any`
        return False
    finally:
        monkeypatch.undo()
    assert contents(raw) == contents(expected)
    return True


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    "order", ["images annotations categories", "annotations categories images", "categories images annotations"]
)
def test_blocks_may_end_anywhere_and_tables_have_any_order(tmp_path, monkeypatch, indent, order):
    document = clean()
    for record in document["annotations"]:
        record["segmentation"] = {"counts": [{"a": [{}, {"b": 1}]}], "note": '}, {"id": 7}]'}
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"info": {}, **{table: document[table] for table in order.split()}}, indent=indent))
    expected = contents(coco._read_any(path, tmp_path))
    for size in (1, 7, 64, 1000, 1 << 22):
        monkeypatch.setattr(coco, "BLOCK_BYTES", size)
        assert contents(coco.load(path, tmp_path)) == expected, size


def test_plain_files_are_read_in_blocks(tmp_path, monkeypatch):
    for number, content in enumerate(
        (json.dumps(clean()), json.dumps(clean(), indent=2), json.dumps(clean(), separators=(",", ":")))
    ):
        path = tmp_path / f"{number}.json"
        path.write_text(content)
        assert same(path, monkeypatch)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace('"area": ', '"area": NaN, "x": ', 1),
        lambda text: text.replace('"annotations"', '"meta": {"annotations": [{"id": 1}]}, "annotations"'),
        lambda text: text.replace('"bbox"', '"box"', 1),
        lambda text: "\ufeff" + text,
    ],
    ids=["NaN", "table of the same name", "object without box", "byte order mark"],
)
def test_other_files_are_left_to_the_general_parser(tmp_path, monkeypatch, change):
    path = tmp_path / "a.json"
    path.write_text(change(json.dumps(clean())), encoding="utf-8")
    assert not same(path, monkeypatch)


@pytest.mark.parametrize("name", FAULTS)
def test_faulty_values_are_the_same_in_blocks(name, tmp_path, monkeypatch):
    write_pictures(tmp_path / "train")
    document = clean()
    FAULTS[name][0](document, tmp_path / "train")
    path = tmp_path / "train.json"
    path.write_text(json.dumps(document))
    fast = check_raw([coco.load(path, tmp_path / "train")], on_error="fix")
    slow = check_raw([coco._read_any(path, tmp_path / "train")], on_error="fix")
    assert fast.findings == slow.findings
    assert fast.annotations.digest() == slow.annotations.digest()


def test_columns_do_not_depend_on_where_parts_end(tmp_path, monkeypatch):
    """Parts of numbers, of texts and of None are one column."""
    rng = random.Random(0)
    document = clean()
    for number in range(200):
        values = {"id": rng.choice([number, str(number), None, number + 0.5]), "area": rng.choice([1, 2.5, "3", None])}
        document["annotations"].append(
            {"image_id": rng.choice([7, "7"]), "category_id": 3, "bbox": [1, 2, 3, 4.5], **values}
        )
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document))
    whole = coco.load(path, None).objects
    monkeypatch.setattr("fpn_det.annotations.raw.RECORDS_PER_PART", 3)
    monkeypatch.setattr(coco, "BLOCK_BYTES", 100)
    parts = coco.load(path, None).objects
    assert len(parts._parts) > 20
    for key in ("id", "image_id", "area", "iscrowd", "ignore"):
        assert whole.numbers(key).tobytes() == parts.numbers(key).tobytes()
        assert whole.is_text(key).tolist() == parts.is_text(key).tolist()
    assert whole.integers("id").tolist() == parts.integers("id").tolist()
    assert whole.boxes().tolist() == parts.boxes().tolist()
    assert whole.look_up("image_id", {7: 5}, -1).tolist() == parts.look_up("image_id", {7: 5}, -1).tolist()
