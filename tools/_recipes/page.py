"""The page: the table of ingredients, and what they changed, from the saved results, and notes on single runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from _comparison.results import Results, write_page
from _recipes.rows import Table

TEXTS = Path(__file__).parent


def write_recipes(results: Results, tables: Sequence[Table], precision: str, file: Path) -> None:
    """Write `file` as Markdown, and beside it one HTML file with embedded images."""
    parts = [(TEXTS / "introduction.md").read_text().strip()]
    for table in tables:
        measured = [row for row in table.rows if results.values(row.name, "AP")]
        open_rows = [row.title for row in table.rows if row not in measured]
        parts += [f"## {table.title}", table.text]
        if measured:
            parts += [rows_of(results, table), f"![AP of every run]({file.stem}_{table.name}.png)"]
        if open_rows:
            parts.append(f"Not measured yet; `make recipes` trains them: {', '.join(open_rows)}.")
    parts += [
        (TEXTS / "notes.md").read_text().strip(),
        "## How the tables were measured",
        "± after an AP is the standard deviation over its seeds, after a change of AP the standard error of the difference, from the "
        "deviation over seeds of all rows of the table that have several. "
        f"Trained in {precision}. The weights are those of the last step, or their moving average where a row has one; no checkpoint was "
        f"chosen by its AP. {results.shown_conditions()}",
    ]
    write_page("Ingredients of recipes", parts, file)


def rows_of(results: Results, table: Table) -> str:
    """The measured rows of a table in percent, and how far each is from the base."""
    deviation = seed_deviation(results.values(row.name, "AP") for row in table.rows)
    lines = [
        ["", "words", "seeds", *table.metrics, "change of AP", "parameters", "training step", "image"],
        ["---", "---", *["---:"] * (len(table.metrics) + 5)],
    ]
    for row in table.rows:
        if values := results.values(row.name, "AP"):
            words = table.words(row) if row is not table.base else ""
            lines.append(
                [
                    f"**{row.title}**",
                    f"`{words}`" if words else "",
                    str(len(values)),
                    *(results.shown(row.name, metric) for metric in table.metrics),
                    change(results.values(table.base.name, "AP"), values, deviation) if row is not table.base else "",
                    *results.shown_costs(row.name),
                ]
            )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def seed_deviation(rows: Iterable[Sequence[float]]) -> float | None:
    """The standard deviation over seeds, pooled over rows; None if no row has several seeds."""
    several = [values for values in rows if len(values) > 1]
    if not several:
        return None
    squares = sum(statistics.variance(values) * (len(values) - 1) for values in several)
    return math.sqrt(squares / sum(len(values) - 1 for values in several))


def change(base: Sequence[float], values: Sequence[float], deviation: float | None) -> str:
    """The difference of the means in points, and its standard error if seeds deviate by `deviation`."""
    if not base:
        return ""
    difference = f"{statistics.mean(values) - statistics.mean(base):+.1f}"
    if deviation is None:
        return f"{difference}, too few seeds"
    return f"{difference} ± {deviation * math.sqrt(1 / len(base) + 1 / len(values)):.1f}"
