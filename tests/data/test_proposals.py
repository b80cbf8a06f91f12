from __future__ import annotations

import json
from pathlib import Path

import albumentations
import numpy as np
import pytest
import torch
from compare import assert_close
from PIL import Image

from fpn_det.data.collation import Collator
from fpn_det.data.dataset import DetectionDataset
from fpn_det.data.proposals import read_proposals
from fpn_det.data.sampling import Key
from fpn_det.data.transforms import Pipeline
from fpn_det.structures import Annotations

RESULTS = [
    {"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.1},
    {"image_id": 5, "category_id": 9, "bbox": [0, 0, 8, 4], "score": 0.5},
    {"image_id": 7, "category_id": 1, "bbox": [5, 6, 7, 8], "score": 0.9},
    {"image_id": 99, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1.0},
    {"image_id": 7, "category_id": 1, "bbox": [2, 2, 6, 6], "score": 0.5},
]


@pytest.fixture
def annotations(tmp_path) -> Annotations:
    """Three images of 16 x 20 px (h x w) with the ids 5, 6 and 7; the last has one object."""
    paths = [str(tmp_path / f"{image_id}.png") for image_id in (5, 6, 7)]
    for path in paths:
        Image.fromarray(np.zeros((16, 20, 3), np.uint8)).save(path)
    return Annotations(
        image_ids=torch.tensor([5, 6, 7]),
        path_bytes=torch.frombuffer(bytearray("".join(paths).encode()), dtype=torch.uint8),
        path_offsets=torch.tensor([0, *np.cumsum([len(path) for path in paths])]),
        sizes=torch.tensor([[16, 20]] * 3),
        offsets=torch.tensor([0, 0, 0, 1]),
        boxes=torch.tensor([[1.0, 1, 5, 9]], dtype=torch.float64),
        labels=torch.tensor([1]),
        iscrowd=torch.tensor([False]),
        area=torch.tensor([32.0], dtype=torch.float64),
        annotation_ids=torch.tensor([1]),
        class_names=("cat", "dog"),
        category_ids=(1, 2),
    )


def written(path: Path, kind: str) -> Path:
    """Write the results one per line, on a single line, or indented."""
    lines = ",\n".join(json.dumps(row) for row in RESULTS)
    text = {"lines": f"[\n{lines}\n]\n", "one line": json.dumps(RESULTS), "indented": json.dumps(RESULTS, indent=1)}[
        kind
    ]
    path.write_text(text)
    return path


@pytest.mark.parametrize("kind", ["lines", "one line", "indented"])
def test_the_best_proposals_of_each_image_are_read(annotations, tmp_path, kind):
    proposals = read_proposals(written(tmp_path / "p.json", kind), annotations, limit=2)
    assert proposals.offsets.tolist() == [0, 1, 1, 3]
    assert proposals.boxes.tolist() == [[0, 0, 8, 4], [5, 6, 12, 14], [2, 2, 8, 8]]


def test_proposals_are_transformed_and_collated(annotations, tmp_path):
    proposals = read_proposals(written(tmp_path / "p.json", "lines"), annotations, limit=4)
    dataset = DetectionDataset(annotations, Pipeline([albumentations.HorizontalFlip(p=1)]), 0, proposals=proposals)
    batch = Collator(4).collate([dataset[Key(row, 0)] for row in range(3)])
    assert batch.proposals is not None
    assert batch.proposals.valid.sum(dim=1).tolist() == [1, 0, 3]
    assert batch.proposals.boxes.shape == (3, 4, 4) and (batch.proposals.boxes[~batch.proposals.valid] == 0).all()
    # x goes to 20 - x
    assert_close(batch.proposals.boxes[2, :3], torch.tensor([[8.0, 6, 15, 14], [12, 2, 18, 8], [16, 2, 19, 6]]), 1e-5)
    assert_close(batch.targets.boxes[2, 0], torch.tensor([15.0, 1, 19, 9]), 1e-5)
    assert batch.targets.valid.sum(dim=1).tolist() == [0, 0, 1] and batch.targets.labels[2, 0] == 1
    last = batch.select(slice(2, 3)).to("cpu")
    assert last.proposals is not None and torch.equal(last.proposals.boxes[0], batch.proposals.boxes[2])


def test_the_number_of_proposals_of_mixed_images_is_limited(annotations, tmp_path):
    proposals = read_proposals(written(tmp_path / "p.json", "lines"), annotations, limit=2)
    boxes, labels = np.arange(16, dtype=np.float32).reshape(4, 4), np.array([-1, 1, -1, -1])
    objects, names, kept = proposals.split(boxes, labels)
    assert objects.tolist() == [boxes[1].tolist()] and names.tolist() == [1] and kept.tolist() == boxes[[0, 2]].tolist()


def test_without_a_file_a_batch_has_no_proposals(annotations):
    dataset = DetectionDataset(annotations, Pipeline([]), 0)
    assert Collator(4).collate([dataset[Key(0, 0)]]).proposals is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[{", "expected COCO results"),
        ('{"images": []}', "expected COCO results"),
        ('[{"image_id": 5, "bbox": [1, 2, 3], "score": 1}]', "expected COCO results"),
        ("[]", "expected proposals for these 3 images, got none for any"),
        (
            '[{"image_id": 1, "bbox": [1, 2, 3, 4], "score": 1}]',
            "expected proposals for these 3 images, got none for any",
        ),
    ],
)
def test_a_file_without_proposals_is_refused(annotations, tmp_path, text, words):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_proposals(tmp_path / "p.json", annotations, 10)
