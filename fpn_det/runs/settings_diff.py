"""Compare the settings of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from fpn_det.migration import migrate
from fpn_det.safe_yaml import load_yaml

# Settings, or groups of settings, that change neither weights nor metrics.
IRRELEVANT_TO_RESULTS = (
    "allow_targets", "data.check", "data.num_workers", "data.start_method", "experiment", "profile", "resume", "run", "run_dir",
    "set_aside", "trainer.eval_every", "trainer.keep_last", "trainer.log_every", "trainer.probe", "trainer.report", "trainer.save_every",
    "trainer.timeout_minutes", "trainer.val_loss",
)  # fmt: skip
# Settings that say how a run is started, which a resumed run does not take over.
OF_A_START = ("profile", "resume", "run", "run_dir", "set_aside")
ABSENT = "-"  # shown for a setting that only other runs have

Flat = dict[str, Any]  # dotted name -> value


def flatten(tree: Any, where: str = "") -> Flat:
    """Flatten nested mappings to dotted names. Lists are leaves."""
    if not isinstance(tree, Mapping) or not tree:
        return {where: tree}
    leaves: Flat = {}
    for name, item in tree.items():
        leaves |= flatten(item, f"{where}.{name}" if where else str(name))
    return leaves


def read_settings(text: str, where: str = "config.yaml") -> Flat:
    """Parse a saved `config.yaml` to settings by dotted names, in those of this version.

    Raises:
        ValueError: the text is not a mapping in plain YAML.
    """
    tree = load_yaml(text, where)
    if tree is None:
        return flatten({})
    if not isinstance(tree, dict):
        raise ValueError(f"{where}: expected settings by name, got {type(tree).__name__}.")
    migrate(tree)
    return flatten(tree)


def setting_of(word: str) -> str:
    """The name of the setting that a word of a command line states."""
    return word.lstrip("+~").partition("=")[0]


def typed_settings(words: Sequence[str], settings: Flat) -> Flat:
    """The settings that a command line states, with their values; a selected file, `data=yolo`, counts by its name."""
    typed = {setting_of(word): settings.get(setting_of(word), word.partition("=")[2]) for word in words}
    return {name: value for name, value in typed.items() if name not in OF_A_START}


def affects_results(name: str) -> bool:
    """Return whether a setting can change weights or metrics."""
    return not any(name == setting or name.startswith(f"{setting}.") for setting in IRRELEVANT_TO_RESULTS)


def differing(settings: Sequence[Flat]) -> list[str]:
    """Return the names of settings whose values differ between runs."""
    names = dict.fromkeys(name for one in settings for name in one)
    return [name for name in names if len({repr(one.get(name, ABSENT)) for one in settings}) > 1]


def changes_table(before: Flat, now: Flat) -> Table | None:
    """Tabulate the changed settings with both values, and whether they affect results; None without changes."""
    names = [name for name in differing([before, now]) if name not in OF_A_START]
    if not names:
        return None
    table = Table("setting", "before", "now", "affects results", box=None, padding=(0, 2, 0, 2))
    for name in names:
        values = [escape(str(one.get(name, ABSENT))) for one in (before, now)]
        table.add_row(escape(name), *values, "yes" if affects_results(name) else "no")
    return table
