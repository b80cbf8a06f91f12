"""The extent of COCO's masks: polygons, and run-length encodings as numbers or as a string."""

from __future__ import annotations

import math
from typing import Any

from fpn_det.annotations.parsing import parse_number, parse_pixels


def mask_extent(mask: Any) -> list[float] | None:
    """Return the box x, y, width, height around a mask; None if the value is no mask or is empty.

    Args:
        mask: polygons [[x1, y1, x2, y2, ...], ...], one polygon, or {"size": [h, w], "counts": [...] or string}.
    """
    if isinstance(mask, dict):
        return _runs_extent(mask)
    if not isinstance(mask, list) or not mask:
        return None
    polygons = mask if isinstance(mask[0], list) else [mask]
    if not all(isinstance(polygon, list) and len(polygon) >= 4 and len(polygon) % 2 == 0 for polygon in polygons):
        return None
    x = [parse_number(value) for polygon in polygons for value in polygon[::2]]
    y = [parse_number(value) for polygon in polygons for value in polygon[1::2]]
    if not all(map(math.isfinite, x + y)):
        return None
    return [min(x), min(y), max(x) - min(x), max(y) - min(y)]


def _runs_extent(mask: dict[str, Any]) -> list[float] | None:
    """Extent of runs of 0 and 1 in turn, down the columns of an image of `size` (h, w)."""
    size, counts = mask.get("size"), mask.get("counts")
    height = parse_pixels(size[0]) if isinstance(size, list) and len(size) == 2 else 0
    runs = _decode_runs(counts) if isinstance(counts, str) else counts
    if not height or not isinstance(runs, list) or not all(type(run) is int and run >= 0 for run in runs):
        return None
    x1, y1, x2, y2 = math.inf, math.inf, -math.inf, -math.inf
    start = 0
    for number, run in enumerate(runs):
        stop = start + run
        if number % 2 and run:
            first_column, last_column = start // height, (stop - 1) // height
            spans_columns = first_column != last_column
            x1, x2 = min(x1, first_column), max(x2, last_column + 1)
            y1 = 0 if spans_columns else min(y1, start % height)
            y2 = height if spans_columns else max(y2, (stop - 1) % height + 1)
        start = stop
    return [float(x1), float(y1), float(x2 - x1), float(y2 - y1)] if x2 > x1 else None


def _decode_runs(text: str) -> list[int] | None:
    """Decode pycocotools' compressed counts: 5 bits a character, from the third on as the difference to two before."""
    runs: list[int] = []
    position = 0
    while position < len(text):
        value, shift, more = 0, 0, True
        while more:
            if position == len(text) or not 48 <= ord(text[position]) < 112 or shift > 60:
                return None
            bits = ord(text[position]) - 48
            value |= (bits & 0x1F) << shift
            more = bool(bits & 0x20)
            position, shift = position + 1, shift + 5
            if not more and bits & 0x10:
                value |= -1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    return runs
