from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TINY

from fpn_det.composition import compose
from fpn_det.evaluation.evaluate import evaluate
from fpn_det.image_io import read_image
from fpn_det.inference.predictor import Predictor
from fpn_det.models.views import Views
from fpn_det.runtime import Ranks
from fpn_det.structures import Annotations

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def settings(shapes_dataset):
    resize = (
        "data.eval_transforms.resize={_target_:fpn_det.data.transforms.ResizeShortestSide,sides:[112],max_side:160}"
    )
    return compose(
        [
            *TINY,
            f"data.root={shapes_dataset}",
            resize,
            "data.eval_batch_size=3",
            "model.roi_head.test_filter.score_threshold=0.01",
        ]
    )


@pytest.fixture(scope="module")
def annotations(settings) -> Annotations:
    return settings.data.read_train_and_val(0).val


@pytest.fixture(scope="module")
def predictor(settings, annotations) -> Predictor:
    torch.manual_seed(0)
    model = settings.build_model(annotations.num_classes)
    torch.nn.init.normal_(model.roi_head.predictor.class_logits.weight, std=1.0)
    transform = settings.data.transforms(train=False)
    collator = settings.data.collator(model.stride)
    return Predictor(model, annotations.class_names, transform, settings.data.eval_batch_size, collator, CPU)


@pytest.mark.parametrize("tta", [None, Views((0.5, 1.0), flip=True)])
def test_predictions_equal_the_detections_of_evaluation(settings, annotations, predictor, tta, monkeypatch):
    monkeypatch.setattr(predictor, "tta", tta)
    loader = settings.eval_loader(annotations, predictor.model.stride, Ranks(), CPU)
    scored = evaluate(predictor.model, loader, annotations, settings.evaluation, tta=tta).detections
    predictions = predictor.predict([annotations.path(index) for index in range(len(annotations))])
    assert len(scored.scores) > 50
    for index, prediction in enumerate(predictions):
        rows = scored.images == index
        assert np.array_equal(scored.boxes[rows], prediction.boxes.numpy())
        assert np.array_equal(scored.scores[rows], prediction.scores.numpy())
        assert np.array_equal(scored.labels[rows], prediction.labels.numpy())
        assert prediction.names == tuple(annotations.class_names[label] for label in prediction.labels)


def test_paths_pil_images_and_arrays_give_the_same(annotations, predictor):
    path = annotations.path(0)
    for kind in (str(path), Image.open(path), read_image(path)):
        (expected,), (found,) = predictor.predict([path]), predictor.predict([kind])
        assert torch.equal(found.boxes, expected.boxes) and torch.equal(found.scores, expected.scores)


def test_predictions_keep_order_and_frame_for_any_sizes(predictor):
    random = np.random.default_rng(0)
    sizes = [(40, 90), (300, 200), (90, 40), (120, 120)]
    images = [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    for (height, width), image, together in zip(sizes, images, predictor.predict(images), strict=True):
        limit = torch.tensor([width, height, width, height])
        assert (together.boxes >= 0).all() and (together.boxes <= limit).all()
        (alone,) = predictor.predict([image])
        assert len(alone.scores) and abs(len(alone.scores) - len(together.scores)) < 100
    assert predictor.predict([]) == []


def test_predict_refuses_other_types(predictor, tmp_path):
    with pytest.raises(ValueError, match="expected a list of images, got a str. Put a single image in a list"):
        predictor.predict("image.jpg")
    with pytest.raises(ValueError, match=r"arrays \[h, w, 3\] RGB or \[h, w\] grey, got float64 \[4, 4, 3\]"):
        predictor.predict([np.zeros((4, 4, 3))])
    with pytest.raises(ValueError, match="got a int"):
        predictor.predict([7])
    with pytest.raises(ValueError, match=r"nothing.jpg: cannot be read"):
        predictor.predict([tmp_path / "nothing.jpg"])
