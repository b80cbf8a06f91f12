"""List runs with their state, best metric and the settings in which they differ.

Examples:
  fpn-det runs
  fpn-det runs root=runs/sweeps
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from fpn_det.cli.arguments import run_command
from fpn_det.runs.log import PLAIN_WIDTH
from fpn_det.runs.overview import compare_runs, find_runs, runs_table
from fpn_det.terminal import SafeConsole


@dataclass(frozen=True)
class RunsConfig:
    """Options of `fpn-det runs`."""

    root: str = "runs"  # folder that is searched for run folders


def main() -> None:
    """List the runs of the folder that the command line names."""
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
    console = SafeConsole(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    console.print(runs_table(*compare_runs(runs, root)))
    for run in runs:
        if run.error:
            console.print(f"unreadable: {run.error}", markup=False, soft_wrap=True)
