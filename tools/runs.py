"""List runs: python tools/runs.py [root=runs]: how each went, its best metric, and the settings in which they differ."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from fpn_det.runs.log import PLAIN_WIDTH
from fpn_det.runs.overview import compare, find_runs, runs_table


def main(arguments: list[str]) -> int:
    """Print the table. Returns the exit code."""
    if len(arguments) > 1 or any(not argument.startswith("root=") for argument in arguments):
        print(f"tools/runs.py: expected root=<folder> or nothing, got {' '.join(arguments)}.", file=sys.stderr)
        return 2
    root = Path(arguments[0].removeprefix("root=")) if arguments else Path("runs")
    runs = find_runs(root)
    if not runs:
        print(f"root: expected a folder with runs in it, got {root}, which has none.", file=sys.stderr)
        return 2
    Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH).print(runs_table(*compare(runs, root)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
