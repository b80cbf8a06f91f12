"""Bar charts by object size: filled bars for our numbers, a line across each for those of the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from _comparison.results import Results
from _paper.page import SIZES
from _paper.rows import PaperRow

COLORS = ("#999999", "#56b4e9", "#d55e00", "#e69f00", "#009e73", "#cc79a7")
INK, FAINT, PAPER_LINE = "#222222", "#dddddd", "#000000"
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, LEGEND = 1560, 760, 70, 40, 60, 520  # px, of twice the final size
FONT_SIZE = 26


def draw_bars(results: Results, rows: Sequence[PaperRow], metrics: Mapping[str, str], file: Path) -> None:
    """Draw a group of bars for each metric of a size range, in percent. Thin lines are the range over seeds."""
    metrics = {metric: name for metric, name in metrics.items() if name in SIZES}
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    canvas, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT_SIZE)
    values = [
        value
        for row in rows
        for metric in metrics
        for value in [*results.values(row.name, metric), row.paper.get(metric, 0)]
    ]
    top = 10 * (1 + int(max(values) // 10))
    floor, right = HEIGHT - BOTTOM, WIDTH - LEGEND

    def y(value: float) -> float:
        return floor - (floor - TOP) * value / top

    for mark in range(0, top + 1, 20):
        canvas.line((LEFT, y(mark), right, y(mark)), fill=FAINT, width=2)
        canvas.text((LEFT - 12, y(mark)), str(mark), fill=INK, font=font, anchor="rm")
    group = (right - LEFT) / len(metrics)
    bar = group * 0.8 / len(rows)
    for number, (metric, name) in enumerate(metrics.items()):
        start = LEFT + group * (number + 0.1)
        canvas.text((start + group * 0.4, floor + 12), name, fill=INK, font=font, anchor="ma")
        for index, (row, color) in enumerate(zip(rows, COLORS, strict=False)):
            x, found = start + index * bar, results.values(row.name, metric)
            canvas.rectangle((x + 2, y(results.mean(row.name, metric)), x + bar - 2, floor), fill=color)
            canvas.line((x + bar / 2, y(max(found)), x + bar / 2, y(min(found))), fill=INK, width=2)
            if metric in row.paper:
                canvas.line((x, y(row.paper[metric]), x + bar, y(row.paper[metric])), fill=PAPER_LINE, width=5)
    line: float = TOP
    for row, color in zip(rows, COLORS, strict=False):
        canvas.rectangle((right + 30, line, right + 56, line + 26), fill=color)
        canvas.text((right + 70, line), row.title.split(":")[0], fill=INK, font=font)
        line += 46
    canvas.line((right + 26, line + 14, right + 60, line + 14), fill=PAPER_LINE, width=5)
    canvas.text((right + 70, line), "the paper, on COCO", fill=INK, font=font)
    picture.resize((WIDTH // 2, HEIGHT // 2), Image.Resampling.LANCZOS).save(file)
