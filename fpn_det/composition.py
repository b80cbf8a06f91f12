"""From a command line to typed settings. Of the package, only this file and `cli/launch` use Hydra.

Hydra composes the YAML files of configs/ that the command line selects. What follows is ours: the tree is completed with
the declared defaults, the values of the command line are set in it, and it is fitted to a config class (see `schema`),
which refuses unknown names, wrong types and combinations of which one half would be ignored.

A saved config (of a run folder or checkpoint) may come from a stranger. It is read as plain values, may hold nothing but
settings, and no string in it is interpreted. Hydra's own settings can be changed on the command line only.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from fpn_det.config import DetectorConfig, EvalConfig, is_exported
from fpn_det.locations import CONFIGS
from fpn_det.migration import find, migrate, refuse_old_name
from fpn_det.runs.settings_diff import setting_of
from fpn_det.safe_yaml import load_yaml
from fpn_det.schema import check_names, complete, did_you_mean, fit, listed, missing_names
from fpn_det.synonyms import find_by_last_name, refuse_synonym
from fpn_det.training.config import TrainConfig

# Modules and packages whose classes a `_target_` may name: parts of detectors and recipes, which have no effects outside.
PACKAGES = (
    "fpn_det.models",
    "fpn_det.boxes",
    "fpn_det.interop",
    "fpn_det.data.transforms",
    "fpn_det.data.mixing",
    "fpn_det.training.optimizers",
    "fpn_det.training.schedule",
    "albumentations",
    "torch.optim",
)
# Hydra's sentence for a group without its part, such as `box_loss` for `box_loss@model.rpn.box_loss`.
UNPLACED = re.compile(
    r"Could not override '([^'@]+)\S*'\.\nDid you mean to override (?:one of )?(.+)\?\n[^+]*\+\S+?=(.*)"
)
UNMATCHED = re.compile(r"Could not override '([^'@]+)\S*'\. *\n?No match in the defaults list")
COMPOSING = (HydraException, OmegaConfBaseException, YAMLError)  # raised while settings are composed

C = TypeVar("C", bound=DetectorConfig)
Tree = dict[str, Any]

# Two ways to set one thing: naming one on the command line replaces the other, naming both is refused.
EITHER = [("trainer.epochs", "trainer.max_steps"), ("data.val_fraction", "data.val")]
DELETABLE = ("data.train_transforms.", "data.eval_transforms.", "evaluation.area_ranges.")


class Idle(Protocol):
    """Says why a setting that the command line names would have no effect; None if it has one."""

    def __call__(self, config: Any) -> str | None: ...


def _fixed_by_export(config: Any) -> str | None:
    file = config.checkpoint if isinstance(config, EvalConfig) else None
    return f"it is fixed in {file}" if is_exported(file) else None


def _without_training_tiles(config: Any) -> str | None:
    return None if config.data.tile.size else "data.tile.size=null cuts no tiles"


# Settings that are refused where they would change nothing, or not what they seem to.
IDLE: list[tuple[str, Idle]] = [
    ("hydra.run.dir", lambda config: "the folder of a run is run_dir=<folder>"),
    ("hydra.job.chdir", lambda config: "paths are relative to the folder where the command is typed"),
    (
        "init_from",
        lambda config: (
            "resume continues from the run's own weights"
            if config.init_from is not None and config.resume not in (None, "auto")
            else None
        ),
    ),
    ("experiment", lambda config: "all settings come from run; repeat here those that differ" if config.run else None),
    (
        "set_aside",
        lambda config: (
            "it renames an existing run_dir, and none is set"
            if config.set_aside and config.run_dir is None
            else "resume continues in the existing folder"
            if config.set_aside and config.resume is not None
            else None
        ),
    ),
    (
        "data.tile",
        lambda config: (
            "the tiles of an evaluation are tile.size and tile.overlap" if isinstance(config, EvalConfig) else None
        ),
    ),
    (
        "data.classes",
        lambda config: (
            "the classes are those of the checkpoint, all of them"
            if isinstance(config, EvalConfig) and config.data.classes is not None
            else None
        ),
    ),
    ("model", _fixed_by_export),
    ("weights", _fixed_by_export),
    ("precision", _fixed_by_export),
    ("data.tile.min_visible", _without_training_tiles),
    ("data.tile.empty_share", _without_training_tiles),
    ("tile.overlap", lambda config: "there are no tiles without tile.size" if config.tiling is None else None),
    (
        "schedule.warmup_factor",
        lambda config: (
            "schedule.warmup_steps=0 leaves no warm-up" if config.schedule.get("warmup_steps") == 0 else None
        ),
    ),
]
# Settings whose value is a path, which may have any characters.
PATHS = (
    "against",
    "checkpoint",
    "data.cache",
    "data.root",
    "image",
    "init_from",
    "out",
    "output",
    "resume",
    "run",
    "run_dir",
    "source",
)
# Settings of training, which evaluation does not read.
TRAINING_ONLY = (
    *(item.name for item in fields(TrainConfig) if item.name not in {item.name for item in fields(EvalConfig)}),
    "data.train_transforms",
    "data.keep_empty",
    "data.group_by_aspect",
    "data.repeat_threshold",
)


@dataclass(frozen=True)
class Saved:
    """Settings of an earlier run: plain values in the names of this version."""

    tree: Tree
    added: list[str]  # names of newer settings, which have their defaults


def compose(overrides: Sequence[str] = ()) -> TrainConfig:
    """The settings of a training run, as `fpn-det train` composes them from the words of its command line.

    Args:
        overrides: `name=value` words in Hydra's grammar.

    Raises:
        ValueError: a setting is unknown, mistyped or impossible.
    """
    return compose_as(TrainConfig, "train", overrides)


def compose_as(schema: type[C], config_name: str, overrides: Sequence[str] = (), saved: Saved | None = None) -> C:
    """The settings of a command.

    Args:
        schema: its config class.
        config_name: file in configs/.
        overrides: `name=value` words in Hydra's grammar.
        saved: settings of an earlier run, which the file's defaults list calls `saved`.

    Raises:
        ValueError: a setting is unknown, mistyped or impossible.
    """
    try:
        selections, values = _parse(overrides, schema)
        tree, places = compose_files(config_name, selections, saved)
    except COMPOSING as error:
        raise ValueError(describe_refusal(error)) from None
    _refuse_unused_files(selections, tree, places)
    for value in values:
        _refuse_name_of_file(value, places)
    named = {value.key_or_group for value in values}
    if any(setting_of(word) == "optimizer" for word in selections):
        others = [word for word in selections if setting_of(word) != "optimizer"]
        _refuse_rates_of_another(tree, compose_files(config_name, others, saved)[0], named)
    if tree.get("allow_targets"):
        raise ValueError("allow_targets: expected on the command line only, got it from a file. Remove it there.")
    admitted: Any = next((value.value() for value in values if value.key_or_group == "allow_targets"), None)
    packages = [*PACKAGES, *admitted] if isinstance(admitted, list) else [*PACKAGES]
    try:
        return _finish(tree, values, named | {setting_of(word) for word in selections}, packages, schema)
    except ValueError as error:
        name = str(error).partition(":")[0]
        concerned = {"experiment", *(word for place, word in places.items() if f"{name}.".startswith(f"{place}."))}
        words = [word for word in selections if setting_of(word) in concerned]
        if name in named or len(words) < 2:
            raise
        raise ValueError(f"{error} These do not go together: {', '.join(words)}.") from None


def read_saved(text: str, where: str = "config") -> Saved:
    """The settings that a run folder or checkpoint keeps as text, also of an older version.

    Raises:
        ValueError: it is not a mapping of settings.
    """
    if not isinstance(text, str):
        raise ValueError(f"{where}: expected settings as text, got {type(text).__name__}.")
    tree = load_yaml(text, where)
    if not isinstance(tree, dict):
        raise ValueError(f"{where}: expected settings by name, got {type(tree).__name__}.")
    migrate(tree)
    known = [item.name for item in fields(TrainConfig)]
    for name in tree:
        if name not in known:
            raise ValueError(f"{where}: expected settings only, got '{name}'.{did_you_mean(name, known)} Remove it.")
    tree.pop("allow_targets", None)  # a file admits nothing
    return Saved(tree, [name for name in missing_names(tree, TrainConfig) if name != "allow_targets"])


def from_saved(text: str, where: str = "config", allow_targets: Sequence[str] = ()) -> TrainConfig:
    """The settings that a run folder or checkpoint keeps as text, with classes of the packages `allow_targets` too."""
    return _finish(_escape(read_saved(text, where).tree), [], set(), [*PACKAGES, *allow_targets], TrainConfig)


def _for_schema(tree: Tree, schema: type) -> Tree:
    """Without the settings of training where another config class does not have them."""
    known = {item.name for item in fields(schema)}
    return {name: item for name, item in tree.items() if name in known or name not in TRAINING_ONLY}


def _parse(overrides: Sequence[str], schema: type) -> tuple[list[str], list[Override]]:
    """The words that select files or concern Hydra itself, and those that set values."""
    known = {item.name for item in fields(schema)} | {folder.name for folder in CONFIGS.iterdir() if folder.is_dir()}
    for word in overrides:
        name, _, text = word.lstrip("+~").partition("=")
        refuse_old_name(name)
        refuse_synonym(name, text, known, issubclass(schema, TrainConfig))
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    folders = _folders(parsed)
    selections, values = [], []
    for word, override in zip(overrides, parsed, strict=True):
        key = override.key_or_group
        if override.is_delete() and not key.startswith((*DELETABLE, "hydra")):
            raise ValueError(
                f"{key}: expected a value, got none: a setting cannot be deleted. Set another value, or null."
            )
        if is_selection(key, folders) and not isinstance(override.value(), dict):
            _check_selection(key, override.value())
            selections.append(word)
        elif override.is_sweep_override():
            raise ConfigCompositionException(f"Ambiguous value for argument '{word}'")
        else:
            values.append(override)
    return selections, values


def _check_selection(key: str, value: Any) -> None:
    """Refuse values that cannot be the names of files of a group."""
    names = value if isinstance(value, list) else [value]
    if value is None:
        raise ValueError(
            f"{key}: expected the name of a file in configs/{key.split('@')[0]}, got null. Leave it out; to leave out a "
            "part of the model, set model.<part>=null."
        )
    if not key.startswith("hydra") and any(isinstance(name, list | dict | int | float) for name in names):
        raise ValueError(f"{key}: expected the name of a file in configs/{key}, got {value!r}.")


def is_selection(key: str, folders: Sequence[Path]) -> bool:
    """True if a name on the command line selects a file of a group in `folders`, or is Hydra's own."""
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        return True
    group = key.split("@")[0]
    return "." not in group and any((folder / group).is_dir() for folder in folders)


def _folders(overrides: Sequence[Override]) -> list[Path]:
    """Folders with groups of config files: configs/ and those of `hydra.searchpath`."""
    added = [override.value() for override in overrides if override.key_or_group == "hydra.searchpath"]
    paths = [path for value in added for path in (value if isinstance(value, list) else [value])]
    return [CONFIGS, *(Path(str(path).removeprefix("file://")) for path in paths)]


def compose_files(config_name: str, selections: Sequence[str], saved: Saved | None) -> tuple[Tree, dict[str, str]]:
    """Compose YAML files with Hydra.

    Returns:
        Plain values in which interpolations are not resolved yet; and by the dotted name of each part that a file fills,
        the word before the `=` that selects the file.
    """
    store = ConfigStore.instance()
    store.store("saved", OmegaConf.create(_escape(_follow_root(saved.tree)) if saved else {}))
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = hydra.compose(config_name, list(selections), return_hydra_config=True)
        _check_hydra(composed.hydra, config_name, selections)
    choices = composed.hydra.runtime.choices
    choice = choices.get("experiment")
    tree: Any = OmegaConf.to_container(
        OmegaConf.masked_copy(composed, [str(name) for name in composed if name != "hydra"]), resolve=False
    )
    if choice is not None:
        tree["experiment"] = choice
    places = {}
    for word in choices:
        group, _, place = str(word).partition("@")
        places[place or (f"model.{group}" if group in tree.get("model", ()) else group)] = str(word)
    return tree, places


def _refuse_unused_files(selections: Sequence[str], tree: Tree, places: Mapping[str, str]) -> None:
    """Refuse a file for a part of something that the other settings leave out.

    Raises:
        ValueError: with what is left out.
    """
    chosen = {setting_of(word): word.partition("=")[2] for word in selections}
    for place, word in places.items():
        parts = place.split(".")
        outer = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
        missing = next((name for name in outer if find(tree, name) is None), None)
        if parts[0] in tree and missing and chosen.get(word, "null") not in ("", "null"):
            raise ValueError(f"{word}: has no effect here: {missing} is null. Leave it out.")


def _refuse_rates_of_another(tree: Tree, without: Tree, named: set[str]) -> None:
    """Refuse an optimizer with the learning rate or weight decay that an experiment states for another one.

    Args:
        tree: settings with the optimizer that the command line chooses.
        without: settings without this choice.
        named: settings on the command line.

    Raises:
        ValueError: with the settings that must be stated too.
    """
    own, other = tree.get("optimizer") or {}, without["optimizer"]  # `optimizer=[]` leaves none
    if own.get("_target_") in (None, other["_target_"]):
        return
    kept = [name for name in ("lr", "weight_decay") if name in own and own[name] == other.get(name)]
    if wrong := [name for name in kept if f"optimizer.{name}" not in named]:
        classes = [str(node["_target_"]).rpartition(".")[2] for node in (own, other)]
        raise ValueError(
            f"optimizer.{wrong[0]}: expected a value for {classes[0]}, got {own[wrong[0]]}, which the experiment states for "
            f"{classes[1]}. Set {' '.join(f'optimizer.{name}=...' for name in wrong)} too."
        )


def _refuse_name_of_file(override: Override, places: Mapping[str, str]) -> None:
    """Refuse the name of a file as the value of the part that it would fill.

    Raises:
        ValueError: with the word that selects the file.
    """
    word, value = places.get(override.key_or_group), override.value()
    if word and isinstance(value, str) and (CONFIGS / word.split("@")[0] / f"{value}.yaml").is_file():
        raise ValueError(
            f"{override.key_or_group}: expected a class by name (_target_), got the name of a file. Set {word}={value}."
        )


def _check_hydra(node: DictConfig, config_name: str, selections: Sequence[str]) -> None:
    """Refuse settings of Hydra itself that come from a file: Hydra would call what they name.

    Raises:
        ValueError: they differ from those that our files and the command line give.
    """
    own = tuple(word for word in selections if word.lstrip("+~").startswith("hydra"))
    safe = tuple(word for word in own if not word.lstrip("+~").startswith("hydra.searchpath"))
    try:
        expected = _hydra_settings(config_name, safe)
    except MissingConfigException:  # a launcher of the search path, chosen on the command line
        expected = _runtime_free(hydra.compose(config_name, [*own], return_hydra_config=True).hydra)
    if _runtime_free(node) != expected:
        raise ValueError("hydra: expected on the command line only, got it from a file. Remove it there.")


@functools.lru_cache
def _hydra_settings(config_name: str, words: tuple[str, ...]) -> Any:
    """Hydra's settings under words of the command line that concern Hydra alone. Composing takes 0.1 s, so they are kept."""
    return _runtime_free(hydra.compose(config_name, [*words], return_hydra_config=True).hydra)


def _runtime_free(node: DictConfig) -> Any:
    plain: Any = OmegaConf.to_container(node, resolve=False)
    for name in ("overrides", "runtime", "searchpath"):
        plain.pop(name, None)
    plain["job"] = {
        key: item for key, item in plain["job"].items() if key not in ("override_dirname", "name", "config_name")
    }
    return plain


def _finish(tree: Tree, values: Sequence[Override], named: set[str], packages: Sequence[str], schema: type[C]) -> C:
    """Complete a tree, set the values of the command line in it, and fit it to the config class."""
    if not issubclass(schema, TrainConfig):
        idle = [name for name in TRAINING_ONLY if _is_named(name, named)]
        if idle:
            raise ValueError(f"{idle[0]}: has no effect here: nothing is trained here. Leave it out.")
        tree = _for_schema(tree, schema)
    for override in values:  # another class has other defaults
        if override.key_or_group.endswith("._target_"):
            _set(tree, override)
    tree = complete(tree, schema, packages)
    known = {item.name for item in fields(schema)}
    for override in values:
        key = override.key_or_group
        if key.split(".")[0] not in known and (meant := find_by_last_name(key, tree)):
            raise ValueError(f"{key}: there is no setting of that name. Did you mean {listed(meant[:3])}?")
        _set(tree, override)
    tree = complete(tree, schema, packages)  # what the command line replaced as a whole
    for one, other in EITHER:
        _choose(tree, one, other, named)
    try:
        resolved: Any = OmegaConf.to_container(OmegaConf.create(tree), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ValueError(describe_refusal(error)) from None
    config = fit(resolved, schema, "", packages)
    for key, reason in IDLE:
        if _is_named(key, named) and (why := reason(config)):
            raise ValueError(f"{key}: has no effect here: {why}. Leave it out.")
    return config


def _set(tree: Tree, override: Override) -> None:
    """Set or delete one value. A mapping is merged into the present one, unless it names another class."""
    key = override.key_or_group
    *sections, name = key.split(".")
    node: Any = tree
    for number, section in enumerate(sections):
        where = ".".join(sections[: number + 1])
        node = node.setdefault(section, {})
        rest = key.removeprefix(f"{where}.")
        if node is None:
            raise ValueError(f"{where}: is null, so it has no {rest}. Set all of it: '{where}={{{rest}: value, ...}}'.")
        if not isinstance(node, dict):
            raise ValueError(f"{where}: is {node!r}, so it has no {rest}. Set it as a whole: {where}=...")
    if override.is_delete():
        node.pop(name, None)
        return
    value = override.value()
    if value is None:  # of a complete tree: null leaves out what is there
        check_names([name], node, ".".join(sections))
    present = node.get(name)
    if isinstance(value, dict) and isinstance(present, dict):
        replaces = "_target_" in value and value["_target_"] != present.get("_target_")
        value = value if replaces else _merged(present, value)
    node[name] = value


def _merged(present: Tree, value: Tree) -> Tree:
    merged = dict(present)
    for name, item in value.items():
        both = isinstance(item, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merged(merged[name], item) if both else item
    return merged


def _is_named(key: str, named: set[str]) -> bool:
    return any(name == key or name.startswith(f"{key}.") for name in named)


def _choose(tree: Tree, one: str, other: str, named: set[str]) -> None:
    """Set to null what the command line replaced by its alternative."""
    if not (_is_set(find(tree, one)) and _is_set(find(tree, other))):
        return
    said = [_is_named(key, named) for key in (one, other)]
    if said[0] == said[1]:
        raise ValueError(f"{one}: expected this or {other}, got both. Leave one of them out, or set it to null.")
    section, _, name = (other if said[0] else one).rpartition(".")
    node = find(tree, section)
    node[name] = dict.fromkeys(node[name]) if isinstance(node[name], dict) else None


def _is_set(value: Any) -> bool:
    return any(item is not None for item in value.values()) if isinstance(value, dict) else value is not None


def _escape(value: Any) -> Any:
    """Strings of a saved config as OmegaConf takes them literally, except the reference to `data.root`, which is ours."""
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escape(item) for item in value]
    if isinstance(value, _UnderRoot):
        return "${data.root}" + _escape(str(value))
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


class _UnderRoot(str):
    """The rest of a path below `data.root`."""


def _follow_root(tree: Tree) -> Tree:
    """Paths below `data.root` follow that setting again, so that a new root moves them all."""
    data = tree.get("data")
    root = data.get("root") if isinstance(data, dict) else None
    if not isinstance(data, dict) or not isinstance(root, str):
        return tree

    def under(path: Any) -> Any:
        if isinstance(path, list):
            return [under(item) for item in path]
        if isinstance(path, str) and (path == root or path.startswith(f"{root}/")):
            return _UnderRoot(path.removeprefix(root))
        return path

    splits = {
        split: {name: under(item) if name in ("images", "annotations") else item for name, item in data[split].items()}
        for split in ("train", "val", "test")
        if isinstance(data.get(split), dict)
    }
    return {**tree, "data": {**data, **splits}}


def literal(name: str, text: str) -> str:
    """Return the word that sets `name` to exactly this text, whatever characters it has."""
    quoted = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text)
    return f"{name}='{quoted}'"


def with_literal_path(word: str, is_swept: bool = False) -> str:
    """A `name=value` word whose value, if it is a path, needs no quotes.

    What Hydra's grammar reads as a string or null, and so all that is quoted, stays as it is.

    Args:
        word: of a command line.
        is_swept: several values, such as `first,second`, stay several.
    """
    name, _, text = word.partition("=")
    if name not in PATHS:
        return word
    try:
        (override,) = OverridesParser.create().parse_overrides([word])
    except HydraException:
        return literal(name, text)
    is_kept = is_swept if override.is_sweep_override() else isinstance(override.value(), str | None)
    return word if is_kept else literal(name, text)


def parse_words(words: Sequence[str]) -> list[Override]:
    """`name=value` words in Hydra's grammar.

    Raises:
        ValueError: one is not in that form.
    """
    try:
        return OverridesParser.create().parse_overrides(list(words))
    except HydraException as error:
        raise ValueError(describe_refusal(error)) from None


def describe_refusal(error: Exception) -> str:
    """One sentence for what Hydra, OmegaConf or YAML refused, with the nearest name."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        options = error.options or []
        return f"{group or 'config'}: expected one of {listed(options)}, got '{name}'.{did_you_mean(name, options)}"
    if isinstance(error, OverrideParseException):
        return (
            f"command line: expected name=value, got '{error.override}'. "
            "Put quotes around special characters: 'name=\"a=b\"'."
        )
    if isinstance(error, ConfigCompositionException) and (unplaced := UNPLACED.match(str(error))):
        group, places, value = unplaced.groups()
        forms = listed(f"{place}={value}" for place in places.split(", "))
        return f"{group}: expected the part that it is for, got none or another. Set {forms}."
    if isinstance(error, ConfigCompositionException) and (unmatched := UNMATCHED.match(str(error))):
        return (
            f"{unmatched[1]}: expected settings by name, got a choice of a file, where all settings come from a run. "
            "Leave it out, or set single values."
        )
    if isinstance(error, ConfigCompositionException) and "Ambiguous value" in str(error):
        return f"command line: {str(error).splitlines()[0]}. Use -m to try them in turn, or name=[first,second] for a list."
    if isinstance(cause, InterpolationResolutionError):
        return f"{cause.full_key}: expected a value, got none: {str(cause).splitlines()[0]}."
    if isinstance(cause, OmegaConfBaseException) and cause.full_key and "Missing mandatory" in str(cause):
        return f"{cause.full_key}: expected a value, got none. Set {cause.full_key}=... on the command line."
    text = " ".join(str(error).split()) if isinstance(error, YAMLError) else str(error).splitlines()[0]
    return f"config: {text}"
