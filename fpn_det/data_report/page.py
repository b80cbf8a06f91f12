"""The data report as one self-contained HTML file: the verdict, pictures, the worst findings, tables and charts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fpn_det.annotations.findings import group_by_kind
from fpn_det.data_report.anchor_coverage import AnchorCoverage
from fpn_det.data_report.report import Repair, Report, count_classes, summarize
from fpn_det.image_io import read_for_display
from fpn_det.pages.charts import bar, bars_are_log, coverage_map, histogram, linear_ticks, log_ticks, map_image
from fpn_det.pages.document import figure, folded, gallery, hint, keys, picture, table, write_document
from fpn_det.structures import Annotations
from fpn_det.visualization.panels import class_color, draw_boxes

LISTED = 50  # findings of a kind that the page lists
RANDOM = 12  # pictures of the training set
IMAGES_PER_KIND = 3
MAX_IMAGES = 24
WORST = 6  # drawn objects with the lowest IoU with any anchor
SIDE = 320  # px of the longer side of a small picture
FULL_SIDE = 1000  # of a picture at full size, at most
TINY = 32  # px; an object that is drawn smaller has a zoomed crop beside its picture
CROP = 280  # px of the side of a crop
LEAST_VIEW = 32  # px of the image that a crop shows at least
UNFOLDED = 20  # classes
SIZES = 8  # of images that are listed
ONE_LEVEL = 0.95  # part of the objects in one level that is worth a remark
COMMON = 0.1  # part of the objects all of whose anchors are negative that is worth a remark
RED = (214, 40, 40)


def write_page(path: Path, report: Report, repair: Repair | None, coverage: AnchorCoverage | None) -> None:
    """Write the page.

    Args:
        path: file to write.
        report: all splits.
        repair: the way out of faults.
        coverage: of the training set; None leaves out its charts.
    """
    parts = [_verdict(report, repair)]
    train = report.parts["train"].annotations if "train" in report.parts else None
    if train is not None:
        parts.append(_random_pictures(train, report.max_pixels))
    parts += [_worst(report), _findings(report), _splits(report), _class_counts(report), _image_sizes(report)]
    if train is not None and len(train.boxes):
        parts.append(_places(train))
    if train is not None and coverage is not None and len(coverage.boxes):
        parts += [_sizes(coverage), _ratios(coverage), _levels(coverage)]
        parts.append(_best_anchors(train, coverage, report.max_pixels))
    write_document(path, "Data report", "".join(parts))


def _verdict(report: Report, repair: Repair | None) -> str:
    counts = ", ".join(f"{len(part.annotations)} images of {split}" for split, part in report.parts.items())
    color = "sound" if report.is_sound else "error"
    lines = [
        f'<h1>Data report</h1><p class="verdict {color}">{escape(report.verdict)}</p><p>{counts or "No split"} read.</p>'
    ]
    if repair is not None:
        lines.append(f"<p>The way out:</p><pre>{escape(repair.command)}</pre><p>{escape(repair.effect)}</p>")
    elif not report.is_sound:
        lines.append("<p>No setting repairs this: correct the files named under Findings.</p>")
    return "".join(lines)


def _splits(report: Report) -> str:
    rows, fullest = [], []
    for split, part in report.parts.items():
        row = summarize(part.annotations)
        rows.append(
            [split, *(row[name] for name in ("images", "images_without_boxes", "boxes", "crowd", "most_boxes"))]
        )
        if row["most_boxes"]:
            fullest.append(f"{Path(row['image_with_most_boxes']).name} ({split})")
    names = hint(f"Most boxes: {', '.join(fullest)}.") if fullest else ""
    return f"<h2>Splits</h2>{table(('split', 'images', 'empty', 'boxes', 'crowd', 'most'), rows)}{names}"


def _findings(report: Report) -> str:
    lines = []
    for split, findings in report.findings.items():
        for kind, members in group_by_kind(findings).items():
            severity = members[0].severity
            items = "".join(f"<li>{escape(str(finding))}</li>" for finding in members[:LISTED])
            more = f"<li>... and {len(members) - LISTED} more in data_report.json</li>" if len(members) > LISTED else ""
            title = f'<span class="{severity}">{severity}</span> {split}: {escape(kind)} ({len(members)})'
            lines.append(folded(title, f"<ul>{items}{more}</ul>", severity in ("fatal", "error")))
    return f"<h2>Findings</h2>{''.join(lines) or '<p>None.</p>'}"


def _random_pictures(annotations: Annotations, max_pixels: int) -> str:
    rows = np.random.default_rng(0).permutation(len(annotations))[:RANDOM].tolist()
    figures, labels = [], set()
    for row in rows:
        objects = annotations.rows(row)
        labels |= set(annotations.labels[objects].tolist())
        caption = f"{escape(annotations.path(row).name)}: {objects.stop - objects.start} boxes"
        figures.append(_small_figure(annotations, row, np.arange(objects.start, objects.stop), caption, max_pixels))
    legend = keys((annotations.class_names[label], f"rgb{class_color(label)}") for label in sorted(labels))
    return f"<h2>{len(rows)} random pictures of the training set</h2>{legend}{gallery(figures)}"


def _small_figure(annotations: Annotations, row: int, objects: np.ndarray, caption: str, max_pixels: int) -> str:
    """A small picture with objects in the colors of their classes; no text hides them."""
    try:
        pixels = read_for_display(annotations.path(row), max_pixels)
    except ValueError as error:
        return figure("", f"{caption}<br>{escape(str(error))}")
    labels = annotations.labels[objects].tolist()
    drawn = draw_boxes(pixels, annotations.boxes[objects].numpy(), labels, [""] * len(labels), SIDE)
    return figure(picture(drawn, annotations.path(row).name), caption)


def _worst(report: Report) -> str:
    """Draw findings that concern a box: in red the box, in the colors of their classes the other boxes of the image."""
    figures: list[str] = []
    for split, part in report.parts.items():
        row_of = {int(image_id): row for row, image_id in enumerate(part.annotations.image_ids)}
        for members in group_by_kind(
            finding for finding in report.findings[split] if finding.severity != "note"
        ).values():
            drawn = [finding for finding in members if finding.image_id in row_of][:IMAGES_PER_KIND]
            for finding in drawn:
                caption = f'<span class="{finding.severity}">{finding.kind}</span> {split}, {escape(str(finding))}'
                row = row_of[finding.image_id]  # type: ignore[index]
                figures.append(_full_figure(part.annotations, row, finding.box, caption, report.max_pixels))
    return f"<h2>The worst findings</h2>{''.join(figures[:MAX_IMAGES])}" if figures else ""


def _full_figure(
    annotations: Annotations, row: int, marked: Sequence[float] | None, caption: str, max_pixels: int
) -> str:
    """A picture at its own size with all its boxes, one of them in red; a tiny one has a zoomed crop beside it."""
    try:
        pixels = read_for_display(annotations.path(row), max_pixels)
    except ValueError as error:
        return figure("", f"{caption}<br>{escape(str(error))}")
    rows = annotations.rows(row)
    boxes, labels = annotations.boxes[rows].numpy(), annotations.labels[rows].tolist()
    side = min(max(*pixels.shape[:2], SIDE), FULL_SIDE)
    scale = side / max(pixels.shape[:2])
    image = Image.fromarray(draw_boxes(pixels, boxes, labels, [""] * len(labels), side))
    pictures = []
    if marked is not None:
        image = _with_marked_box(image, marked, scale)
        if max(abs(marked[2] - marked[0]), abs(marked[3] - marked[1])) * scale < TINY:
            pictures.append(picture(np.asarray(_zoomed(pixels, marked)), "the object, enlarged"))
    whole = picture(np.asarray(image), annotations.path(row).name)
    return figure(f'<div class="pictures">{whole}{"".join(pictures)}</div>', caption)


def _with_marked_box(image: Image.Image, box: Sequence[float], scale: float) -> Image.Image:
    """Frame the box in red; a border is added if the box leaves the image."""
    width, height = image.size
    x1, y1, x2, y2 = (value * scale for value in box)
    leaves = min(x1, x2, y1, y2) < -1 or max(x1, x2) > width + 1 or max(y1, y2) > height + 1
    border = max(image.size) // 8 if leaves else 0
    canvas = Image.new("RGB", (width + 2 * border, height + 2 * border), (236, 239, 244))
    canvas.paste(image, (border, border))
    x1, y1, x2, y2 = (
        float(np.clip(value + border, 4, limit - 5))
        for value, limit in zip((x1, y1, x2, y2), canvas.size * 2, strict=True)
    )
    frame = min(x1, x2) - 5, min(y1, y2) - 5, max(x1, x2) + 5, max(y1, y2) + 5  # around the box, which may have no area
    ImageDraw.Draw(canvas).rectangle(frame, outline=RED, width=3)
    return canvas


def _zoomed(pixels: np.ndarray, box: Sequence[float]) -> Image.Image:
    """The surroundings of a box, enlarged pixel by pixel; the box in red."""
    side = max(3 * abs(box[2] - box[0]), 3 * abs(box[3] - box[1]), LEAST_VIEW)
    height, width = pixels.shape[:2]
    x = float(np.clip((box[0] + box[2]) / 2, 0, width)) - side / 2
    y = float(np.clip((box[1] + box[3]) / 2, 0, height)) - side / 2
    view = (x, y, x + side, y + side)
    crop = Image.fromarray(pixels).transform((CROP, CROP), Image.Transform.EXTENT, view, Image.Resampling.NEAREST)
    x1, y1, x2, y2 = ((value - start) * CROP / side for value, start in zip(box, (x, y, x, y), strict=True))
    frame = min(x1, x2) - 2, min(y1, y2) - 2, max(x1, x2) + 2, max(y1, y2) + 2
    ImageDraw.Draw(crop).rectangle(frame, outline=RED, width=2)
    return crop


def _class_counts(report: Report) -> str:
    counts = count_classes(report)
    numbers = [count for row in counts.values() for count in row]
    most, log = max(numbers, default=0), bars_are_log(numbers)
    rows = [[escape(name), *(bar(count, most, log) for count in row)] for name, row in counts.items()]
    names = ("class", *report.parts)
    scale = hint("The bars are on a logarithmic scale.") if log else ""
    return f"<h2>Boxes of each class</h2>{scale}{table(names, rows, shown=UNFOLDED)}"


def _image_sizes(report: Report) -> str:
    sizes = {split: part.annotations.sizes.numpy() for split, part in report.parts.items() if len(part.annotations)}
    if not sizes:
        return ""
    together = np.concatenate(list(sizes.values()))
    distinct, counts = np.unique(together, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    rows = []
    for height, width in distinct[order[:SIZES]].tolist():
        numbers = [int((split == (height, width)).all(axis=1).sum()) for split in sizes.values()]
        rows.append([f"{width} x {height}", *(bar(number, int(counts.max())) for number in numbers)])
    (low_height, low_width), (high_height, high_width) = together.min(axis=0).tolist(), together.max(axis=0).tolist()
    more = f"{len(order) - SIZES} more sizes; widths" if len(order) > SIZES else "Widths"
    text = f"{more} are from {low_width} to {high_width} px, heights from {low_height} to {high_height} px."
    return f"<h2>Sizes of the images</h2>{table(('width x height', *sizes), rows)}{hint(text)}"


def _places(annotations: Annotations) -> str:
    owners = annotations.image_of_boxes.numpy()
    share, _ = coverage_map(annotations.boxes.numpy(), annotations.sizes.numpy()[owners])
    text = (
        f"All images of the training set on top of each other. At the darkest place {share.max():.1%} of the boxes cover the image, "
        f"at the lightest {share.min():.1%}."
    )
    return f"<h2>Places of the boxes</h2>{map_image(share)}{hint(text)}"


def _of_view(coverage: AnchorCoverage) -> str:
    """The part of the views that the coverage is of; empty if there are no others."""
    return "" if coverage.tile is None else " in whole images, without tiles"


def _sizes(coverage: AnchorCoverage) -> str:
    sides = np.sqrt((coverage.boxes[:, 2:] - coverage.boxes[:, :2]).prod(axis=1))
    marks = [(size, f"{size:g}") for size in coverage.anchor_sizes]
    text = (
        f"Square root of the area in the input frame{_of_view(coverage)}, after the resizing of the evaluation, px. "
        "Dashed: the sizes of the anchors."
    )
    smaller = float((sides < min(coverage.anchor_sizes) / 2).mean())
    if smaller > COMMON and coverage.tile is None:  # tiles show objects larger
        text += (
            f" {smaller:.0%} of the objects have less than half the side of the smallest anchor and are seldom found: resize to larger "
            "sides (data.train_transforms.resize.sides, data.eval_transforms.resize.sides), or set smaller model.rpn.anchors.sizes."
        )
    chart = histogram(np.maximum(sides, 0.7), marks, log_ticks, log=True)
    return f"<h2>Sizes of the boxes of the training set</h2>{chart}{hint(text)}"


def _ratios(coverage: AnchorCoverage) -> str:
    sides = coverage.boxes[:, 2:] - coverage.boxes[:, :2]
    marks = [(ratio, f"{ratio:g}") for ratio in coverage.anchor_ratios]
    text = "Height / width. Dashed: the ratios of the anchors (model.rpn.anchors.ratios)."
    chart = histogram(sides[:, 1] / sides[:, 0], marks, log_ticks, log=True)
    return f"<h2>Aspect ratios</h2>{chart}{hint(text)}"


def _levels(coverage: AnchorCoverage) -> str:
    counts = np.bincount(coverage.levels, minlength=len(coverage.level_names))
    share, most = counts / counts.sum(), int(counts.argmax())
    rows = [
        [name, bar(int(count), int(counts.max())), f"{part:.1%}"]
        for name, count, part in zip(coverage.level_names, counts, share, strict=True)
    ]
    text = f"The level of the pyramid that the ROI head pools an object of this size from{_of_view(coverage)}."
    if len(counts) > 1 and share[most] >= ONE_LEVEL and coverage.tile is None:  # tiles are pooled from higher levels
        text += f" {share[most]:.1%} of the objects are in {coverage.level_names[most]}: the ROI head hardly uses the other levels."
        if most == 0:
            text += " Larger sides of the images (data.train_transforms.resize.sides, data.eval_transforms.resize.sides) spread them."
    return f"<h2>Levels of the pyramid</h2>{table(('level', 'objects', 'share'), rows)}{hint(text)}"


def _best_anchors(annotations: Annotations, coverage: AnchorCoverage, max_pixels: int) -> str:
    marks = [
        (coverage.positive_iou, f"positive from {coverage.positive_iou:g}"),
        (coverage.negative_iou, f"background below {coverage.negative_iou:g}"),
    ]
    chart = histogram(coverage.ious, marks, linear_ticks)
    owners = annotations.image_of_boxes.numpy()
    figures = []
    for index in np.argsort(coverage.ious, kind="stable")[:WORST].tolist():
        object_row = int(coverage.rows[index])
        row, box = int(owners[object_row]), annotations.boxes[object_row].tolist()
        width, height = coverage.boxes[index, 2:] - coverage.boxes[index, :2]
        caption = (
            f"IoU {coverage.ious[index]:.2f}: {escape(annotations.class_names[int(annotations.labels[object_row])])}, "
            f"{width:.0f} x {height:.0f} px in the input frame; image {int(annotations.image_ids[row])} "
            f"({escape(annotations.path(row).name)}), annotation {int(annotations.annotation_ids[object_row])}"
        )
        figures.append(_full_figure(annotations, row, box, caption, max_pixels))
    title = f"<h2>Objects and their best anchors: {coverage.num_below_positive} of {len(coverage.ious)} below {coverage.positive_iou:g}</h2>"
    shown = folded(f"The {len(figures)} objects with the worst anchors", "".join(figures))
    return f"{title}{chart}{hint(anchor_advice(coverage))}{shown}"


def anchor_advice(coverage: AnchorCoverage) -> str:
    """The sentences about objects without a positive anchor, with the setting that helps if one of those tried does."""
    below, count = coverage.num_below_positive, len(coverage.ious)
    text = (
        f"Of {count} objects{_of_view(coverage)}, {below} meet no anchor with IoU {coverage.positive_iou:g}, and "
        f"{coverage.num_below_negative} none with IoU {coverage.negative_iou:g}."
    )
    if below:
        text += " They are learned from their best anchor only, which is common and works for most of them."
    if coverage.advice is not None:
        cost = f", with {coverage.advice.more_anchors} times the anchors" if coverage.advice.more_anchors > 1 else ""
        text += f" {coverage.advice.setting} leaves {coverage.advice.below_positive:.0%} in place of {below / count:.0%}{cost}."
    elif below and coverage.tile is None:
        text += " Other sizes of the anchors were tried and do not fit clearly better."
    return f"{text} {coverage.size_advice}" if coverage.size_advice else text
