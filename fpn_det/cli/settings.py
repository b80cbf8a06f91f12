"""List the settings of training with their values, types and meanings.

A word selects the settings whose name or meaning contains it. A name=value word is used as in `fpn-det train`, so that
the values are those of an experiment.

Examples:
  fpn-det settings
  fpn-det settings resize
  fpn-det settings lr experiment=small
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, get_type_hints

import yaml  # type: ignore[import-untyped]

from fpn_det.cli.declarations import as_word, class_of_field, declarations
from fpn_det.cli.help import TRAIN_CONFIG, format_rows
from fpn_det.cli.launch import USER_ERRORS, end_with
from fpn_det.composition import compose
from fpn_det.schema import describe


def main() -> None:
    """Print the settings that the words of the command line select."""
    words = [word.lower() for word in sys.argv[1:] if "=" not in word]
    try:
        tree = yaml.safe_load(compose([word for word in sys.argv[1:] if "=" in word]).to_yaml())
        rows = [row for row in describe_tree(tree) if all(word in " ".join(row).lower() for word in words)]
        if not rows:
            raise ValueError(
                f"settings: expected part of a name or meaning, got '{' '.join(words)}'. Try another word."
            )
    except USER_ERRORS as error:
        end_with(error)
    print(format_rows(rows))


def describe_tree(
    tree: Mapping[str, Any], class_path: str = TRAIN_CONFIG, prefix: str = "", outer: str = ""
) -> Iterator[tuple[str, str]]:
    """`name=value` and the meaning with the type of every setting of a complete tree.

    Args:
        tree: settings of one section.
        class_path: full name of the class that declares them; empty if none does.
        prefix: dotted name of the section, with a dot at its end.
        outer: meaning of the section, for settings without a declaration of their own.
    """
    declared, hints = declarations(class_path), _hints(class_path)
    for name, value in tree.items():
        if name == "_partial_":
            continue
        if isinstance(value, Mapping) and value:
            inner = value.get("_target_") or (class_of_field(class_path, name) if name in declared else "")
            meaning = declared[name].meaning if name in declared else outer
            yield from describe_tree(value, inner, f"{prefix}{name}.", meaning)
        else:
            item = declared.get(name)
            meaning = "class of this part" if name == "_target_" else item.describe() if item else outer
            kind = f" ({describe(hints[name])})" if item and name in hints else ""
            yield f"{prefix}{name}={as_word(value)}", f"{meaning}{kind}".strip()


def _hints(class_path: str) -> dict[str, Any]:
    """Type hints of the fields or arguments of a class; none for one that is not declared in this package."""
    module, _, name = class_path.rpartition(".")
    if not declarations(class_path):
        return {}
    kind = getattr(importlib.import_module(module), name)
    return get_type_hints(kind if is_dataclass(kind) else kind.__init__, include_extras=True)
