"""The report as one self-contained HTML file, with CSV files and the suspects beside it."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from fpn_det.evaluation.bootstrap import Interval
from fpn_det.evaluation.curves import Curve, calibrate, curve_of
from fpn_det.pages.charts import bar, line_chart
from fpn_det.pages.document import cell, gallery, hint, table, write_document
from fpn_det.report.analysis import Analysis, Comparison
from fpn_det.report.galleries import (
    PICTURES,
    draw_outcomes,
    false_detections,
    first_suspects,
    legend,
    missed_objects,
    worst_images,
)
from fpn_det.report.tables import class_rows, error_rows, gain_column, suspect_rows

LISTED = 100  # suspects on the page; the files have all
UNFOLDED = 20  # of them
MAX_CLASSES = 20  # with a row and column of their own in the confusion matrix on the page
POINTS = 150  # of a drawn curve


@dataclass(frozen=True)
class RunFacts:
    """Everything that the report shows of a run beside its detections."""

    scalars: Mapping[str, Sequence[tuple[int, float]]]  # steps and values by the names of `runs.tags`
    splits: Mapping[str, Mapping[str, str]]  # summary by split
    findings: Mapping[str, int]  # faults of the data that were found before training, by kind
    settings: Sequence[Sequence[str]]  # name, value of the experiment, value of the run, for those that differ
    versions: Sequence[Sequence[str]]  # name, version of the training, version of the evaluation
    others: Mapping[str, str]  # checkpoint, speed and the like, by name


def write_report(
    folder: Path,
    title: str,
    analysis: Analysis,
    facts: RunFacts,
    against: tuple[str, Analysis, Comparison] | None = None,
) -> Path:
    """Write index.html, per_class.csv, errors.csv, levels.csv, suspects.csv and suspects.json. Returns the page.

    Args:
        folder: created if it does not exist.
        title: name of the run.
        analysis: of its detections.
        facts: of the run.
        against: name, analysis and comparison of another run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    classes, errors, suspects = class_rows(analysis), error_rows(analysis), suspect_rows(analysis)
    _write_csv(folder / "per_class.csv", classes)
    _write_csv(folder / "errors.csv", errors)
    _write_csv(folder / "levels.csv", analysis.levels.counts(analysis.outcomes))
    _write_suspects(folder, analysis, suspects)
    parts = [f"<h1>{escape(title)}</h1>", _data(analysis)]
    if against is not None:
        parts.append(_comparison(title, analysis, *against))
    parts += [
        _numbers(analysis),
        _classes(classes),
        _curves(analysis),
        _confusion(analysis),
        _errors(errors, gain_column(analysis)),
        _levels(analysis),
    ]
    parts += [_galleries(analysis), _suspects(analysis, suspects), _history(facts.scalars), _data_sets(facts)]
    if facts.settings:
        parts.append(
            "<h2>Settings that differ from the experiment's file</h2>"
            + table(("setting", "experiment", "run"), [map(escape, row) for row in facts.settings])
        )
    parts.append("<h2>Versions and speed</h2>" + table(("", ""), [map(escape, row) for row in facts.others.items()]))
    parts.append(table(("", "training", "evaluation"), [map(escape, row) for row in facts.versions]))
    page = folder / "index.html"
    write_document(page, title, "".join(parts))
    return page


def _data(analysis: Analysis) -> str:
    annotations, point = analysis.annotations, analysis.evaluation.best_f1
    text = (
        f"{len(annotations)} images, {len(analysis.matches.objects)} objects of {annotations.num_classes} classes, "
        f"{len(analysis.matches.detections)} detections. All counts are from one matcher: a detection is a hit from an IoU of "
        f"{analysis.config.match_iou:g} with an object of its class on, and counts from the score threshold of its class on, which "
        "is that of its best F1."
    )
    if point is not None:
        text += f" With one threshold for all classes, {point.score:.3f} has the best F1, {point.f1:.3f}."
    return hint(text)


def _numbers(analysis: Analysis) -> str:
    rows = [[name, *_interval(interval)] for name, interval in analysis.intervals.items()]
    text = "The intervals hold the number of the population of images with a confidence of 95 % (bootstrap over the images)."
    return f"<h2>Metrics</h2>{table(('metric', 'value', 'from', 'to'), rows)}{hint(text)}"


def _classes(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [[cell(value) for value in row.values()] for row in rows]
    return f"<h2>Classes</h2>{table(rows[0], cells, sortable=True)}{hint('A click on a column sorts by it.')}"


def _curves(analysis: Analysis) -> str:
    labels = range(min(analysis.annotations.num_classes, 8))
    names = ["all", *(analysis.annotations.class_names[label] for label in labels)]
    curves = [curve_of(analysis.matches, None), *(curve_of(analysis.matches, label) for label in labels)]

    def lines(x: str, y: str) -> list[tuple[str, list[float], list[float]]]:
        return [(name, *_thin(curve, x, y)) for name, curve in zip(names, curves, strict=True)]

    calibration = calibrate(analysis.matches)
    filled = calibration.counts > 0
    reliability = [
        ("perfect", [0.0, 1.0], [0.0, 1.0]),
        ("measured", calibration.mean_scores[filled].tolist(), calibration.precision[filled].tolist()),
    ]
    error = calibration.expected_error
    left_out = analysis.annotations.num_classes - len(labels)
    note = f" Curves of the first {len(labels)} classes." if left_out else ""
    return (
        "<h2>Curves</h2><div class=charts>"
        + line_chart("Precision over recall", lines("recall", "precision"))
        + line_chart("F1 over the score threshold", lines("scores", "f1"))
        + line_chart("Share of hits over the score", reliability)
        + f"</div>{hint(f'Expected calibration error: {cell(error)}.{note}')}"
    )


def _thin(curve: Curve, x: str, y: str) -> tuple[list[float], list[float]]:
    count = len(curve.scores)
    places = np.unique(np.linspace(0, max(count - 1, 0), min(count, POINTS)).astype(int))
    return getattr(curve, x)[places].tolist(), getattr(curve, y)[places].tolist()


def _confusion(analysis: Analysis) -> str:
    names, matrix = [*analysis.annotations.class_names], analysis.outcomes.confusion
    if len(names) > MAX_CLASSES:
        off = matrix[:-1, :-1] - np.diag(np.diag(matrix)[:-1])
        worst = np.argsort(-off, axis=None)[:30]
        rows = [
            [escape(names[i]), escape(names[j]), int(off[i, j])]
            for i, j in zip(*np.unravel_index(worst, off.shape), strict=True)
        ]
        shown = table(("object", "detected as", "count"), [row for row in rows if row[2]])
        text = "The classes that are confused most often."
    else:
        rows = [[escape(name), *row] for name, row in zip([*names, "background"], matrix.tolist(), strict=True)]
        shown = table(("object / detected as", *names, "missed"), rows)
        text = "Rows sum to the objects, columns to the detections."
    return f"<h2>Confusion matrix</h2>{shown}{hint(text)}"


def _errors(rows: Sequence[Mapping[str, Any]], gain: str) -> str:
    tables = []
    for kind in dict.fromkeys(row["by"] for row in rows):
        mine = [row for row in rows if row["by"] == kind]
        groups, types = (dict.fromkeys(row[name] for row in mine) for name in ("group", "type"))
        cells = [
            [escape(group), *(f"{cell(row[gain])} ({row['count']})" for row in mine if row["group"] == group)]
            for group in groups
        ]
        tables.append(table((kind, *types), cells, sortable=True))
    text = (
        "AP (at the match IoU) that would be gained if all errors of a type were repaired, and their number in brackets, over detections of "
        "every score (Bolya et al., TIDE). False detections are grouped by the size and level of their box, and by "
        "the level that proposed them; missed objects by those of the object."
    )
    return f"<h2>Errors and what they cost</h2>{''.join(tables)}{hint(text)}"


def _levels(analysis: Analysis) -> str:
    levels, rows = analysis.levels, analysis.levels.counts(analysis.outcomes)
    most = max(count for row in rows for count in row.values() if isinstance(count, int))
    cells = [[value if isinstance(value, str) else bar(value, most) for value in row.values()] for row in rows]
    text = (
        "Proposed: the level of the anchor that a detection comes from. Pooled: the level that a box of its size is pooled from; "
        "objects and missed objects count there too."
    )
    parts = ["<h2>Levels of the pyramid</h2>", table(rows[0], cells), hint(text)]
    finders = levels.finders(analysis.outcomes)
    if finders is not None:
        cells = [[name, *row] for name, row in zip(levels.names, finders.tolist(), strict=True)]
        parts.append(table(("objects of", *(f"found by {name}" for name in levels.names), "missed"), cells))
        parts.append(hint("The level that proposed the hit of an object. Rows sum to the objects."))
    return "".join(parts)


def _galleries(analysis: Analysis) -> str:
    return (
        f"<h2>Worst pictures</h2>{legend()}{worst_images(analysis)}"
        f"<h2>False detections by score, with the objects that they overlap</h2>{false_detections(analysis)}"
        f"<h2>Missed objects, the largest first, with the detections that overlap them</h2>{missed_objects(analysis)}"
    )


def _write_suspects(folder: Path, analysis: Analysis, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the suspects as CSV, and their proposed boxes as COCO JSON, which labelling tools import."""
    annotations = analysis.annotations
    _write_csv(folder / "suspects.csv", rows)
    shown = {suspect.image: row["file"] for row, suspect in zip(rows, analysis.suspects, strict=True)}
    content = {
        "images": [
            {"id": int(annotations.image_ids[row]), "file_name": file}
            | {"height": int(annotations.sizes[row, 0]), "width": int(annotations.sizes[row, 1])}
            for row, file in shown.items()
        ],
        "categories": [
            {"id": number, "name": name}
            for number, name in zip(annotations.category_ids, annotations.class_names, strict=True)
        ],
        "annotations": [
            {"id": row["rank"], "image_id": row["image_id"], "category_id": annotations.category_ids[suspect.label]}
            | {"bbox": [row["x1"], row["y1"], row["x2"] - row["x1"], row["y2"] - row["y1"]], "iscrowd": 0}
            | {"area": (row["x2"] - row["x1"]) * (row["y2"] - row["y1"])}
            | {"attributes": {name: row[name] for name in ("kind", "suspicion", "annotation_id", "annotated")}}
            for row, suspect in zip(rows, analysis.suspects, strict=True)
        ],
    }
    (folder / "suspects.json").write_text(json.dumps(content), encoding="utf-8")


def _suspects(analysis: Analysis, rows: Sequence[Mapping[str, Any]]) -> str:
    text = (
        "class: detections of another class cover the object; place: the object is beside its annotation; missing: an object without "
        "annotation; unseen: no detection covers the annotation. All are in suspects.csv, and in suspects.json (COCO)."
    )
    if not rows:
        return f"<h2>Annotations that look wrong</h2><p>None.</p>{hint(text)}"
    cells = [[escape(str(value)) for value in row.values()] for row in rows[:LISTED]]
    shown = table(rows[0], cells, sortable=True, shown=UNFOLDED)
    return f"<h2>Annotations that look wrong</h2>{shown}{hint(text)}{first_suspects(analysis)}"


def _history(scalars: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    terms = [tag for tag in scalars if tag.startswith("loss/")]
    charts = {"Losses": terms, "Learning rate": ["lr"], "AP": ["AP/AP", "AP/AP50", "AP/AP75"]}
    parts = []
    for title, tags in charts.items():
        lines = [
            (
                tag.rpartition("/")[2],
                [float(step) for step, _ in scalars[tag]],
                [value for _, value in scalars[tag]],
            )
            for tag in tags
            if scalars.get(tag)
        ]
        if lines:
            parts.append(line_chart(f"{title} over the step", lines, None if title != "AP" else 1.0))
    return f"<h2>Curves of the run</h2><div class=charts>{''.join(parts)}</div>" if parts else ""


def _data_sets(facts: RunFacts) -> str:
    names = dict.fromkeys(name for summary in facts.splits.values() for name in summary)
    rows = [[escape(name), *(escape(one.get(name, "")) for one in facts.splits.values())] for name in names]
    text = ", ".join(f"{name} {count}" for name, count in facts.findings.items())
    findings = hint(f"Found by the check of the data before training: {text}.") if text else ""
    return f"<h2>Data</h2>{table(('', *facts.splits), rows)}{findings}"


def _comparison(title: str, analysis: Analysis, name: str, other: Analysis, comparison: Comparison) -> str:
    rows = [[metric, *_interval(interval, signed=True)] for metric, interval in comparison.differences.items()]
    classes = [[escape(label), *_interval(interval, signed=True)] for label, interval in comparison.per_class.items()]
    parts = [f"<h2>Against {escape(name)}</h2><p class=verdict>{escape(comparison.verdict(title, name))}</p>"]
    parts.append(table(("difference", "value", "from", "to"), rows))
    parts.append("<h3>AP of the classes</h3>" + table(("class", "difference", "from", "to"), classes, sortable=True))
    parts.append(legend())
    for better, images in ((title, comparison.gained), (name, comparison.lost)):
        parts.append(f"<h3>Pictures on which {escape(better)} makes fewer mistakes: {len(images)}</h3>")
        for row in images[: PICTURES // 3]:
            parts.append(
                gallery([draw_outcomes(analysis, row, escape(title)), draw_outcomes(other, row, escape(name))])
            )
    return "".join(parts)


def _interval(interval: Interval, signed: bool = False) -> list[str]:
    numbers = (interval.value, interval.low, interval.high)
    return ["n/a" if number is None else f"{number:+.3f}" if signed else f"{number:.3f}" for number in numbers]


def _write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with file.open("w", newline="", encoding="utf-8", errors="backslashreplace") as stream:
        writer = csv.writer(stream)
        if rows:
            writer.writerow(rows[0])
        writer.writerows(["" if value is None else value for value in row.values()] for row in rows)
