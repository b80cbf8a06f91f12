"""Which category id means which class: by name, so that ids may be sparse, start anywhere and differ between files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fpn_det.annotations.findings import Finding, near_matches
from fpn_det.annotations.raw import RawDataset, Record, parse_id

UNKNOWN, LEFT_OUT = -1, -2  # in place of a label, for category ids that have none


@dataclass(frozen=True)
class Classes:
    """The classes in the order of their labels, and the label of each category id of one file."""

    names: tuple[str, ...]
    category_ids: tuple[int, ...]
    labels: dict[int | str | None, int]  # LEFT_OUT for classes that are not wanted


def match_classes(
    categories: Sequence[Record],
    class_names: Sequence[str] | None,
    subset: bool,
    source: str,
    lack_is_fault: bool = True,
) -> tuple[Classes, list[Finding]]:
    """Give every category of a file its label.

    Args:
        categories: the file's table.
        class_names: the classes and their order; None takes those of the file, by category id.
        subset: whether the file may hold more classes than asked for.
        source: name of the file, for errors.
        lack_is_fault: the file should have all of `class_names`; else it has those that occur.

    Returns:
        The classes, with names that the file lacks under a category id of their own; and where the file differs.

    Raises:
        ValueError: the table makes no sense, or `subset` asks for a name that the file lacks.
    """
    findings: list[Finding] = []
    ids_of = _ids_by_name(categories, source, findings)
    if not ids_of and (class_names is None or lack_is_fault):
        raise ValueError(f"{source}: expected at least one category, got none.")
    for name, ids in ids_of.items():
        if len(ids) > 1:
            findings.append(Finding("class_duplicate", f"class {name!r} has the category ids {ids}; they count as one"))
    names = tuple(ids_of if class_names is None else class_names)
    if len(set(names)) < len(names):
        raise ValueError(f"{source}: expected different class names, got {', '.join(names)}.")

    missing = [name for name in names if name not in ids_of]
    extra = [name for name in ids_of if name not in names]
    if missing and subset and lack_is_fault:
        wrong = "; ".join(f"{name!r}{_near(name, extra)}" for name in missing)
        raise ValueError(
            f"{source}: expected the classes of data.classes, got no {wrong}. The file has: {', '.join(ids_of)}."
        )
    respelled = {_fold(name): name for name in extra}
    for name in missing:
        other = respelled.pop(_fold(name), None)
        if other is not None:
            findings.append(
                Finding("class_spelling", f"class {name!r} of the training set is {other!r} here; they count as one")
            )
            ids_of[name] = ids_of.pop(other)
            extra.remove(other)
        elif (unused := _unused_id(name)) is not None and unused not in {
            number for ids in ids_of.values() for number in ids
        }:
            ids_of[name] = [unused]
        else:
            if lack_is_fault:
                findings.append(
                    Finding("class_missing", f"class {name!r} of the training set is missing{_near(name, extra)}")
                )
            ids_of[name] = [1 + max((max(ids) for ids in ids_of.values()), default=0)]
    if not subset:
        for name in extra:
            findings.append(
                Finding(
                    "class_extra",
                    f"class {name!r} is not in the training set{_near(name, missing)}; its objects are left out",
                )
            )

    label_of = {name: label for label, name in enumerate(names)}
    labels: dict[int | str | None, int] = {
        number: label_of.get(name, LEFT_OUT) for name, ids in ids_of.items() for number in ids
    }
    return Classes(names, tuple(ids_of[name][0] for name in names), labels), findings


def merge_class_names(parts: Iterable[RawDataset]) -> list[str]:
    """The classes of several files: those of the first by category id, then what the others add. Letter case makes no other class."""
    names: dict[str, None] = {}
    for part in parts:
        known = {_fold(name) for name in names}
        names |= dict.fromkeys(name for name in part.class_names if _fold(name) not in known)
    return list(names)


def _fold(name: str) -> str:
    return " ".join(name.split()).casefold()


def _unused_id(name: str) -> int | None:
    """The id in `N/A <id>`: an output of weights that count raw category ids, for an id that no data set uses."""
    match = re.fullmatch(r"N/A (\d+)", name)
    return int(match[1]) if match else None


def _ids_by_name(categories: Sequence[Record], source: str, findings: list[Finding]) -> dict[str, list[int]]:
    """Category ids of each name, both in the order of the ids."""
    name_of: dict[int, str] = {}
    for record in categories:
        category_id, name = parse_id(record.get("id")), record.get("name")
        if not isinstance(category_id, int) or not isinstance(name, str):
            raise ValueError(f"{source}: expected categories with an integer id and a name, got {record}.")
        if isinstance(record["id"], str):
            findings.append(
                Finding("category_id_is_text", f"category {name!r}: expected a number as id, got {record['id']!r}")
            )
        if name_of.setdefault(category_id, name) != name:
            raise ValueError(
                f"{source}: expected one name for category id {category_id}, got {name_of[category_id]!r} and {name!r}."
            )
    ids_of: dict[str, list[int]] = {}
    for category_id in sorted(name_of):
        ids_of.setdefault(name_of[category_id], []).append(category_id)
    spellings: dict[str, list[str]] = {}
    for name in ids_of:
        spellings.setdefault(_fold(name), []).append(name)
    for alike in spellings.values():
        if len(alike) > 1:
            message = f"classes {' and '.join(map(repr, alike))} differ in letter case or spaces only; they count as different"
            findings.append(Finding("class_alike", message, "warning"))
    return ids_of


def _near(name: str, names: Sequence[str]) -> str:
    near = near_matches(name, names)
    return f" (near: {', '.join(map(repr, near))})" if near else ""
