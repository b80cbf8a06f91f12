"""Files of strangers run nothing: hostile settings in every place that a command reads settings from.

`canary` is a module whose import, and whose every class and function, leaves a file. None of these files may appear,
and every command ends with its result or with one sentence.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import TINY

from fpn_det import api
from fpn_det.composition import PACKAGES, compose, compose_as, from_saved, read_saved
from fpn_det.config import EvalConfig
from fpn_det.runs.checkpoint import load_checkpoint, save_checkpoint
from fpn_det.schema import locate
from fpn_det.training.config import TrainConfig

CANARY = """
from pathlib import Path
FOLDER = Path({folder!r})
(FOLDER / "imported").touch()
def call(*args, **kwargs):
    (FOLDER / "called").touch()
class Made:
    def __init__(self, *args, **kwargs):
        (FOLDER / "made").touch()
"""
Tree = dict[str, Any]
CREATE = "${oc.create:{_target_: canary.Made}}"


@pytest.fixture
def traces(tmp_path, monkeypatch) -> Callable[[], list[str]]:
    """Lists the files that code of a hostile file has left."""
    folder = tmp_path / "traces"
    folder.mkdir()
    module = tmp_path / "modules" / "canary.py"
    module.parent.mkdir()
    module.write_text(CANARY.format(folder=str(folder)))
    monkeypatch.syspath_prepend(module.parent)
    monkeypatch.setenv("TRACES", str(folder))
    return lambda: sorted(path.name for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def settings() -> Tree:
    return yaml.safe_load(compose([*TINY]).to_yaml())


def place(tree: Tree, name: str, value: Any) -> None:
    *sections, last = name.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[last] = value


# Dotted name and value that are put into sound settings. {traces} is the folder of the canary's files.
HOSTILE: dict[str, tuple[str, Any]] = {
    "target": ("model.backbone._target_", "canary.Made"),
    "target_of_the_model": ("model", {"_target_": "canary.Made"}),
    "target_of_os": ("optimizer", {"_target_": "os.makedirs", "name": "{traces}/x"}),
    "function_of_the_package": ("model", {"_target_": "fpn_det.runs.folder.write_settings"}),
    "class_that_the_package_imports": ("model", {"_target_": "fpn_det.locations.Path", "_args_": ["x"]}),
    "class_that_writes": ("model", {"_target_": "fpn_det.runs.log.RunLog", "folder": "{traces}/log", "ranks": {"_target_": "fpn_det.runtime.Ranks"}}),
    "class_of_the_command_line": ("schedule", {"_target_": "fpn_det.cli.launch.SweepResults"}),
    "module_in_a_path": ("model.backbone._target_", "fpn_det.doctor.importlib.import_module"),
    "parent_of_a_package": ("model.backbone._target_", "fpn_det..canary.Made"),
    "target_that_is_no_string": ("model.backbone._target_", ["canary.Made"]),
    "args": ("model.backbone._args_", ["canary.Made"]),
    "partial": ("model.backbone._partial_", True),
    "partial_of_a_foreign_class": ("model.backbone", {"_target_": "canary.Made", "_partial_": True}),
    "recursive": ("model.backbone._recursive_", False),
    "convert": ("model.backbone._convert_", "all"),
    "node_in_a_list": ("data.classes", [{"_target_": "canary.Made"}]),
    "node_in_a_transform": ("data.train_transforms.own", {"_target_": "canary.Made"}),
    "node_in_a_value": ("experiment", {"_target_": "canary.Made"}),
    "node_deep_in_an_argument": ("data.train_transforms.mosaic", {"_target_": "fpn_det.data.mixing.Mosaic", "size": {"_target_": "canary.Made"}}),
    "allowed_by_itself": ("allow_targets", ["canary"]),
    "callbacks": ("hydra.callbacks", {"x": {"_target_": "canary.Made"}}),
    "logging": ("hydra.job_logging", {"version": 1, "handlers": {"x": {"()": "canary.call"}}, "root": {"handlers": ["x"]}}),
    "launcher": ("hydra.launcher", {"_target_": "canary.Made"}),
    "folder_of_hydra": ("hydra.run.dir", "{traces}/x"),
    "search_path": ("hydra.searchpath", ["file://{traces}"]),
    "defaults": ("defaults", [{"override /hydra/launcher": "joblib"}]),
    "resolver": ("init_from", CREATE),
    "escaped_resolver": ("init_from", "\\" + CREATE),
    "twice_escaped_resolver": ("init_from", "\\\\\\" + CREATE),
    "resolver_as_a_node": ("model.backbone", CREATE),
    "escaped_resolver_as_a_node": ("model.backbone", "\\" + CREATE),
    "resolver_in_a_node": ("model.backbone.weights", "\\" + CREATE),
    "resolver_as_a_target": ("model.backbone._target_", "${oc.env:TRACES}"),
    "resolver_in_a_transform": (
        "data.eval_transforms.own",
        {"_target_": "fpn_det.data.transforms.ResizeShortestSide", "sides": [96], "backend": "\\" + CREATE},
    ),
    "decoding_resolver": ("init_from", "${oc.decode:'{_target_: canary.Made}'}"),
    "resolver_of_hydra": ("data.root", "${hydra:runtime.cwd}"),
    "resolver_as_a_name": ("data." + CREATE, 1),
    "unknown_section": ("plugins", {"x": {"_target_": "canary.Made"}}),
}  # fmt: skip


def hostile(settings: Tree, name: str, folder: Path) -> str:
    """Sound settings as text, with one hostile value."""
    tree = copy.deepcopy(settings)
    where, value = HOSTILE[name]
    text = yaml.safe_dump(value).replace("{traces}", str(folder / "traces"))
    place(tree, where, yaml.safe_load(text))
    return yaml.safe_dump(tree, sort_keys=False)


TEXTS = {
    "tag": "!!python/object/apply:canary.call []\n",
    "tag_in_a_value": "seed: !!python/object/apply:canary.call []\n",
    "tag_of_a_name": "seed: !!python/name:canary.call\n",
    "alias": "a: &a {x: 1}\nmodel: *a\n",
    "merge": "model: &a {x: 1}\ndata: {<<: *a}\n",
    "bomb": "\n".join(["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40))]),
    "deep": "model: " + "[" * 5000 + "]" * 5000,
    "deep_mapping": "".join(f"{' ' * depth}a:\n" for depth in range(3000)),
    "huge_number": "seed: " + "9" * 5000,
    "long": "model: " + "x" * (5 << 20),
    "list": "- seed\n",
    "string": "seed\n",
    "number": "3\n",
    "nothing": "",
    "broken": "a: [",
    "two_documents": "seed: 1\n---\nseed: 2\n",
    "key_that_is_no_string": "1: 2\n[a, b]: 3\n",
    "control_characters": "seed: \x1b[2J\n",
    "date": "data: {root: 2026-01-01}\n",
    "not_a_number": "optimizer: .nan\n",
}


def build_everything(config: TrainConfig | EvalConfig) -> None:
    config.build_model(3)
    config.data.transforms(train=True)
    config.data.transforms(train=False)
    if isinstance(config, TrainConfig):
        config.build_recipe()
        config.build_schedule()


@pytest.mark.parametrize("name", HOSTILE)
def test_saved_settings_run_nothing(name, settings, tmp_path, traces, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = hostile(settings, name, tmp_path)
    readers: list[Callable[[], TrainConfig | EvalConfig]] = [
        lambda: from_saved(text),
        lambda: compose_as(TrainConfig, "train_from_run", ["run=x"], read_saved(text)),
        lambda: compose_as(EvalConfig, "eval", ["checkpoint=x"], read_saved(text)),
    ]
    for reader in readers:
        try:
            build_everything(reader())
        except ValueError as refusal:
            assert len(str(refusal).splitlines()) == 1
        assert traces() == []


@pytest.mark.parametrize("name", TEXTS)
def test_saved_text_of_any_kind_is_settings_or_refused(name, traces):
    try:
        read_saved(TEXTS[name], "config.yaml")
    except ValueError as refusal:
        assert str(refusal).startswith("config.yaml: ") and len(str(refusal)) < 400
    else:
        assert name in ("date", "not_a_number")
        with pytest.raises(ValueError):
            from_saved(TEXTS[name], "config.yaml")
    assert traces() == []


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shapes_dataset) -> Path:
    """A sound run of one step."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    words = [*TINY, f"data.root={shapes_dataset}", f"run_dir={folder}", "trainer.max_steps=1", "trainer.batch_size=2"]
    api.train(words)
    return folder


COMMANDS = {
    "eval_run": ("eval.py", ["run=run"]),
    "eval_checkpoint": ("eval.py", ["checkpoint=run/checkpoints/best.pt"]),
    "train_run": ("train.py", ["run=run", "run_dir=again", "resume=null"]),
    "train_resume": ("train.py", [*TINY, "run_dir=run", "resume=auto"]),
    "show_pyramid": ("show_pyramid.py", ["run=run", "count=1"]),
    "report": ("report.py", ["run=run"]),
    "convert_weights": (
        "convert_weights.py",
        ["target=torchvision", "input=run/checkpoints/best.pt", "output=out.pth"],
    ),
    "runs": ("runs.py", ["root=."]),
    "replay": ("replay.py", ["run/nan_dump"]),
}
# One of each kind, through every command.
KINDS = (
    "target", "class_that_writes", "callbacks", "logging", "defaults", "search_path", "escaped_resolver",
    "escaped_resolver_as_a_node", "resolver_in_a_transform", "allowed_by_itself",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_commands_that_read_a_foreign_run_run_nothing(kind, settings, trained, tmp_path, traces, run_tool):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    text = hostile(yaml.safe_load((trained / "config.yaml").read_text()), kind, tmp_path)
    (run / "config.yaml").write_text(text)
    for name in ("best.pt", "last.pt"):
        state = load_checkpoint(run / "checkpoints" / name) | {"config": text}
        (run / "checkpoints" / name).unlink()
        save_checkpoint(run / "checkpoints" / name, {key: item for key, item in state.items() if key != "format"})
    (run / "nan_dump" / "rank0").mkdir(parents=True)
    shutil.copy(run / "checkpoints" / "best.pt", run / "nan_dump" / "checkpoint.pt")
    share = {"step": 0, "rank": 0, "world_size": 1, "precision": "fp32", "lr": 0.1, "loss_scale": 1.0}
    lists = {name: [] for name in ("batches", "images", "examinations")}
    save_checkpoint(run / "nan_dump" / "rank0" / "step.pt", share | lists | {"gradient_norms": {}})
    for tool, words in COMMANDS.values():
        result = run_tool(tool, *words)
        assert "Traceback" not in result.stderr and len(result.stderr.strip().splitlines()) <= 2, (tool, result.stderr)
        assert traces() == [], tool
    try:
        api.load(run, device="cpu")
    except ValueError as refusal:
        assert len(str(refusal).splitlines()) == 1
    assert traces() == []


EXPERIMENTS = {
    "target": "model: {backbone: {_target_: canary.Made}}",
    "callbacks": "hydra: {callbacks: {x: {_target_: canary.Made}}}",
    "logging": "hydra: {job_logging: {version: 1, handlers: {x: {(): canary.call}}, root: {handlers: [x]}}}",
    "launcher": "hydra: {launcher: {_target_: canary.Made}}",
    "folder": "hydra: {run: {dir: '{traces}/x'}}",
    "sweep_folder": "hydra: {sweep: {dir: '{traces}/x'}}",
    "resolver": "init_from: '${oc.create:{_target_: canary.Made}}'",
    "resolver_as_a_node": "model: {backbone: '${oc.create:{_target_: canary.Made}}'}",
    "escaped_resolver": "init_from: '\\${oc.create:{_target_: canary.Made}}'",
    "allowed_by_itself": "allow_targets: [canary]\nmodel: {backbone: {_target_: canary.Made}}",
    "tag": "seed: !!python/object/apply:canary.call []",
}


@pytest.mark.parametrize("sweep", [False, True])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_of_a_search_path_run_nothing(name, sweep, tmp_path, traces, run_tool, shapes_dataset):
    folder = tmp_path / "configs" / "experiment"
    folder.mkdir(parents=True)
    text = EXPERIMENTS[name].replace("{traces}", str(tmp_path / "traces"))
    (folder / "foreign.yaml").write_text(f"# @package _global_\ndefaults:\n  - demo\n  - _self_\n{text}\n")
    words = [
        "experiment=foreign",
        f"hydra.searchpath=[file://{tmp_path / 'configs'}]",
        "device=cpu",
        "data.root=nowhere",
    ]
    result = run_tool("train.py", *(["-m"] if sweep else []), *words)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert traces() == []


@pytest.mark.parametrize(
    "class_name",
    [
        "runs.log.RunLog",
        "cli.launch.SweepResults",
        "data.image_cache.ImageCache",
        "training.trainer.Trainer",
        "runtime.Ranks",
        "locations.Path",
    ],
)
def test_settings_may_name_parts_of_detectors_and_recipes_only(class_name):
    with pytest.raises(ValueError, match="expected a class of"):
        locate(f"fpn_det.{class_name}", "model", PACKAGES)


def test_files_of_weights_cannot_settle_what_is_admitted(trained, tmp_path, traces):
    state = torch.load(trained / "checkpoints" / "best.pt", weights_only=True)
    state["config"] = {"model": {"_target_": "canary.Made"}}
    torch.save(state, tmp_path / "foreign.pt")
    with pytest.raises(ValueError):
        api.load(tmp_path / "foreign.pt", device="cpu")
    assert traces() == []
