from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fpn_det.inference.images import read_pixels
from fpn_det.inference.prediction import Prediction

BOXES = torch.tensor([[2.0, 3.0, 12.5, 23.0], [0.0, 0.0, 40.0, 30.0]])


def predict(**changes) -> Prediction:
    fields = {
        "boxes": BOXES,
        "scores": torch.tensor([0.9, 0.25]),
        "labels": torch.tensor([1, 0]),
        "class_names": ("cat", "dog"),
        "size": (30, 40),
        "path": Path("street.jpg"),
    }
    return Prediction(**fields | changes)


def test_repr_counts_the_classes():
    assert repr(predict()) == "Prediction(street.jpg, 40 x 30 px: 1 dog, 1 cat)"
    none = {"boxes": BOXES[:0], "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
    assert repr(predict(**none, path=None)) == "Prediction(40 x 30 px: nothing)"
    assert len(predict()) == 2 and len(predict(**none)) == 0


def test_to_coco_gives_plain_rows_with_the_ids_of_the_data_set():
    rows = predict(image_id=7, category_ids=(18, 17)).to_coco()
    assert json.loads(json.dumps(rows)) == [
        {"image_id": 7, "category_id": 17, "bbox": [2.0, 3.0, 10.5, 20.0], "score": pytest.approx(0.9)},
        {"image_id": 7, "category_id": 18, "bbox": [0.0, 0.0, 40.0, 30.0], "score": 0.25},
    ]
    assert [row["category_id"] for row in predict().to_coco()] == [2, 1]
    assert torch.equal(BOXES[0], torch.tensor([2.0, 3.0, 12.5, 23.0]))  # not changed in place


def test_to_pandas_has_a_row_for_each_detection():
    pytest.importorskip("pandas")
    table = predict().to_pandas()
    assert list(table.columns) == ["file", "class", "score", "x1", "y1", "x2", "y2"]
    assert table["class"].tolist() == ["dog", "cat"] and table["x2"].tolist() == [12.5, 40.0]
    assert table["file"].tolist() == ["street.jpg"] * 2
    table = predict(frame=7).to_pandas()
    assert list(table.columns[:3]) == ["file", "frame", "class"] and table["frame"].tolist() == [7, 7]


def test_to_supervision_keeps_boxes_scores_and_names():
    pytest.importorskip("supervision")
    found = predict().to_supervision()
    assert np.array_equal(found.xyxy, BOXES.numpy()) and found.class_id.tolist() == [1, 0]
    assert found.data["class_name"].tolist() == ["dog", "cat"]


@pytest.mark.parametrize("library", ["pandas", "supervision"])
def test_a_missing_library_is_named(library, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(ImportError, match=f"to_{library}: expected {library}, .* pip install {library}"):
        getattr(predict(), f"to_{library}")()


def test_draw_keeps_the_size_and_marks_the_boxes():
    pixels = np.zeros((300, 400, 3), np.uint8)
    drawn = predict(size=(300, 400)).draw(pixels)
    assert drawn.size == (400, 300) and np.asarray(drawn)[3:23, 2:4].max() > 100
    with pytest.raises(
        ValueError, match="expected the image that was predicted, of 40 x 30 px, got one of 400 x 300 px"
    ):
        predict().draw(pixels)


def test_a_notebook_shows_the_picture(tmp_path):
    file = tmp_path / "picture.png"
    Image.new("RGB", (4000, 3000)).save(file)
    found = predict(size=(3000, 4000), path=file, _read=partial(read_pixels, file))
    assert found.plot().size == (4000, 3000)
    assert found.plot(side=400).size == (400, 300)
    assert max(Image.open(io.BytesIO(found._repr_png_())).size) == 960
    file.unlink()
    assert found._repr_png_() is None and predict()._repr_png_() is None
    with pytest.raises(ValueError, match="plot: expected a prediction that knows its image, got one without"):
        predict().plot()
