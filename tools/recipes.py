"""Ingredients of recipes, alone and together: python tools/recipes.py [train=false] [name=value ...] [setting=value ...].

Trains every row on BCCD (its test list is measured) or on drawn shapes, and writes docs/recipes.md, with charts and the numbers as
JSON. Names and defaults are in `Options`; a dotted name is a setting of every run. Repeat the command to continue after an
interruption; finished runs are kept. `train=false` writes the page of what is finished so far.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from _comparison.results import Results
from _comparison.runs import finish, jobs_of, make_data
from _comparison.speed import measure
from _recipes.chart import draw_chart
from _recipes.page import write_recipes
from _recipes.rows import tables
from fpn_det.cli.arguments import run_command
from fpn_det.schema import Count


@dataclass(frozen=True)
class Options:
    """Options of the comparison."""

    train: bool = True  # false: only write the page of the runs that are finished
    seeds: Count = 2
    at_once: Count = 2  # runs at a time, one core each
    precision: Literal["fp32", "bf16"] = "bf16"
    bccd: str = "datasets/bccd"  # https://github.com/Shenggan/BCCD_Dataset, the folder with Annotations, ImageSets and JPEGImages
    shapes: str = "datasets/shapes_128"  # drawn if it is not there
    folder: str = "runs/recipes"  # of all runs
    output: str = "docs"  # of the page
    overrides: tuple[str, ...] = ()  # settings of every run


def main(options: Options) -> None:
    """Train, measure, and write the page."""
    console = Console()
    bccd, shapes, folder = Path(options.bccd), Path(options.shapes), Path(options.folder)
    if not (bccd / "JPEGImages").is_dir():
        raise ValueError(
            f"bccd: expected a folder with Annotations, ImageSets and JPEGImages, got {bccd}. "
            "Fetch https://github.com/Shenggan/BCCD_Dataset and set bccd=<folder>/BCCD."
        )
    parts = tables(bccd, shapes, options.seeds)
    rows = {row.name: row for table in parts for row in table.rows}
    jobs = jobs_of(rows.values(), options.seeds, folder)
    overrides = (f"precision={options.precision}", *options.overrides)
    if options.train:
        make_data(shapes)
        try:
            finish(jobs, overrides, options.at_once, console.print)
        except RuntimeError as error:
            sys.exit(str(error))
    finished = [job for job in jobs if job.result_file.is_file()]
    if not finished:
        raise ValueError(f"{folder}: expected a finished run, found none. Leave train=false out.")
    runs = [json.loads(job.result_file.read_text()) for job in finished]
    measured = {job.row.name: job.row for job in finished}
    file = folder / "costs.json"
    costs = json.loads(file.read_text()) if file.is_file() else {}
    if costs.keys() != measured.keys():  # all anew, because only times in alternation can be compared
        costs = measure(measured, folder, options.overrides)
        file.write_text(json.dumps(costs, indent=2) + "\n")
    versions = json.loads((finished[0].folder / "versions.json").read_text())
    versions.pop("command")  # of one run only, with paths of this machine
    results = Results(runs, costs, versions)
    page = Path(options.output) / "recipes.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.with_suffix(".json").write_text(json.dumps(asdict(results), indent=2) + "\n")
    for table in parts:
        draw_chart(results, table, page.with_name(f"{page.stem}_{table.name}.png"))
    write_recipes(results, parts, options.precision, page)
    console.print(f"written: {page}, and the same as .html and .json")


if __name__ == "__main__":
    run_command(main, Options)
