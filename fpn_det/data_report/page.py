"""The data report as one self-contained HTML file: tables, charts, and images with the worst findings."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fpn_det.annotations.findings import Finding, group_by_kind
from fpn_det.data_report.anchor_coverage import AnchorCoverage
from fpn_det.data_report.report import Report, summarize
from fpn_det.image_io import read_image
from fpn_det.structures import Annotations
from fpn_det.visualization.panels import draw_boxes

LISTED = 50  # findings of a kind that the page lists
IMAGES_PER_KIND = 3
MAX_IMAGES = 24
WORST = 6  # drawn objects with the lowest IoU with any anchor
SIDE = 320  # px of the longer side of a drawn image
BINS = 32
WIDTH, HEIGHT = 640, 160  # px of a chart

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c2430; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h1 { margin-bottom: .2rem } h2 { margin-top: 2.2rem; border-bottom: 1px solid #d5dae2; padding-bottom: .2rem }
table { border-collapse: collapse; margin: .6rem 0 } td, th { padding: .15rem .8rem .15rem 0; text-align: right; vertical-align: top }
th { color: #667; font-weight: 600 } td:first-child, th:first-child, .cell { text-align: left }
.fatal, .error { color: #b3261e; font-weight: 600 } .warning { color: #9a6700; font-weight: 600 } .note { color: #33658a }
.sound { color: #1a7f37; font-weight: 600 } .bar { background: #4c8dcc; height: .8rem; display: inline-block; vertical-align: middle }
details { margin: .3rem 0 } summary { cursor: pointer } li { font-family: ui-monospace, monospace; font-size: 13px; overflow-wrap: anywhere }
figure { display: inline-block; margin: .4rem .8rem .4rem 0; width: 320px; vertical-align: top } figure img { max-width: 100% }
figcaption { font-size: 13px; overflow-wrap: anywhere } svg text { font: 11px system-ui, sans-serif; fill: #556 }
p.hint { color: #556; max-width: 50rem }
"""


def write_page(path: Path, report: Report, coverage: AnchorCoverage | None) -> None:
    """Write the page.

    Args:
        path: file to write.
        report: all splits.
        coverage: of the training set; None leaves out its charts.
    """
    verdict = f'<span class="{"sound" if report.is_sound else "error"}">{escape(report.verdict)}</span>'
    parts = [
        f"<h1>Data report</h1><p>{verdict}</p>",
        _splits(report),
        _findings(report),
        _worst(report),
        _class_counts(report),
    ]
    if coverage is not None and len(coverage.boxes):
        parts += [
            _sizes(coverage),
            _ratios(coverage),
            _levels(coverage),
            _best_anchors(report.parts["train"].annotations, coverage),
        ]
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Data report</title><style>{STYLE}</style>'
    path.write_text(f"{head}<body>{''.join(parts)}</body></html>", encoding="utf-8", errors="backslashreplace")


def _splits(report: Report) -> str:
    rows = []
    for split, part in report.parts.items():
        row = summarize(part.annotations)
        numbers = [row[name] for name in ("images", "images_without_boxes", "boxes", "crowd", "most_boxes")]
        rows.append([split, *numbers, f'<span class="note">{escape(str(row["image_with_most_boxes"]))}</span>'])
    return _table(("split", "images", "without boxes", "boxes", "crowd", "most boxes", "in"), rows)


def _findings(report: Report) -> str:
    lines = []
    for split, findings in report.findings.items():
        for kind, members in group_by_kind(findings).items():
            severity = members[0].severity
            items = "".join(f"<li>{escape(str(finding))}</li>" for finding in members[:LISTED])
            more = f"<li>... and {len(members) - LISTED} more in data_report.json</li>" if len(members) > LISTED else ""
            title = f'<span class="{severity}">{severity}</span> {split}: {escape(kind)} ({len(members)})'
            lines.append(
                f"<details{' open' if severity in ('fatal', 'error') else ''}><summary>{title}</summary><ul>{items}{more}</ul></details>"
            )
    return f"<h2>Findings</h2>{''.join(lines) or '<p>None.</p>'}"


def _worst(report: Report) -> str:
    """Draw findings that concern a box: in red the box, in the colors of their classes the other boxes of the image."""
    figures: list[str] = []
    for split, part in report.parts.items():
        row_of = {int(image_id): row for row, image_id in enumerate(part.annotations.image_ids)}
        for members in group_by_kind(
            finding for finding in report.findings[split] if finding.severity != "note"
        ).values():
            drawn = [finding for finding in members if finding.image_id in row_of][:IMAGES_PER_KIND]
            figures += [_figure_of(finding, split, part.annotations, row_of[finding.image_id]) for finding in drawn]  # type: ignore[index]
    return f"<h2>The worst findings</h2>{''.join(figures[:MAX_IMAGES])}" if figures else ""


def _figure_of(finding: Finding, split: str, annotations: Annotations, row: int) -> str:
    rows = annotations.rows(row)
    boxes, labels = annotations.boxes[rows].numpy(), annotations.labels[rows].tolist()
    caption = f'<span class="{finding.severity}">{finding.kind}</span> {split}, {escape(str(finding))}'
    return _figure(annotations, row, boxes, labels, finding.box, caption)


def _figure(
    annotations: Annotations,
    row: int,
    boxes: np.ndarray,
    labels: Sequence[int],
    marked: tuple[float, ...] | None,
    caption: str,
) -> str:
    try:
        pixels = read_image(annotations.path(row))
    except ValueError as error:
        return f"<figure><figcaption>{caption}<br>{escape(str(error))}</figcaption></figure>"
    picture = Image.fromarray(
        draw_boxes(pixels, boxes, labels, [annotations.class_names[label] for label in labels], SIDE)
    )
    if marked is not None:
        picture = _with_marked_box(picture, marked, SIDE / max(pixels.shape[:2]))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    source = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f'<figure><img alt="" src="{source}"><figcaption>{caption}</figcaption></figure>'


def _with_marked_box(picture: Image.Image, box: tuple[float, ...], scale: float) -> Image.Image:
    """Pad the image and frame the box in red; the padding shows boxes that leave the image."""
    border = SIDE // 5
    canvas = Image.new("RGB", (picture.width + 2 * border, picture.height + 2 * border), (236, 239, 244))
    canvas.paste(picture, (border, border))
    x1, y1, x2, y2 = (
        float(np.clip(value * scale + border, 4, limit - 5)) for value, limit in zip(box, canvas.size * 2, strict=True)
    )
    frame = min(x1, x2) - 3, min(y1, y2) - 3, max(x1, x2) + 3, max(y1, y2) + 3  # around the box, which may have no area
    ImageDraw.Draw(canvas).rectangle(frame, outline=(214, 40, 40), width=3)
    return canvas


def _class_counts(report: Report) -> str:
    counts = {split: summarize(part.annotations)["classes"] for split, part in report.parts.items()}
    names = list(dict.fromkeys(name for row in counts.values() for name in row))
    most = max((count for row in counts.values() for count in row.values()), default=0)
    rows = [[escape(name), *(_bar(row.get(name, 0), most) for row in counts.values())] for name in names]
    return "<h2>Boxes of each class</h2>" + _table(("class", *counts), rows)


def _bar(count: int, most: int) -> str:
    return f'<div class="cell">{count} <span class="bar" style="width:{count / max(most, 1) * 12:.2f}rem"></span></div>'


def _sizes(coverage: AnchorCoverage) -> str:
    sides = np.sqrt((coverage.boxes[:, 2:] - coverage.boxes[:, :2]).prod(axis=1))
    marks = [(np.log2(size), f"{size:g}") for size in coverage.anchor_sizes]
    chart = _histogram(np.log2(np.maximum(sides, 0.5)), marks, lambda value: f"{2**value:.0f}")
    hint = (
        "Square root of the area in the input frame, after the resizing of the evaluation, px. Dashed: the sizes of the anchors. "
        "Objects much smaller than the smallest anchor are seldom found: resize to larger sides, or set smaller model.rpn.anchors.sizes."
    )
    return f"<h2>Sizes of the boxes of the training set</h2>{chart}<p class=hint>{hint}</p>"


def _ratios(coverage: AnchorCoverage) -> str:
    sides = coverage.boxes[:, 2:] - coverage.boxes[:, :2]
    ratios = np.log2(sides[:, 1] / sides[:, 0])
    marks = [(np.log2(ratio), f"{ratio:g}") for ratio in coverage.anchor_ratios]
    hint = "Height / width. Dashed: the ratios of the anchors (model.rpn.anchors.ratios)."
    return f"<h2>Aspect ratios</h2>{_histogram(ratios, marks, lambda value: f'{2**value:.2g}')}<p class=hint>{hint}</p>"


def _levels(coverage: AnchorCoverage) -> str:
    counts = np.bincount(coverage.levels, minlength=len(coverage.level_names)).tolist()
    rows = [
        [name, _bar(count, max(counts)), f"{count / sum(counts):.1%}"]
        for name, count in zip(coverage.level_names, counts, strict=True)
    ]
    hint = "The level of the pyramid that the ROI head pools an object of this size from."
    return f"<h2>Levels of the pyramid</h2>{_table(('level', 'objects', 'share'), rows)}<p class=hint>{hint}</p>"


def _best_anchors(annotations: Annotations, coverage: AnchorCoverage) -> str:
    marks = [
        (coverage.positive_iou, f"positive from {coverage.positive_iou:g}"),
        (coverage.negative_iou, f"background below {coverage.negative_iou:g}"),
    ]
    chart = _histogram(coverage.ious, marks, lambda value: f"{value:.1f}")
    owners = annotations.image_of_boxes.numpy()
    figures = []
    for index in np.argsort(coverage.ious, kind="stable")[:WORST].tolist():
        object_row = int(coverage.rows[index])
        row, box = int(owners[object_row]), annotations.boxes[object_row].numpy()
        width, height = coverage.boxes[index, 2:] - coverage.boxes[index, :2]
        caption = (
            f"IoU {coverage.ious[index]:.2f}: {escape(annotations.class_names[int(annotations.labels[object_row])])}, "
            f"{width:.0f} x {height:.0f} px in the input frame; image {int(annotations.image_ids[row])} "
            f"({escape(annotations.path(row).name)}), annotation {int(annotations.annotation_ids[object_row])}"
        )
        figures.append(_figure(annotations, row, box[None], [int(annotations.labels[object_row])], None, caption))
    hint = (
        f"IoU of every object with its best anchor. Objects below {coverage.positive_iou:g} are learned from their best anchors only, "
        f"if the matcher allows low-quality matches; that is common. {coverage.num_below_negative} objects are below "
        f"{coverage.negative_iou:g}, where anchors are negative: other model.rpn.anchors.sizes or ratios would help. The worst:"
    )
    title = f"<h2>Objects and their best anchors: {coverage.num_below_positive} of {len(coverage.ious)} below {coverage.positive_iou:g}</h2>"
    return f"{title}{chart}<p class=hint>{hint}</p>{''.join(figures)}"


def _histogram(values: np.ndarray, marks: Sequence[tuple[float, str]], label: Callable[[float], str]) -> str:
    """An SVG histogram with dashed lines at `marks` (value, text). `label` formats the ticks of the axis."""
    ends = [*values.tolist(), *(value for value, _ in marks)]
    low, high = min(ends), max(ends)
    pad = (high - low) * 0.03 or 0.5
    counts, edges = np.histogram(values, BINS, (low - pad, high + pad))
    most, span = max(counts.max(), 1), edges[-1] - edges[0]
    bars = "".join(
        f'<rect x="{position * WIDTH / BINS + 1:.1f}" y="{20 + HEIGHT * (1 - count / most):.1f}" width="{WIDTH / BINS - 2:.1f}" '
        f'height="{HEIGHT * count / most:.1f}" fill="#4c8dcc"><title>{count}</title></rect>'
        for position, count in enumerate(counts.tolist())
    )
    lines = "".join(_mark((value - edges[0]) / span * WIDTH, text) for value, text in marks)
    ticks = "".join(_tick(part * WIDTH / 8, label(edges[0] + span * part / 8)) for part in range(9))
    return f'<svg viewBox="-20 0 {WIDTH + 40} {HEIGHT + 40}" width="{WIDTH + 40}" role="img">{bars}{lines}{ticks}</svg>'


def _mark(x: float, text: str) -> str:
    line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="16" y2="{20 + HEIGHT}" stroke="#b3261e" stroke-dasharray="4 3"/>'
    anchor = "start" if x < 60 else "end" if x > WIDTH - 60 else "middle"
    return f'{line}<text x="{x:.1f}" y="12" text-anchor="{anchor}">{escape(text)}</text>'


def _tick(x: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{HEIGHT + 34}" text-anchor="middle">{escape(text)}</text>'


def _table(names: Iterable[str], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
