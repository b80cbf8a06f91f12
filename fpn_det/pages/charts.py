"""Charts as SVG and HTML: lines and histograms with round ticks, bars, a map."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

import numpy as np

from fpn_det.pages.document import keys, picture

BINS = 32
WIDTH, HEIGHT = 640, 160  # px of a histogram
LINES = 400, 240  # px, width and height of a chart of lines
MARGIN = 48  # px left of it, for numbers such as 0.0008
LOG_FROM = 100  # bars are on a log scale if the largest count is this many times the smallest
CELLS = 48  # of the longer side of a map


def histogram(
    values: np.ndarray,
    marks: Sequence[tuple[float, str]],
    ticks: Callable[[float, float], list[float]],
    log: bool = False,
) -> str:
    """An SVG histogram with dashed lines at `marks` (value, text).

    Args:
        values: [n].
        marks: drawn over the bars.
        ticks: from the ends of the axis to the values that are written below it.
        log: the axis is logarithmic.
    """
    scale = np.log2 if log else np.asarray
    ends = scale(np.array([*values.tolist(), *(value for value, _ in marks)], dtype=float))
    low, high = float(ends.min()), float(ends.max())
    pad = (high - low) * 0.03 or 0.5
    counts, edges = np.histogram(scale(values), BINS, (low - pad, high + pad))
    most, span = max(counts.max(), 1), edges[-1] - edges[0]

    def place(value: float) -> float:
        return float((scale(np.float64(value)) - edges[0]) / span * WIDTH)

    bars = "".join(
        f'<rect x="{position * WIDTH / BINS + 1:.1f}" y="{20 + HEIGHT * (1 - count / most):.1f}" width="{WIDTH / BINS - 2:.1f}" '
        f'height="{HEIGHT * count / most:.1f}" fill="var(--accent)"><title>{count}</title></rect>'
        for position, count in enumerate(counts.tolist())
    )
    lines = "".join(_mark(place(value), text) for value, text in marks)
    first, last = (2 ** edges[0], 2 ** edges[-1]) if log else (edges[0], edges[-1])
    texts = "".join(_tick(place(value), f"{value:.4g}") for value in ticks(float(first), float(last)))
    return f'<svg class="histogram" viewBox="-20 0 {WIDTH + 40} {HEIGHT + 40}" width="{WIDTH + 40}" role="img">{bars}{lines}{texts}</svg>'


def line_chart(
    title: str, lines: Sequence[tuple[str, Sequence[float], Sequence[float]]], top: float | None = 1.0
) -> str:
    """An SVG chart of lines with its title above and its legend below.

    Args:
        title: of the chart.
        lines: name, x and y of each. A line of one point is drawn as a dot.
        top: of the y axis, which starts at 0; None is the largest value.
    """
    (width, height), right = LINES, max([1e-9, *(x for _, xs, _ in lines for x in xs)])
    right = 1.0 if right <= 1 else right
    top = top or max([1e-9, *(y for _, _, ys in lines for y in ys if math.isfinite(y))])
    shapes, colors = [], []
    for number, (name, xs, ys) in enumerate(lines):
        color = f"hsl({number * 137.5 % 360:.0f} 60% 50%)"
        places = [
            (MARGIN + x / right * width, 10 + (1 - y / top) * height)
            for x, y in zip(xs, ys, strict=True)
            if math.isfinite(y)
        ]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        shapes.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.6"/>')
        if len(places) == 1:
            shapes.append(f'<circle cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3" fill="{color}"/>')
        colors.append((name, color))
    below = "".join(
        f'<text x="{MARGIN + width * tick / right:.0f}" y="{height + 26}" text-anchor="middle">{tick:g}</text>'
        for tick in linear_ticks(0, right, 5)
    )
    beside = "".join(
        f'<text x="{MARGIN - 6}" y="{14 + height * (1 - tick / top):.0f}" text-anchor="end">{tick:g}</text>'
        for tick in linear_ticks(0, top, 5)
    )
    frame = f'<rect x="{MARGIN}" y="10" width="{width}" height="{height}" fill="none" stroke="var(--line)"/>'
    svg = f'<svg viewBox="0 0 {width + MARGIN + 20} {height + 36}" role="img" aria-label="{escape(title)}">'
    return f"<div><h3>{escape(title)}</h3>{svg}{frame}{''.join(shapes)}{below}{beside}</svg>{keys(colors)}</div>"


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of two in the range; in a narrow one round numbers in even steps."""
    powers = [2.0**power for power in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
    return powers if len(powers) >= 3 else linear_ticks(low, high)


def linear_ticks(low: float, high: float, steps: int = 10) -> list[float]:
    """At most `steps` + 1 multiples of 1, 2 or 5 times a power of ten in the range."""
    size = 10 ** math.floor(math.log10((high - low) / steps))
    step = next(size * factor for factor in (1, 2, 5, 10) if (high - low) / (size * factor) <= steps)
    return [round(step * number, 12) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _mark(x: float, text: str) -> str:
    line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="16" y2="{20 + HEIGHT}" stroke="var(--bad)" stroke-dasharray="4 3"/>'
    anchor = "start" if x < 60 else "end" if x > WIDTH - 60 else "middle"
    return f'{line}<text x="{x:.1f}" y="12" text-anchor="{anchor}">{escape(text)}</text>'


def _tick(x: float, text: str) -> str:
    line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{20 + HEIGHT}" y2="{24 + HEIGHT}" stroke="var(--soft)"/>'
    return f'{line}<text x="{x:.1f}" y="{HEIGHT + 36}" text-anchor="middle">{escape(text)}</text>'


def bars_are_log(counts: Iterable[int]) -> bool:
    """True if bars on a linear scale would hide the smaller counts."""
    positive = [count for count in counts if count]
    return bool(positive) and max(positive) >= LOG_FROM * min(positive)


def bar(count: int, most: int, log: bool = False) -> str:
    """A count with a bar whose full length stands for `most`."""
    share = math.log1p(count) / math.log1p(most) if log and most else count / max(most, 1)
    return f'<span class="count">{count}</span> <span class="bar" style="--share:{share:.4f}"></span>'


def coverage_map(boxes: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, float]:
    """Part of the boxes that cover each place of the image.

    Args:
        boxes: [T, 4], xyxy in px.
        sizes: [T, 2], (h, w) of the image of each box.

    Returns:
        [rows, columns] in [0, 1], and height / width of the median image.
    """
    aspect = float(np.median(sizes[:, 0] / np.maximum(sizes[:, 1], 1)))
    columns = CELLS if aspect <= 1 else max(round(CELLS / aspect), 1)
    rows = max(round(CELLS * aspect), 1) if aspect <= 1 else CELLS
    grid = np.array([columns, rows])
    relative = boxes.reshape(-1, 2, 2) / np.maximum(sizes[:, None, ::-1], 1) * grid  # [T, (first, last), (x, y)]
    first = np.clip(np.floor(relative[:, 0]), 0, grid - 1).astype(int)
    last = np.clip(np.ceil(relative[:, 1]).astype(int), first + 1, grid)
    changes = np.zeros((rows + 1, columns + 1))  # summed along both axes it counts the boxes over each cell
    for xs, ys, sign in ((first, first, 1), (last, first, -1), (first, last, -1), (last, last, 1)):
        np.add.at(changes, (ys[:, 1], xs[:, 0]), sign)
    return changes.cumsum(0).cumsum(1)[:-1, :-1] / max(len(boxes), 1), aspect


def map_image(share: np.ndarray) -> str:
    """The map as an <img>, the darker the more boxes."""
    part = (share / max(share.max(), 1e-9))[..., None]
    color = np.array([246, 249, 252]) * (1 - part) + np.array([13, 60, 110]) * part
    return f'<div class="map">{picture(color.round().astype(np.uint8), "places of the boxes", "PNG")}</div>'
