"""The page: the table of ingredients, and what they changed, from the saved results, and notes on single runs."""

from __future__ import annotations

from collections.abc import Sequence
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
        f"Trained in {precision}. The weights are those of the last step, or their moving average where a row has one; no checkpoint was "
        f"chosen by its AP. {results.shown_conditions()}",
    ]
    write_page("Ingredients of recipes", parts, file)


def rows_of(results: Results, table: Table) -> str:
    """The measured rows of a table in percent, and how far each is from the base."""
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
                    change(results.values(table.base.name, "AP"), values) if row is not table.base else "",
                    *results.shown_costs(row.name),
                ]
            )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def change(base: Sequence[float], values: Sequence[float]) -> str:
    """The difference of the means in points, and whether every run of one is above every run of the other."""
    if not base:
        return ""
    difference = f"{sum(values) / len(values) - sum(base) / len(base):+.1f}"
    if len(base) < 2 or len(values) < 2:
        return f"{difference}, too few seeds"
    return difference if min(values) > max(base) or max(values) < min(base) else f"{difference}, within the spread"
