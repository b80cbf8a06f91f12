"""Settings side by side: what differs, and whether it matters for the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from fpn_det.safe_yaml import load_yaml

# Settings, or sections of them, that change neither weights nor metrics.
HARMLESS = (
    "allow_targets", "data.check", "data.num_workers", "data.start_method", "experiment", "profile", "resume", "run", "run_dir",
    "set_aside", "trainer.eval_every", "trainer.keep_last", "trainer.log_every", "trainer.probe", "trainer.save_every",
    "trainer.timeout_minutes", "trainer.val_loss",
)  # fmt: skip
ABSENT = "-"  # where others have a setting

Flat = dict[str, Any]  # dotted name -> value


def flatten(tree: Any, where: str = "") -> Flat:
    """The leaves of nested mappings by their dotted names; lists are leaves."""
    if not isinstance(tree, Mapping) or not tree:
        return {where: tree}
    leaves: Flat = {}
    for name, item in tree.items():
        leaves |= flatten(item, f"{where}.{name}" if where else str(name))
    return leaves


def read_settings(text: str, where: str = "config.yaml") -> Flat:
    """The settings of a saved `config.yaml`, by dotted names.

    Raises:
        ValueError: the text is not a mapping in plain YAML.
    """
    tree = load_yaml(text, where)
    if tree is None:
        return flatten({})
    if not isinstance(tree, Mapping):
        raise ValueError(f"{where}: expected settings by name, got {type(tree).__name__}.")
    return flatten(tree)


def is_harmless(name: str) -> bool:
    """Whether a setting changes neither weights nor metrics."""
    return any(name == one or name.startswith(f"{one}.") for one in HARMLESS)


def differing(settings: Sequence[Flat]) -> list[str]:
    """The names whose values are not the same everywhere."""
    names = dict.fromkeys(name for one in settings for name in one)
    return [name for name in names if len({repr(one.get(name, ABSENT)) for one in settings}) > 1]


def changes_table(before: Flat, now: Flat) -> Table | None:
    """What was changed, what it was, and whether the numbers change with it; None if nothing was."""
    names = differing([before, now])
    if not names:
        return None
    table = Table("setting", "was", "is now", "changes the numbers", box=None, padding=(0, 2, 0, 2))
    for name in names:
        values = [escape(str(one.get(name, ABSENT))) for one in (before, now)]
        table.add_row(escape(name), *values, "no" if is_harmless(name) else "yes")
    return table
