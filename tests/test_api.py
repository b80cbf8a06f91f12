from __future__ import annotations

import io

import albumentations as A
import pytest
import torch
from tiny import TINY

from fpn_det import api
from fpn_det.composition import compose
from fpn_det.models.detector import Detector
from fpn_det.runs.checkpoint import fill_model
from fpn_det.runtime import Ranks
from fpn_det.schema import build
from fpn_det.terminal import SafeConsole

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def settings(shapes_dataset):
    return compose([*TINY, f"data.root={shapes_dataset}"])


def test_build_model_makes_what_the_settings_say(settings):
    model = settings.build_model(num_classes=3)
    assert isinstance(model, Detector)
    assert model.num_classes == 3
    assert model.neck.channels == 32
    assert model.backbone.norm == "batch" and model.backbone.frozen_stages == 0  # deduced: no pretrained weights


def test_build_model_reads_nothing(monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("a download"))
    model = compose().build_model(num_classes=2)
    assert model.backbone.norm == "frozen" and model.backbone.frozen_stages == 2  # deduced: pretrained weights


def test_build_says_what_a_class_refuses():
    with pytest.raises(ValueError, match=r"^model.backbone.depth: expected one of 18, 34, 50, 101, got 19"):
        compose(["model.backbone.depth=19"]).build_model(num_classes=2)
    with pytest.raises(ValueError, match=r"^here: albumentations.HorizontalFlip refuses its arguments: .*p"):
        build({"_target_": "albumentations.HorizontalFlip", "p": 7.0}, "here")
    with pytest.raises(ValueError, match=r"^here: expected a class by name \(_target_\), got none"):
        build({"p": 7.0}, "here")


def test_build_transforms_keeps_their_order_and_leaves_out_null():
    data = compose(
        ["+data.train_transforms.blur={_target_:albumentations.Blur}", "data.train_transforms.resize=null"]
    ).data
    chain = data.transforms(train=True).compose.transforms
    assert [type(item) for item in chain[:2]] == [A.HorizontalFlip, A.Blur]


def test_training_data_has_the_classes_of_the_training_set(settings):
    data = settings.data.read_train_and_val(seed=0)
    train, val = data.train, data.val
    assert train.class_names == val.class_names
    assert (train.offsets.diff() > 0).all()  # images without objects are left out
    assert len(val) == 8


def test_val_fraction_holds_out_the_same_images_in_training_and_evaluation(shapes_dataset):
    data = compose([*TINY, f"data.root={shapes_dataset}", "data.val_fraction=0.25", "data.keep_empty=true"]).data
    split = data.read_train_and_val(seed=5)
    train, val = split.train, split.val
    again = data.read_split("val", train.class_names, seed=5)
    assert (len(train), len(val)) == (6, 2)
    assert again.image_ids.tolist() == val.image_ids.tolist()


def test_missing_split_is_named(settings):
    data = compose([*TINY, "data.test={images: null, annotations: null}"]).data
    with pytest.raises(ValueError, match="data.test: expected images and annotations, got none"):
        data.read_split("test", ["disk"], seed=0)


def test_every_transform_of_the_default_recipe_is_built(settings):
    default = compose().data
    default.transforms(train=True), default.transforms(train=False)


def test_load_weights_takes_the_average_if_there_is_one(settings):
    model, other = settings.build_model(3), settings.build_model(3)
    raw, average = model.state_dict(), other.state_dict()
    state = {"model": raw, "ema": average}
    target = settings.build_model(3)
    name = "neck.output.0.weight"
    assert fill_model(target, state, "x.pt") == "ema"
    assert torch.equal(target.state_dict()[name], average[name])
    assert fill_model(target, state, "x.pt", "raw") == "raw"
    assert torch.equal(target.state_dict()[name], raw[name])


def test_load_weights_refuses_what_does_not_fit(settings):
    state = {"model": settings.build_model(3).state_dict(), "ema": None}
    with pytest.raises(ValueError, match=r"x.pt: expected a moving average of the weights, got none. Set weights=raw"):
        fill_model(settings.build_model(3), state, "x.pt", "ema")
    with pytest.raises(ValueError, match=r"x.pt: expected weights of this model, got those of another"):
        fill_model(settings.build_model(4), state, "x.pt")


def test_train_loader_divides_the_batch(shapes_dataset):
    settings = compose([*TINY, f"data.root={shapes_dataset}", "trainer.accumulate=2"])
    train = settings.data.read_train_and_val(seed=0).train
    loader = settings.train_loader(train, 32, Ranks(), CPU)
    assert [len(batch) for batch in loader.rebuild(0)] == [2, 2]


def test_dir_shows_what_people_use():
    assert dir(api) == sorted(api.__all__)
    assert {"train", "evaluate", "load", "predict"} <= set(dir(api))


def test_load_says_that_there_is_no_such_run():
    with pytest.raises(
        ValueError, match=r"^load: expected a run folder, .*, got runs/nope, which is none of them\. fpn-det"
    ):
        api.load("runs/nope")


def test_an_interrupted_run_is_loaded_and_evaluated_by_its_last_checkpoint(
    shapes_dataset, tmp_path, capsys, monkeypatch
):
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="run: expected a run with a checkpoint, got .*, which has none yet"):
        api.load(tmp_path)
    with pytest.raises(ValueError, match="run: expected the folder of a run, got .*run, which does not exist"):
        api.evaluate(run)
    api.train([*TINY, f"data.root={shapes_dataset}", f"run_dir={run}"])
    (run / "checkpoints" / "best.pt").unlink()
    predictor = api.load(run, device="cpu")
    assert "has no best.pt yet: it was not evaluated. The last checkpoint is taken" in capsys.readouterr().err
    found = predictor.predict(shapes_dataset / "val2017")
    assert len(found) == 8 and predictor.class_names == found[0].class_names
    evaluation = api.evaluate(run, "device=cpu")
    lines = capsys.readouterr().out
    assert "The last checkpoint is taken" in lines and "evaluating" not in lines and evaluation.num_images == 8
    screen = SafeConsole(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr("fpn_det.runs.log.standard_console", lambda: screen)
    assert api.evaluate(run, "device=cpu").metrics == evaluation.metrics
    assert "evaluating" in screen.file.getvalue()  # the bar
