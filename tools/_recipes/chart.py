"""A chart of each table: the AP of every run, by row."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill

from PIL import Image, ImageDraw, ImageFont

from _comparison.results import Results
from _recipes.rows import Table

INK, FAINT, BASE, VARIANT = "#222222", "#dddddd", "#999999", "#0072b2"
WIDTH, LEFT, RIGHT, LINE, MARGIN = 1560, 620, 1500, 52, 60  # px, of twice the final size
RADIUS = 9  # of a run, px
FONT_SIZE = 26
TITLE = 44  # letters of a line, of two at most


def draw_chart(results: Results, table: Table, file: Path) -> None:
    """Draw a line for each measured row: a dot for each run, a bar for the mean; the dashed line is the base's mean."""
    found = {row.name: results.values(row.name, "AP") for row in table.rows}
    rows = [row for row in table.rows if found[row.name]]
    if not rows:
        file.unlink(missing_ok=True)
        return
    every = [value for values in found.values() for value in values]
    low, high = int(min(every)) - 1, int(max(every)) + 2
    floor = MARGIN + LINE * len(rows)
    picture = Image.new("RGB", (WIDTH, floor + MARGIN), "white")
    canvas, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT_SIZE)

    def x(value: float) -> float:
        return LEFT + (RIGHT - LEFT) * (value - low) / (high - low)

    step = max(1, (high - low) // 8)
    for mark in range(low, high + 1, step):
        canvas.line((x(mark), MARGIN - 20, x(mark), floor), fill=FAINT, width=2)
        canvas.text((x(mark), floor + 12), str(mark), fill=INK, font=font, anchor="ma")
    canvas.text((LEFT - 20, floor + 12), "AP", fill=INK, font=font, anchor="ra")
    if found[table.base.name]:
        base = x(results.mean(table.base.name, "AP"))
        for top in range(MARGIN - 20, floor, 16):
            canvas.line((base, top, base, top + 8), fill=BASE, width=3)
    for number, row in enumerate(rows):
        y, color = MARGIN + LINE * (number + 0.5), BASE if row is table.base else VARIANT
        canvas.text((LEFT - 20, y), fill(row.title, TITLE), fill=INK, font=font, anchor="rm", align="right")
        mean = x(results.mean(row.name, "AP"))
        canvas.line((mean, y - 18, mean, y + 18), fill=color, width=5)
        for value in found[row.name]:
            canvas.ellipse((x(value) - RADIUS, y - RADIUS, x(value) + RADIUS, y + RADIUS), outline=color, width=4)
    picture.resize((WIDTH // 2, picture.height // 2), Image.Resampling.LANCZOS).save(file)
