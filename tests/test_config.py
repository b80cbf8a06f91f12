from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from fpn_det.config import PACKAGES, Settings, check, compose
from fpn_det.saved import CONFIGS, read_yaml, to_yaml
from fpn_det.schema import locate

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

# Where a choice of ours is not the default of a class that serves several places.
CHOSEN = {
    "model.backbone.weights",
    "model.rpn.matcher.rescue",
    "model.roi_head.matcher.positive_iou",
    "model.roi_head.matcher.negative_iou",
    "optimizer.weight_decay",  # of AdamW
}


def nodes(tree: Any, where: str) -> list[tuple[str, dict]]:
    """All nodes of a tree with their dotted names."""
    if not isinstance(tree, dict):
        return []
    inner = [found for name, item in tree.items() for found in nodes(item, f"{where}.{name}")]
    return [(where, tree), *inner] if "_target_" in tree else inner


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes(experiment):
    settings = compose([f"experiment={experiment}", *NEEDED.get(experiment, [])])
    assert settings.experiment == experiment


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_begins_with_what_it_costs(experiment):
    lines = FILES[experiment].read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith("# ") and lines[2].startswith("# ")


NECKS = sorted(path.stem for path in (CONFIGS / "neck").glob("*.yaml"))


@pytest.mark.parametrize(
    "parts", [["optimizer=adamw", "schedule=cosine"], *([f"neck={name}"] for name in NECKS)], ids=str
)
def test_yaml_states_every_choice_and_agrees_with_the_constructors(parts):
    settings = compose(parts)
    for section in ("model", "optimizer", "schedule"):
        for where, node in nodes(getattr(settings, section), section):
            parameters = inspect.signature(locate(node["_target_"], where, PACKAGES)).parameters
            for name, parameter in parameters.items():
                if parameter.default is parameter.empty:
                    continue
                assert name in node, f"{where}.{name} is a choice that configs/ does not show"
                default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
                value = list(node[name]) if isinstance(node[name], tuple) else node[name]
                if not isinstance(value, dict) and f"{where}.{name}" not in CHOSEN:
                    assert value == default, f"{where}.{name}"


def test_saved_settings_compose_to_themselves():
    settings = compose(["experiment=demo", "trainer.max_steps=7"])
    assert check(read_yaml(to_yaml(settings)), [], Settings) == settings


def test_settings_of_earlier_versions_compose():
    tree = read_yaml(to_yaml(compose(["experiment=demo"])))
    del tree.model.neck.extra_levels, tree.evaluation.target
    tree.model.neck.extra_level = False
    settings = check(read_yaml(OmegaConf.to_yaml(tree)), [], Settings)
    assert settings.model["neck"]["extra_levels"] == 0 and "extra_level" not in settings.model["neck"]


def test_groups_change_parts_of_the_model():
    assert compose(["model.backbone.depth=18"]).model["backbone"]["depth"] == 18
    assert compose(["schedule=cosine"]).schedule["_target_"].endswith("Cosine")


def test_data_root_sets_all_paths():
    data = compose(["data.root=elsewhere"]).data
    assert data.train.images == "elsewhere/train2017"
    assert data.val.annotations == "elsewhere/annotations/instances_val2017.json"


def test_one_of_two_ways_replaces_the_other_on_the_command_line():
    trainer = compose(["trainer.max_steps=7"]).trainer
    assert (trainer.epochs, trainer.max_steps) == (None, 7)
    data = compose(["data.val_fraction=0.1"]).data
    assert (data.val_fraction, data.val.images) == (0.1, None)


def test_own_classes_are_admitted_on_the_command_line_only():
    node = "+data.train_transforms.own={_target_:json.JSONDecoder}"
    with pytest.raises(ValueError, match="allow_targets="):
        compose([node])
    compose([node, "allow_targets=[json]"])
    saved = OmegaConf.merge(read_yaml(to_yaml(compose())), {"allow_targets": ["json"]})
    with pytest.raises(ValueError, match="allow_targets: expected on the command line only"):
        check(saved, [], Settings)


def test_configs_are_where_the_package_looks_for_them():
    assert CONFIGS == Path(__file__).parent.parent / "configs"
