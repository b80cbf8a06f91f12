"""Fixtures: a folder of small pictures with COCO annotations, and the document to break on purpose."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

Document = dict[str, Any]
SIZES = [(48, 64), (64, 48), (40, 80), (48, 64), (60, 60), (48, 64), (64, 48), (48, 64)]  # (h, w)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Eight pictures of noise, `0.png` to `7.png`, of SIZES."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for number, (height, width) in enumerate(SIZES):
        cv2.imwrite(str(folder / f"{number}.png"), random.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return folder


@pytest.fixture
def document() -> Document:
    """Sound annotations of `pictures`: sparse ids, two boxes per image, a crowd on image 1, nothing on image 2."""
    images = [{"id": 10 * n + 7, "file_name": f"{n}.png", "width": w, "height": h} for n, (h, w) in enumerate(SIZES)]
    annotations = []
    for number in (0, 1, 3, 4, 5, 6, 7):
        for kind in (0, 1):
            box = [2 + number, 3 + 10 * kind, 20 + number, 15 + kind]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 10 * number + 7,
                    "category_id": (3, 90)[kind],
                    "bbox": box,
                    "area": box[2] * box[3] * 0.5,
                    "iscrowd": int(number == 1),
                }
            )
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 90, "name": "dog"}, {"id": 3, "name": "cat"}],
    }


@pytest.fixture
def write(tmp_path) -> Callable[[Document], Path]:
    """Write a document as JSON and give its path."""

    def write(document: Document) -> Path:
        path = tmp_path / "instances.json"
        path.write_text(json.dumps(copy.deepcopy(document)))
        return path

    return write


@pytest.fixture(scope="session")
def coco128() -> Path:
    """256 real images in COCO's layout."""
    folder = Path(os.environ.get("FPN_DET_DATA", "")) / "coco128"
    if "FPN_DET_DATA" not in os.environ or not folder.exists():
        pytest.skip("set FPN_DET_DATA to a folder that holds coco128")
    return folder
