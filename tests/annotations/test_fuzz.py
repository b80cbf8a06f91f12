"""Fuzz test of the annotation readers: damaged files of every format are read or refused by an error of the project.

FPN_DET_FUZZ_SECONDS sets the time for each format; `make fuzz` runs for minutes and starts from another seed each time.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_formats import MAKERS, source_of

from fpn_det.annotations.conversion import ConversionConfig, convert
from fpn_det.annotations.findings import raise_for_faults
from fpn_det.annotations.image_inspection import inspect_images
from fpn_det.annotations.reading import check_raw, load_raw
from fpn_det.errors import is_user_facing

SECONDS = float(os.environ.get("FPN_DET_FUZZ_SECONDS", 0))
CASES = 100  # of each format in the test suite

# Values that have broken some reader of such files.
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 0.5, 1e30, 1e308, -1e-300, 10**30, 2**63, float("nan"), float("inf"), "", " ", "7", "1_0", "nan",
    "\u0663", "\0", "\ud800", "a" * 300, "../../x", "/etc/passwd", "C:\\x", "x/", ".", "..", "~", "*", "[", "null", "yes", "0x10",
    "2020-99-99", "\x1b[2J", "\ufeff", [], {}, [[]], [1], [1, 2, 3], [0, 0, 0, 0], [1, 2, 3, "x"], {"a": 1}, {"size": [3, 4], "counts": "x"},
]  # fmt: skip
FRAGMENTS = [
    b"", b"\0", b"\xff", b"\n", b"\r", b" ", b",", b";", b"\t", b'"', b"'", b"<", b">", b"&", b"&a;", b"<object>", b"</object>", b"[", b"]",
    b"{", b"}", b":", b"-", b"&a *a", b"!!python/object:os.system ", b"<<: ", b"#", b"%", b"\xef\xbb\xbf", b"\xff\xfe", b"nan", b"1e999",
    b"9" * 5000, b"a" * 200_000, b"[" * 5000, b"<a>" * 5000, b"<!DOCTYPE a [<!ENTITY a 'b'>]>", b'<?xml version="1.0" encoding="x"?>',
    b"../../x", b"/dev/zero", b"images/train", b"train.txt", b"\xe2\x80\xa8", b"0", b"-1", b"kpt_shape: [3, 2]\n", b"names: ", b"train: ",
]  # fmt: skip


def make_coco(root: Path) -> Path:
    """The set of `make_csv` as COCO JSON."""
    MAKERS["csv"](root)
    converted = root.parent / "converted"
    convert(ConversionConfig("csv", "coco", str(root / "train.csv"), str(converted), images=str(root), pictures="none"))
    document = json.loads((converted / "annotations/instances_train2017.json").read_text())
    for record in document["annotations"]:
        record["segmentation"] = [[1, 1, 5, 1, 5, 5]]
    (root / "train.csv").unlink()
    (root / "train.json").write_text(json.dumps(document))
    return root


def mutate_value(node: Any, rng: random.Random) -> None:
    """Replace, remove or add one value somewhere in a JSON document."""
    for _ in range(rng.randrange(1, 5)):
        children = list(node.values()) if isinstance(node, dict) else node
        inner = [child for child in children if isinstance(child, dict | list) and child]
        if not inner:
            break
        node = rng.choice(inner)
    if not node:
        return
    key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
    if rng.random() < 0.2:
        del node[key]
    elif rng.random() < 0.2 and isinstance(node, list):
        node.append(copy.deepcopy(node[key]))
    else:
        node[key] = copy.deepcopy(rng.choice(VALUES))


def load_document(path: Path) -> Any:
    """The JSON document of a file; None if it is damaged already."""
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict | list) and document else None


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Cut, repeat, flip or insert bytes."""
    for _ in range(rng.choice((1, 1, 2, 5))):
        start, stop = sorted(rng.randrange(len(content) + 1) for _ in range(2))
        stop = min(stop, start + rng.choice((1, 4, 20, 1000)))
        kind = rng.randrange(5)
        if kind == 0:
            content = content[:start] + content[stop:]
        elif kind == 1:
            content = content[:start]
        elif kind == 2:
            content = content[:stop] + content[start:]
        elif kind == 3:
            content = content[:start] + rng.choice(FRAGMENTS) + content[stop:]
        else:
            content = content[:start] + bytes([rng.randrange(256)]) + content[start + 1 :]
    return content


def mutate_tree(root: Path, rng: random.Random) -> None:
    """Damage one file of a data set, or its name or kind."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    annotations = [path for path in files if path.suffix != ".png"]
    if not annotations:
        return
    path = rng.choice(annotations if rng.random() < 0.85 else files)
    kind = rng.random()
    document = load_document(path) if path.suffix == ".json" and kind < 0.6 else None
    if document is not None:
        for _ in range(rng.choice((1, 1, 2, 6))):
            mutate_value(document, rng)
        path.write_text(json.dumps(document))
    elif kind < 0.85:
        path.write_bytes(mutate_bytes(path.read_bytes(), rng))
    elif kind < 0.88:
        path.rename(path.with_name(rng.choice(["x y.txt", "A.PNG", ".hidden", "a.b.c", "x" * 200])))
    elif kind < 0.91:
        path.unlink()
        path.mkdir()
    elif kind < 0.94 and hasattr(os, "mkfifo"):
        path.unlink()
        os.mkfifo(path)
    elif kind < 0.97:
        path.unlink()
        path.symlink_to(rng.choice([path, root, "/dev/zero", root / "missing"]))
    else:
        copy = path.with_suffix(rng.choice([".txt", ".xml", ".png", ".jpg", ".yaml", ""]))
        copy.write_bytes(path.read_bytes())


def read_as_training_does(kind: str, root: Path, rng: random.Random) -> None:
    source = root / "train.json" if kind == "coco" else source_of(kind, root)
    on_error = rng.choice(("fail", "fix", "skip"))
    checked = check_raw(
        load_raw(source, None, rng.choice((None, kind)), rng.choice(("train", "train", "val"))),  # type: ignore[arg-type]
        rng.choice((None, ["ant", "bee"], ["bee", "cat"])),
        rng.random() < 0.3,
        on_error,  # type: ignore[arg-type]
        rng.choice((None, inspect_images)),
    )
    raise_for_faults(checked.findings, str(source), on_error)  # type: ignore[arg-type]
    annotations = checked.annotations
    assert len(checked.digests) == len(annotations)
    assert [annotations.path(row) for row in range(len(annotations))]
    limits = annotations.sizes[annotations.image_of_boxes].flip(1).repeat(1, 2)
    assert ((annotations.boxes >= 0) & (annotations.boxes <= limits)).all()
    assert (annotations.boxes[:, 2:] > annotations.boxes[:, :2]).all()
    assert ((annotations.labels >= 0) & (annotations.labels < annotations.num_classes)).all()


@pytest.mark.parametrize("kind", ["coco", *MAKERS])
def test_damaged_files_are_read_or_refused_by_an_error_of_the_project(tmp_path, kind):
    maker: Callable[[Path], Path] = make_coco if kind == "coco" else MAKERS[kind]
    maker(tmp_path / "clean")
    first = int(time.time()) if SECONDS else 0
    end = time.monotonic() + SECONDS
    seed = first
    while time.monotonic() < end if SECONDS else seed < first + CASES:
        rng = random.Random(f"{kind} {seed}")
        root = tmp_path / "set"
        shutil.copytree(tmp_path / "clean", root)
        for _ in range(rng.choice((1, 1, 1, 3))):
            mutate_tree(root, rng)
        try:
            read_as_training_does(kind, root, rng)
        except Exception as error:
            lines = "".join(traceback.format_exception(error))
            assert isinstance(error, ValueError) and is_user_facing(error), f"{kind} {seed}: {lines}"
        shutil.rmtree(root)
        seed += 1
