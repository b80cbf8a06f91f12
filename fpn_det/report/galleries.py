"""Pictures of the report: the worst images, false detections, missed objects, and annotations that look wrong."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from fpn_det.evaluation.outcomes import FALSE, HIT, IGNORED_KIND, MISSED, OUTCOME_NAMES
from fpn_det.image_io import read_for_display
from fpn_det.pages.document import figure, gallery, keys, picture
from fpn_det.report.analysis import Analysis, mistakes
from fpn_det.visualization.panels import OUTCOME_COLORS, draw_boxes

SIDE = 320  # px of the longer side of a picture
PICTURES = 12  # of a gallery


def legend() -> str:
    """The meaning of the colors of boxes."""
    shown = list(zip(OUTCOME_NAMES, OUTCOME_COLORS, strict=True))[:IGNORED_KIND]
    return keys((name, f"rgb{color}") for name, color in shown)


def worst_images(analysis: Analysis) -> str:
    """Images with the most mistakes."""
    count = mistakes(analysis)
    worst = [row for row in np.argsort(-count, kind="stable")[:PICTURES].tolist() if count[row]]
    return gallery([draw_outcomes(analysis, row, f"{count[row]} mistakes") for row in worst])


def false_detections(analysis: Analysis) -> str:
    """False detections by score, with the objects that they overlap."""
    matches, outcomes, annotations = analysis.matches, analysis.outcomes, analysis.annotations
    false = np.flatnonzero(outcomes.shown & ~outcomes.is_hit)
    false = false[np.argsort(-matches.scores[false], kind="stable")][:PICTURES]
    boxes, figures = annotations.boxes.numpy()[matches.objects], []
    for index in false.tolist():
        image = matches.detection_images[index]
        box = analysis.evaluation.detections.boxes[matches.detections[index]]
        near = np.flatnonzero((matches.object_images == image) & _overlaps(boxes, box)).tolist()
        name = annotations.class_names[matches.detection_labels[index]]
        ids = annotations.annotation_ids[matches.objects[near]].tolist()
        caption = f"{escape(name)} {matches.scores[index]:.2f}" + (f", over annotation {str(ids)[1:-1]}" if ids else "")
        figures.append(draw_outcomes(analysis, int(matches.images[image]), caption, [index], near))
    return gallery(figures)


def missed_objects(analysis: Analysis) -> str:
    """Missed objects, the largest first, with the shown detections that overlap them."""
    matches, outcomes, annotations = analysis.matches, analysis.outcomes, analysis.annotations
    missed = np.flatnonzero(~outcomes.is_found)
    missed = missed[np.argsort(-annotations.area.numpy()[matches.objects[missed]], kind="stable")][:PICTURES]
    boxes, figures = analysis.evaluation.detections.boxes[matches.detections], []
    for index in missed.tolist():
        row, image = int(matches.objects[index]), matches.object_images[index]
        is_near = (
            outcomes.shown & (matches.detection_images == image) & _overlaps(boxes, annotations.boxes[row].numpy())
        )
        name = annotations.class_names[matches.object_labels[index]]
        caption = f"{escape(name)}, annotation {int(annotations.annotation_ids[row])}"
        near = np.flatnonzero(is_near).tolist()
        figures.append(draw_outcomes(analysis, int(matches.images[image]), caption, near, [index]))
    return gallery(figures)


def first_suspects(analysis: Analysis) -> str:
    """The most suspicious annotations, as they are and as the detector proposes."""
    annotations, figures = analysis.annotations, []
    for rank, suspect in enumerate(analysis.suspects[:PICTURES], start=1):
        drawn = []
        if suspect.kind != "unseen":
            drawn.append((suspect.box, FALSE, annotations.class_names[suspect.label]))
        if (row := suspect.annotation) is not None:
            name = annotations.class_names[int(annotations.labels[row])]
            drawn.append((tuple(annotations.boxes[row].tolist()), MISSED, name))
        figures.append(_draw(analysis, suspect.image, f"{rank}. {suspect.kind}", *zip(*drawn, strict=True)))
    colors = (("proposed by the detector", FALSE), ("annotated", MISSED))
    return keys((name, f"rgb{OUTCOME_COLORS[kind]}") for name, kind in colors) + gallery(figures)


def draw_outcomes(
    analysis: Analysis,
    row: int,
    caption: str,
    detections: Sequence[int] | None = None,
    objects: Sequence[int] | None = None,
) -> str:
    """Draw an image with its shown detections and missed objects, or with some of them."""
    matches, outcomes, names = analysis.matches, analysis.outcomes, analysis.annotations.class_names
    if detections is None:
        detections = np.flatnonzero(outcomes.shown & (matches.images[matches.detection_images] == row)).tolist()
    if objects is None:
        objects = np.flatnonzero((outcomes.detection_of < 0) & (matches.images[matches.object_images] == row)).tolist()
    boxes = [analysis.evaluation.detections.boxes[matches.detections[index]].tolist() for index in detections]
    boxes += [analysis.annotations.boxes[int(matches.objects[index])].tolist() for index in objects]
    kinds = [int(outcomes.detection_kinds[index]) for index in detections]
    kinds += [int(outcomes.object_kinds[index]) for index in objects]
    texts = [f"{names[matches.detection_labels[index]]} {matches.scores[index]:.2f}" for index in detections]
    texts += [names[matches.object_labels[index]] for index in objects]
    shown = ["" if kind == HIT else text for kind, text in zip(kinds, texts, strict=True)]
    return _draw(analysis, row, caption, boxes, kinds, shown)


def _draw(
    analysis: Analysis,
    row: int,
    caption: str,
    boxes: Sequence[Sequence[float]],
    kinds: Sequence[int],
    texts: Sequence[str],
) -> str:
    path = analysis.annotations.path(row)
    try:
        pixels = read_for_display(path, analysis.max_pixels)
    except ValueError as error:
        return figure("", f"{caption}<br>{escape(str(error))}")
    drawn = draw_boxes(pixels, np.array(boxes, np.float64).reshape(-1, 4), kinds, texts, SIDE, OUTCOME_COLORS)
    text = f"{caption}<br>{escape(path.name)}, image {int(analysis.annotations.image_ids[row])}"
    return figure(picture(drawn, path.name), text)


def _overlaps(boxes: NDArray, box: NDArray) -> NDArray[np.bool_]:
    """Compare boxes [N, 4] with one [4]: bool [N], a common area."""
    return np.logical_and.reduce((boxes[:, :2] < box[2:]) & (boxes[:, 2:] > box[:2]), axis=1)
