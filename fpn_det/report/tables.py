"""Tables of the report, as rows of plain values by column name: what its CSV files contain and its page shows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpn_det.evaluation.bootstrap import Interval
from fpn_det.evaluation.coco import mean_of_defined
from fpn_det.evaluation.detection_table import xyxy_to_xywh
from fpn_det.evaluation.error_types import MISSED, TYPES
from fpn_det.locations import below_common_folder
from fpn_det.report.analysis import Analysis

Rows = list[dict[str, Any]]


def class_rows(analysis: Analysis) -> Rows:
    """Metrics and counts of each class at the score threshold of its best F1."""
    matrix, rows = analysis.outcomes.confusion, []
    for label, (name, row) in enumerate(analysis.evaluation.per_class.items()):
        ap = Interval.of(row["AP"], analysis.resampled.per_class[name]["AP"])
        objects, found, hits = int(matrix[label].sum()), int(matrix[:, label].sum()), int(matrix[label, label])
        rows.append(
            {"class": name, "AP": row["AP"], "AP from": ap.low, "AP to": ap.high, "AP50": row["AP50"], "AR": row["AR"]}
            | {"F1": row["F1"], "score threshold": row["score"], "precision": hits / found if found else None}
            | {"recall": hits / objects if objects else None, "objects": objects, "detections": found, "hits": hits}
            | {"false": found - hits, "missed": objects - hits}
        )
    return rows


def error_rows(analysis: Analysis) -> Rows:
    """Number and cost of each error type: over all, by size, by level and by class. Missed objects have no level that proposed them."""
    errors, matches, levels = analysis.errors, analysis.matches, analysis.levels
    areas = xyxy_to_xywh(analysis.evaluation.detections.boxes[matches.detections])[:, 2:].prod(axis=1)
    object_areas = analysis.annotations.area.numpy()[matches.objects]
    every = np.ones(len(areas), bool), np.ones(len(object_areas), bool)
    groups = [("all", "all", *every)]
    for name, (low, high) in analysis.config.area_ranges.items():
        groups.append(("size", name, (areas >= low) & (areas < high), (object_areas >= low) & (object_areas < high)))
    groups += [("level", name, levels.detections == k, levels.objects == k) for k, name in enumerate(levels.names)]
    if levels.proposals is not None:
        groups += [("proposed by", name, levels.proposals == k, ~every[1]) for k, name in enumerate(levels.names)]
    rows: Rows = []
    gain = gain_column(analysis)

    def add(kind: str, name: str, costs: NDArray, detections: NDArray[np.bool_], objects: NDArray[np.bool_]) -> None:
        """Add rows of a group, whose repair gains `costs` [6, K]."""
        counts = np.bincount(errors.types[detections & (errors.types >= 0)], minlength=len(TYPES))
        counts[MISSED] = (errors.missed & objects).sum()
        for number, error in enumerate(TYPES):
            if kind != "proposed by" or number != MISSED:
                row = {"by": kind, "group": name, "type": error, "count": int(counts[number])}
                rows.append(row | {gain: mean_of_defined(costs[number])})

    for kind, name, detections, objects in groups:
        add(kind, name, errors.costs(detections, objects), detections, objects)
    costs = errors.costs()
    for label, name in enumerate(analysis.annotations.class_names):
        mine = matches.detection_labels == label, matches.object_labels == label
        add("class", name, costs[:, label : label + 1], *mine)
    return rows


def gain_column(analysis: Analysis) -> str:
    """The name of the column of the AP that a repair gains, `AP50 gained`: it is that at the match IoU."""
    return f"AP{100 * analysis.config.match_iou:g} gained"


def suspect_rows(analysis: Analysis) -> Rows:
    """Annotations that look wrong, with the ids of the data set, the most suspicious first."""
    annotations, rows = analysis.annotations, []
    files = below_common_folder([annotations.path(image) for image in range(len(annotations))])
    for rank, suspect in enumerate(analysis.suspects, start=1):
        x1, y1, x2, y2 = (round(value, 1) for value in suspect.box)
        is_new = suspect.annotation is None
        annotated = "" if is_new else annotations.class_names[int(annotations.labels[suspect.annotation])]
        rows.append(
            {"rank": rank, "suspicion": round(suspect.suspicion, 4), "kind": suspect.kind}
            | {"image_id": int(annotations.image_ids[suspect.image]), "file": str(files[suspect.image])}
            | {"annotation_id": "" if is_new else int(annotations.annotation_ids[suspect.annotation])}
            | {"annotated": annotated, "proposed": annotations.class_names[suspect.label]}
            | {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
        )
    return rows
