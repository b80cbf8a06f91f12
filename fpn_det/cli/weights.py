"""List published detectors: names for init_from and api.load, with AP on COCO val2017, size and licence.

A file is fetched when it is first used, and kept. Without network, put it where the list says.
experiment=finetune starts from torchvision's v2; the others have the structure of r50_fpn.

Examples:
  fpn-det weights
  fpn-det train experiment=finetune data.root=<folder>
  fpn-det train init_from=<name> optimizer.lr=0.002 data.root=<folder>
"""

from __future__ import annotations

import sys

from rich.table import Table

from fpn_det.interop.catalog import PUBLISHED
from fpn_det.terminal import standard_console


def main() -> None:
    """Print the table, and below it the folder that keeps the files and where each comes from."""
    if words := sys.argv[1:]:
        print(f"command line: expected no options, got '{words[0]}'. Leave it out.", file=sys.stderr)
        sys.exit(2)
    table = Table(box=None, pad_edge=False)
    for title in ("name", "AP", "MB", "licence", "SHA-256", "here"):
        table.add_column(title, justify="right" if title in ("AP", "MB") else "left", no_wrap=True)
    for name, item in PUBLISHED.items():
        digits = item.hash[:8] if item.hash else "not known"
        here = "yes" if item.path.is_file() else "no"
        table.add_row(name, f"{item.ap:.1f}", str(item.megabytes), item.licence, digits, here)
    console = standard_console()
    console.print(table)
    folders = {str(item.path.parent) for item in PUBLISHED.values()}
    print(f"\nAP is what their projects state. Files are kept in\n  {', '.join(folders)}\nand fetched from")
    for item in PUBLISHED.values():
        print(f"  {item.url}")
