from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from fpn_det.cli.launch import launch
from fpn_det.composition import CONFIGS, PACKAGES, compose, from_saved, parse_words, with_literal_path
from fpn_det.schema import locate
from fpn_det.training.config import TrainConfig

FILES = {
    str(path.relative_to(CONFIGS / "experiment").with_suffix("")): path
    for path in (CONFIGS / "experiment").rglob("*.yaml")
}
EXPERIMENTS = sorted(FILES)
# what an experiment leaves to the command line
NEEDED = {"bccd": ["data.root=somewhere"]} | {
    name: ["data.proposals.train=a.json", "data.proposals.val=b.json"]
    for name in EXPERIMENTS
    if re.search("fast_rcnn|table2", name)
}


def nodes(tree: Any, where: str) -> list[tuple[str, dict]]:
    """All nodes of a tree with their dotted names."""
    if not isinstance(tree, dict):
        return []
    inner = [found for name, item in tree.items() for found in nodes(item, f"{where}.{name}")]
    return [(where, tree), *inner] if "_target_" in tree else inner


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes(experiment):
    config = compose([f"experiment={experiment}", *NEEDED.get(experiment, [])])
    assert config.experiment == experiment


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_begins_with_what_it_costs(experiment):
    lines = FILES[experiment].read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith("# ") and lines[2].startswith("# ")


NECKS = sorted(path.stem for path in (CONFIGS / "neck").glob("*.yaml"))


@pytest.mark.parametrize(
    "parts", [["optimizer=adamw", "schedule=cosine"], *([f"neck={name}"] for name in NECKS)], ids=str
)
def test_complete_settings_state_every_choice(parts):
    config = compose(parts)
    for section in ("model", "optimizer", "schedule"):
        for where, node in nodes(getattr(config, section), section):
            parameters = inspect.signature(locate(node["_target_"], where, PACKAGES)).parameters
            for name, parameter in parameters.items():
                if parameter.default is not parameter.empty:
                    assert name in node, f"{where}.{name} is a choice that the complete settings do not show"


def test_groups_change_parts_of_the_model():
    assert compose(["model.backbone.depth=18"]).model["backbone"]["depth"] == 18
    assert compose(["schedule=cosine"]).schedule["_target_"].endswith("Cosine")


def test_data_root_sets_all_paths():
    data = compose(["data.root=elsewhere"]).data
    assert data.train.images == "elsewhere/train2017"
    assert data.val.annotations == "elsewhere/annotations/instances_val2017.json"


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("run_dir=rü (1)", "rü (1)"),
        ("run_dir=a,b", "a,b"),
        ("run_dir=2026", "2026"),
        ("run_dir='a=b'", "a=b"),
        ("run_dir=it's", "it's"),
        ("run_dir=null", None),
        ("data.root=dätä", "dätä"),
        ("resume=auto", "auto"),
    ],
)
def test_a_path_needs_no_quotes_on_the_command_line(word: str, value: str | None):
    (override,) = parse_words([with_literal_path(word)])
    assert override.value() == value


@pytest.mark.parametrize("word", ["seed=1,2", "data.classes=[a,b]", "precision=ä", "experiment=small,demo"])
def test_other_values_than_paths_keep_their_grammar(word: str):
    assert with_literal_path(word) == word


def test_a_sweep_over_paths_stays_one():
    for word in ("init_from=a.pt,b.pt", "init_from=choice(a.pt,b.pt)"):
        assert with_literal_path(word, is_swept=True) == word
        assert parse_words([with_literal_path(word)])[0].value() == word.partition("=")[2]


def test_commands_take_paths_without_quotes(monkeypatch: pytest.MonkeyPatch):
    found: list[TrainConfig] = []
    words = ["run_dir=rü ns (1),2", "init_from=~/a=b.pt", "data.root=dätä", "seed=3"]
    monkeypatch.setattr("sys.argv", ["fpn-det train", *words])
    launch(lambda config, words: found.append(config), TrainConfig, "train")
    (config,) = found
    assert (config.run_dir, config.init_from, config.data.root) == ("rü ns (1),2", "~/a=b.pt", "dätä")
    assert config.seed == 3 and config.data.train.images == "dätä/train2017"


def test_one_of_two_ways_replaces_the_other_on_the_command_line():
    trainer = compose(["trainer.max_steps=7"]).trainer
    assert (trainer.epochs, trainer.max_steps) == (None, 7)
    data = compose(["data.val_fraction=0.1"]).data
    assert (data.val_fraction, data.val.images) == (0.1, None)


def test_own_classes_are_admitted_on_the_command_line_only():
    node = "+data.train_transforms.own={_target_:json.JSONDecoder}"
    with pytest.raises(ValueError, match="allow_targets="):
        compose([node])
    saved = compose([node, "allow_targets=[json]"]).to_yaml()
    with pytest.raises(ValueError, match="allow_targets="):  # a file admits nothing
        from_saved(saved)
    own = from_saved(saved, allow_targets=["json"]).data.train_transforms["own"]
    assert own["_target_"] == "json.JSONDecoder"


def test_values_that_files_do_not_list_are_set_by_name():
    assert compose(["optimizer.nesterov=true"]).optimizer["nesterov"] is True
    assert compose(["trainer.clip_norm=3"]).trainer.clip_norm == 3.0
    assert compose(["schedule.gamma=0.5"]).schedule["gamma"] == 0.5


def test_a_node_of_another_class_replaces_the_arguments_of_the_first():
    config = compose(["optimizer={_target_:fpn_det.training.optimizers.AdamW,lr:1e-3}"])
    assert "momentum" not in config.optimizer and config.optimizer["weight_decay"] == 0.05


def test_arguments_within_a_new_node_are_those_of_the_default_class():
    cascade = "{_target_: fpn_det.models.cascade.CascadeROIHead, _partial_: true, box_head: {width: 512}}"
    assert compose([f"model.roi_head={cascade}"]).model["roi_head"]["box_head"] == {
        "_target_": "fpn_det.models.box_heads.TwoLayerHead",
        "_partial_": True,
        "width": 512,
    }


def test_configs_are_where_the_package_looks_for_them():
    assert CONFIGS == Path(__file__).parent.parent / "configs"
