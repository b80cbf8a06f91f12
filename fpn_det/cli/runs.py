"""List runs: state, step, best metric, when, how long, and what was typed and differs.

Examples:
  fpn-det runs
  fpn-det runs runs/sweeps
  fpn-det runs --json
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from fpn_det.cli.arguments import run_command
from fpn_det.runs.overview import as_json, find_runs, runs_table
from fpn_det.terminal import say, standard_console


@dataclass(frozen=True)
class RunsConfig:
    """Options of `fpn-det runs`."""

    root: str = "runs"  # folder that is searched for run folders
    json: bool = False  # or --json: print all that is known of the runs as JSON


def main() -> None:
    """List the runs of the folder that the command line names."""
    sys.argv = ["json=true" if word == "--json" else word for word in sys.argv]
    run_command(list_runs, RunsConfig, positional="root")


def list_runs(config: RunsConfig) -> None:
    """Print the table.

    Raises:
        ValueError: there is no run in the folder.
    """
    root = Path(config.root)
    runs = find_runs(root)
    if not runs:
        raise ValueError(f"root: expected a folder with runs in it, got {root}, which has none.")
    if config.json:
        print(as_json(runs))
        return
    console = standard_console()
    for line in runs_table(runs, root, console.width):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for run in runs:
        if run.error:
            say(console, f"unreadable: {run.error}")
