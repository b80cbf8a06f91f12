"""Saved settings of older versions, in the names of this one.

A run folder or checkpoint keeps the settings it was made with. When a setting or class gets another name or form, its
old form is translated here; on a command line the old name is refused with the new one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Tree = dict[str, Any]

# Old dotted name of a setting: its new name, and the conversion of its value.
RENAMED_SETTINGS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "model.neck.extra_level": ("model.neck.extra_levels", int),
    "miniature": ("reduced", str),
}

# Old module of a class that a `_target_` may name: its new module.
MOVED_MODULES = {
    "fpn_det.anchors": "fpn_det.models.anchors",
    "fpn_det.matching": "fpn_det.models.matching",
    "fpn_det.pyramid": "fpn_det.models.roi_align",
    "fpn_det.models.neck": "fpn_det.models.necks.fpn",
    "fpn_det.models.bifpn": "fpn_det.models.necks.bifpn",
    "fpn_det.models.pafpn": "fpn_det.models.necks.pafpn",
    "fpn_det.models.pyramids": "fpn_det.models.necks.baselines",
    "fpn_det.engine.optimizers": "fpn_det.training.optimizers",
    "fpn_det.engine.schedule": "fpn_det.training.schedule",
}

# Changes that are more than another name; each edits the tree in place and leaves a current tree as it is.
CONVERSIONS: list[Callable[[Tree], None]] = []


def migrate(tree: Tree) -> None:
    """Translate the settings of any older version in place. Current settings stay as they are."""
    for node in _mappings(tree):
        if isinstance(target := node.get("_target_"), str):
            module, _, name = target.rpartition(".")
            node["_target_"] = f"{MOVED_MODULES.get(module, module)}.{name}"
    for old, (new, convert) in RENAMED_SETTINGS.items():
        section, _, name = old.rpartition(".")
        node = find(tree, section)
        if isinstance(node, dict) and name in node:
            value = convert(node.pop(name))
            new_section, _, new_name = new.rpartition(".")
            if isinstance(place := find(tree, new_section), dict):
                place[new_name] = value
    for change in CONVERSIONS:
        change(tree)


def find(tree: Any, name: str) -> Any:
    """The value of a dotted name; None if there is none."""
    for part in name.split(".") if name else ():
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _mappings(value: Any) -> Iterator[Tree]:
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from _mappings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _mappings(item)


def refuse_old_name(name: str) -> None:
    """Refuse a setting that has another name now, with the new one.

    Raises:
        ValueError: the command line names it.
    """
    if name in RENAMED_SETTINGS:
        raise ValueError(f"{name}: is called {RENAMED_SETTINGS[name][0]} now. Use that name.")
