"""The FPN paper's comparison at a small scale: python tools/paper.py [quick=true] [name=value ...] [setting=value ...].

Trains the rows of Tables 1 and 3 and the pyramids of Figure 1 on drawn shapes, measures them as the paper does, and writes
our numbers beside the paper's as docs/paper.md and docs/paper.html. Names and defaults are in `Options`; a dotted name is a
setting of every run. Repeat the command to continue after an interruption; finished runs are kept.
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
from _paper.chart import draw_bars
from _paper.page import DETECTION_METRICS, PROPOSAL_METRICS, write_pages
from _paper.pictures import draw_pyramids
from _paper.rows import DETECTORS, PROPOSALS, PaperRow
from fpn_det.cli.arguments import run_command
from fpn_det.schema import Count


@dataclass(frozen=True)
class Options:
    """Options of the comparison."""

    quick: bool = False  # FPN, bottom-up and C5 only, with one seed
    seeds: Count = 3
    at_once: Count = 2  # runs at a time, one core each
    precision: Literal["fp32", "bf16"] = "bf16"  # fp32 takes one and a half times as long on processors with bf16
    data: str = "datasets/shapes_128"  # drawn if it is not there
    folder: str = "runs/paper"  # of all runs
    output: str = "docs"  # of the pages
    overrides: tuple[str, ...] = ()  # settings of every run

    @property
    def rows(self) -> list[PaperRow]:
        """The rows to compare."""
        return [row for row in (*PROPOSALS, *DETECTORS) if row.quick or not self.quick]


def main(options: Options) -> None:
    """Draw the data set, train, measure, and write the pages."""
    console = Console()
    data, folder, rows = Path(options.data), Path(options.folder), options.rows
    make_data(data)
    overrides = (f"data.root={data}", f"precision={options.precision}", *options.overrides)
    jobs = jobs_of(rows, 1 if options.quick else options.seeds, folder)
    try:
        runs = finish(jobs, overrides, options.at_once, console.print)
    except RuntimeError as error:
        sys.exit(str(error))
    costs = folder / ("costs_quick.json" if options.quick else "costs.json")
    if not costs.is_file():
        costs.write_text(json.dumps(measure({row.name: row for row in rows}, folder, overrides), indent=2) + "\n")
    versions = json.loads((jobs[0].folder / "versions.json").read_text())
    versions.pop("command")  # of one run only, with paths of this machine
    results = Results(runs, json.loads(costs.read_text()), versions)
    page = Path(options.output) / f"{'paper_quick' if options.quick else 'paper'}.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.with_suffix(".json").write_text(json.dumps(asdict(results), indent=2) + "\n")
    proposals, detectors = ([row for row in rows if row in table] for table in (PROPOSALS, DETECTORS))
    draw_bars(results, proposals, PROPOSAL_METRICS, page.with_name(f"{page.stem}_proposals.png"))
    draw_bars(results, detectors, DETECTION_METRICS, page.with_name(f"{page.stem}_detection.png"))
    drawn = [*proposals, *(row for row in detectors if row.name == "feature_hierarchy")]
    draw_pyramids(drawn, data, folder, page.with_name(f"{page.stem}_maps.jpg"))
    write_pages(results, proposals, detectors, page)
    console.print(f"written: {page}, and the same as .html and .json")


if __name__ == "__main__":
    run_command(main, Options)
