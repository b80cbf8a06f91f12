"""Findings: what is wrong with a data set, at which place, and whether it stops training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fpn_det.schema import listed
from fpn_det.terminal import printable

Severity = Literal["fatal", "error", "warning", "note"]
OnError = Literal["fail", "fix", "skip"]  # refuse faults; repair in memory; leave out what is faulty

SEVERITIES: tuple[Severity, ...] = get_args(Severity)  # the worst first
SHOWN_PER_KIND = 5
WITHOUT_OBJECTS = "without_objects"  # images that are not trained on


@dataclass(frozen=True)
class Finding:
    """One fault at one place.

    A note appears in reports only. A warning is reported and changes nothing. An error stops training under
    `on_error=fail` and is repaired or left out under the other policies. A fatal finding stops training in any case.
    """

    kind: str  # groups findings: "box_without_area", "class_unknown", ...
    message: str
    severity: Severity = "error"
    image_id: int | str | None = None
    file_name: str | None = None
    annotation_id: int | str | None = None
    where: str | None = None  # file and line, for formats without annotation ids
    box: tuple[float, ...] | None = None  # xyxy, original frame, before clipping

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
        return one_line(f"{', '.join(place)}: {self.message}" if place else self.message)


def one_line(text: str) -> str:
    """The text on one line without terminal commands, which names of a data set may hold."""
    return printable(text).replace("\n", "\\n")


def group_by_kind(findings: Iterable[Finding]) -> dict[str, list[Finding]]:
    """The findings of each kind, the worst kinds first, then in the order of their first occurrence."""
    kinds: dict[str, list[Finding]] = {}
    for finding in sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)):
        kinds.setdefault(finding.kind, []).append(finding)
    return kinds


def describe_findings(findings: Iterable[Finding], shown_per_kind: int = SHOWN_PER_KIND) -> str:
    """One line per kind with its count, followed by the first few places."""
    lines = []
    for kind, members in group_by_kind(findings).items():
        lines.append(f"  {kind} ({len(members)})")
        lines += [f"    {finding}" for finding in members[:shown_per_kind]]
        if len(members) > shown_per_kind:
            lines.append(f"    ... and {len(members) - shown_per_kind} more")
    return "\n".join(lines)


def summarize_findings(findings: Mapping[str, Sequence[Finding]], on_error: OnError) -> dict[str, Any]:
    """Plain values for a JSON file: counts by kind over all splits, and the first places of each kind by split."""
    counts: dict[str, int] = {}
    splits: dict[str, Any] = {}
    for split, members in findings.items():
        splits[split] = {}
        for kind, same in group_by_kind(members).items():
            counts[kind] = counts.get(kind, 0) + len(same)
            first = [str(finding) for finding in same[:SHOWN_PER_KIND]]
            splits[split][kind] = {"severity": same[0].severity, "count": len(same), "first": first}
    return {"on_error": on_error, "counts": counts, "splits": splits}


def stopping_findings(findings: Iterable[Finding], on_error: OnError) -> list[Finding]:
    """The findings that stop training: the one definition of a data set that is not sound."""
    severities = ("fatal", "error") if on_error == "fail" else ("fatal",)
    return [finding for finding in findings if finding.severity in severities]


def raise_for_faults(findings: Sequence[Finding], source: str, on_error: OnError) -> None:
    """Raise if the findings stop training.

    Args:
        findings: of one data set.
        source: name of the data set, for the message.
        on_error: policy.

    Raises:
        ValueError: there are errors under `fail`, or fatal findings; lists them by kind.
    """
    if on_error not in get_args(OnError):
        raise ValueError(f"data.on_error: expected {listed(get_args(OnError))}, got {on_error!r}.")
    stopping = stopping_findings(findings, on_error)
    if not stopping:
        return
    others = [finding for finding in findings if finding.severity in ("error", "warning") and finding not in stopping]
    also = f"\nFound as well:\n{describe_findings(others)}" if others else ""
    if len(stopping) == 1 and stopping[0].severity == "fatal" and str(stopping[0]) == one_line(stopping[0].message):
        raise ValueError(f"{source}: {stopping[0]}.{also}")  # about the whole data set: there is no place to list
    if on_error == "fail":
        raise ValueError(
            f"{source}: expected sound annotations, got {len(stopping)} fault(s). Correct the file, or set "
            f"data.on_error=fix (repairs in memory) or data.on_error=skip (leaves out).\n{describe_findings(stopping)}"
        )
    raise ValueError(
        f"{source}: expected annotations that can be repaired, got:\n{describe_findings(stopping)}\nCorrect the file.{also}"
    )
