"""Settings that older versions saved are read by this one: `old_runs/<version>.yaml` is the config.yaml of a run of that version."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from fpn_det.composition import compose, compose_as, from_saved, read_saved
from fpn_det.config import EvalConfig
from fpn_det.runtime import Ranks
from fpn_det.training.config import TrainConfig
from fpn_det.training.trainer import Trainer

CPU = torch.device("cpu")
OLD = Path(__file__).parent / "old_runs"


@pytest.mark.parametrize("file", sorted(OLD.iterdir()), ids=lambda file: file.stem)
def test_settings_of_an_old_run_load_and_build(file):
    config = from_saved(file.read_text())
    Trainer(config, Ranks(), CPU)
    assert config.experiment == "demo" and config.trainer.ema == 0.9
    assert "trainer.probe" in read_saved(file.read_text()).added
    assert config.trainer.probe is compose().trainer.probe
    assert config.model["neck"]["extra_levels"] == 1 and "extra_level" not in config.model["neck"]


def test_intervals_of_older_versions_were_in_steps():
    trainer = from_saved((OLD / "0.1.0.yaml").read_text()).trainer
    assert (trainer.eval_every, trainer.save_every, trainer.log_every) == (None, "500 steps", "20 steps")


def test_settings_of_now_lack_nothing():
    assert read_saved(compose(["experiment=demo", "~data.train_transforms.flip"]).to_yaml()).added == []


def test_saved_settings_compose_to_themselves():
    config = compose(["experiment=demo", "trainer.max_steps=7"])
    assert from_saved(config.to_yaml()) == config
    place = dataclasses.replace(config, run_dir=None, set_aside=False)  # a new run has a folder of its own
    assert compose_as(TrainConfig, "train_from_run", saved=read_saved(config.to_yaml())) == place


def test_saved_settings_change_with_the_command_line():
    saved = read_saved(compose(["experiment=demo", "data.root=old"]).to_yaml())
    config = compose_as(TrainConfig, "train_from_run", ["data.root=new", "trainer.max_steps=7"], saved)
    assert config.data.train.images == "new/train2017" and config.trainer.max_steps == 7
    evaluated = compose_as(EvalConfig, "eval", ["checkpoint=x.pt", "data.eval_batch_size=3"], saved)
    assert evaluated.data.eval_batch_size == 3 and evaluated.data.root == "old"


def test_a_saved_setting_that_is_unknown_is_refused():
    text = compose(["experiment=demo"]).to_yaml().replace("ema: 0.98", "ema: 0.98\n  emma: 1")
    with pytest.raises(
        ValueError, match=r"trainer\.emma: there is no setting of that name. Did you mean trainer\.ema\?"
    ):
        from_saved(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- 1\n", "expected settings by name, got list"),
        ("a: [", "expected plain YAML"),
        ("hydra: {run: {dir: x}}\n", "expected settings only, got 'hydra'"),
        ("defaults: [x]\n", "expected settings only, got 'defaults'"),
        ("a: &a [x]\nb: *a\n", "aliases are not allowed"),
        ("!!python/object/apply:os.system ['true']\n", "expected plain YAML"),
        ("[" * 100 + "]" * 100, "levels of nesting"),
    ],
)
def test_saved_text_holds_settings_only(text, words):
    with pytest.raises(ValueError) as refusal:
        read_saved(text, "config.yaml")
    assert words in str(refusal.value) and str(refusal.value).startswith("config.yaml: ")


@pytest.mark.parametrize("backslashes", range(4))
def test_nothing_in_a_saved_string_is_interpolated(backslashes):
    text = "\\" * backslashes + "${oc.env:HOME}/${data.root}"
    saved = compose(["experiment=demo"]).to_yaml().replace("init_from: null", f"init_from: '{text}'")
    assert from_saved(saved).init_from == text
    assert compose_as(TrainConfig, "train_from_run", saved=read_saved(saved)).init_from == text
