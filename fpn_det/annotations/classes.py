"""Classes: the label of each category id, matched by class name, so ids may be sparse, start anywhere and differ between files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fpn_det.annotations.files import near_matches
from fpn_det.annotations.findings import SHOWN_PER_KIND, Finding
from fpn_det.annotations.parsing import parse_id
from fpn_det.annotations.raw import RawDataset, Record

UNKNOWN_CLASS, IGNORED_CLASS = -1, -2  # in place of a label: no such category; a class that is not used


@dataclass(frozen=True)
class Classes:
    """Classes in the order of their labels, and the label of each category id of one file."""

    names: tuple[str, ...]
    category_ids: tuple[int, ...]
    labels: dict[int | str | None, int]  # IGNORED_CLASS for classes that are not used


def match_classes(
    categories: Sequence[Record],
    class_names: Sequence[str] | None,
    subset: bool,
    source: str,
    require_all: bool = True,
) -> tuple[Classes, list[Finding]]:
    """Assign a label to every category of a file.

    Args:
        categories: records of the file.
        class_names: the classes and their order; None takes those of the file, by category id.
        subset: the file may hold more classes than `class_names`.
        source: name of the file, for messages.
        require_all: the file should have all of `class_names`; False for files whose classes are those that occur.

    Returns:
        The classes, where names that the file lacks have a category id of their own; and the differences found.

    Raises:
        ValueError: the records are no classes, or `subset` asks for a name that the file lacks.
    """
    findings: list[Finding] = []
    ids_of = _ids_by_name(categories, source, findings)
    if not ids_of and (class_names is None or require_all):
        findings.append(Finding("no_classes", f"{source}: expected at least one category, got none", "fatal"))
        if class_names is None or subset:
            return Classes((), (), {}), findings
    for name, ids in ids_of.items():
        if len(ids) > 1:
            findings.append(Finding("class_duplicate", f"class {name!r} has the category ids {ids}; they count as one"))
    names = tuple(ids_of if class_names is None else class_names)
    if len(set(names)) < len(names):
        raise ValueError(f"{source}: expected different class names, got {_shown(names)}.")

    missing = [name for name in names if name not in ids_of]
    known = set(names)
    extra = dict.fromkeys(name for name in ids_of if name not in known)
    if missing and subset and require_all:
        wrong = "; ".join(f"{name!r}{_near(name, extra)}" for name in missing[:SHOWN_PER_KIND])
        raise ValueError(
            f"{source}: expected the classes of data.classes, got no {wrong}. The file has: {_shown(list(ids_of))}."
        )
    respelled = {_fold(name): name for name in extra}
    used_ids = {number for ids in ids_of.values() for number in ids}
    highest, num_hints = max(used_ids, default=0), 0
    for name in missing:
        other = respelled.pop(_fold(name), None)
        unused = _unused_id(name)
        if other is not None:
            findings.append(
                Finding("class_spelling", f"class {name!r} of the training set is {other!r} here; they count as one")
            )
            ids_of[name] = ids_of.pop(other)
            del extra[other]
        elif unused is not None and unused not in used_ids:
            ids_of[name] = [unused]
            used_ids.add(unused)
            highest = max(highest, unused)
        else:
            if require_all:
                num_hints += 1
                hint = _near(name, extra) if num_hints <= SHOWN_PER_KIND else ""
                findings.append(Finding("class_missing", f"class {name!r} of the training set is missing{hint}"))
            highest += 1
            ids_of[name] = [highest]
            used_ids.add(highest)
    if not subset:
        for position, name in enumerate(extra):
            hint = _near(name, missing) if position < SHOWN_PER_KIND else ""
            message = f"class {name!r} is not in the training set{hint}; its objects are left out"
            findings.append(Finding("class_extra", message))

    label_of = {name: label for label, name in enumerate(names)}
    labels: dict[int | str | None, int] = {
        number: label_of.get(name, IGNORED_CLASS) for name, ids in ids_of.items() for number in ids
    }
    return Classes(names, tuple(ids_of[name][0] for name in names), labels), findings


def merge_class_names(datasets: Iterable[RawDataset]) -> list[str]:
    """Return the classes of several files: those of the first by category id, then new ones of the others.

    Names that differ by letter case or blanks only are one class.
    """
    names: dict[str, None] = {}
    known: set[str] = set()
    for dataset in datasets:
        new = [name for name in dataset.class_names if _fold(name) not in known]
        names |= dict.fromkeys(new)
        known |= {_fold(name) for name in new}
    return list(names)


def _fold(name: str) -> str:
    return " ".join(name.split()).casefold()


def _unused_id(name: str) -> int | None:
    """The id in `N/A <id>`: the name of an output for a category id that no data set uses."""
    match = re.fullmatch(r"N/A ([0-9]{1,18})", name)
    return int(match[1]) if match else None


def _ids_by_name(categories: Sequence[Record], source: str, findings: list[Finding]) -> dict[str, list[int]]:
    """Category ids of each name, both in the order of the ids."""
    name_of: dict[int, str] = {}
    for record in categories:
        category_id, name = parse_id(record.get("id")), record.get("name")
        if not isinstance(category_id, int) or not isinstance(name, str) or not _is_unicode(name):
            raise ValueError(f"{source}: expected categories with an integer id and a name, got {str(record)[:200]}.")
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


def _is_unicode(text: str) -> bool:
    """False for lone surrogates, which JSON can write and no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(names: Sequence[str]) -> str:
    """The first names of a list, for a message."""
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _near(name: str, names: Iterable[str]) -> str:
    near = near_matches(name, names)
    return f" (near: {', '.join(map(repr, near))})" if near else ""
