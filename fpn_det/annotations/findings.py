"""What is wrong with a data set, said so that a person can find the place."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Severity = Literal["fatal", "error", "warning", "note"]

SHOWN_PER_KIND = 5


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, at one place.

    A note stops nobody and is in reports only; a warning is said and goes on; an error stops the run unless a policy
    repairs it; a fatal one cannot be repaired.
    """

    kind: str  # groups findings in a report: "box_without_area", "class_unknown", ...
    message: str
    severity: Severity = "error"
    image_id: int | str | None = None
    file_name: str | None = None
    annotation_id: int | str | None = None
    where: str | None = None  # file and line, for formats without ids
    box: tuple[float, ...] | None = None  # xyxy, as drawn

    def __str__(self) -> str:
        place = []
        if self.image_id is not None:
            place.append(f"image {self.image_id}" + (f" ({self.file_name})" if self.file_name else ""))
        elif self.file_name is not None:
            place.append(self.file_name)
        if self.where is not None:
            place.append(self.where)
        elif self.annotation_id is not None:
            place.append(f"annotation {self.annotation_id}")
        return f"{', '.join(place)}: {self.message}" if place else self.message


def group(findings: Iterable[Finding]) -> dict[str, list[Finding]]:
    """The findings of each kind, in the order in which the kinds were met."""
    kinds: dict[str, list[Finding]] = {}
    for finding in findings:
        kinds.setdefault(finding.kind, []).append(finding)
    return kinds


def describe_findings(findings: Sequence[Finding], shown_per_kind: int = SHOWN_PER_KIND) -> str:
    """One line for each kind with its count, and under it the first few places."""
    lines = []
    for kind, members in group(findings).items():
        lines.append(f"  {kind} ({len(members)})")
        lines += [f"    {finding}" for finding in members[:shown_per_kind]]
        if len(members) > shown_per_kind:
            lines.append(f"    ... and {len(members) - shown_per_kind} more")
    return "\n".join(lines)


def near_matches(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """Up to `count` of `names` that somebody who wrote `name` may have meant, best first; letter case does not matter."""
    folded: dict[str, str] = {}
    for candidate in names:
        folded.setdefault(candidate.casefold(), candidate)
    return [folded[match] for match in difflib.get_close_matches(name.casefold(), folded, count)]


def existing_path(path: str | Path, what: str) -> Path:
    """The absolute form of a path that has to be there.

    Raises:
        ValueError: it is not; with the path tried and up to three that are there and look like it.
    """
    wanted = Path(path).expanduser().absolute()
    if wanted.exists():
        return wanted
    missing = wanted
    while not missing.parent.exists():
        missing = missing.parent
    siblings = sorted(entry.name for entry in missing.parent.iterdir()) if missing.parent.is_dir() else []
    similar = near_matches(missing.name, siblings)
    hint = f" Did you mean {' or '.join(str(missing.parent / name) for name in similar)}?" if similar else ""
    raise ValueError(f"{what}: expected a path that exists, got {wanted}; {missing} is not there.{hint}")
