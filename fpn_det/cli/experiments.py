"""List the experiments with what they are for.

Examples:
  fpn-det experiments
  fpn-det experiments paper
"""

from __future__ import annotations

import sys

from fpn_det.cli.declarations import experiments
from fpn_det.cli.help import format_rows


def main() -> None:
    """Print the experiments whose name or description contains all words of the command line."""
    words = [word.lower() for word in sys.argv[1:]]
    found = {name: text for name, text in experiments().items() if all(w in f"{name} {text}".lower() for w in words)}
    if not found:
        print(f"experiments: expected a word of a name or description, got '{' '.join(words)}'.", file=sys.stderr)
        sys.exit(2)
    print(format_rows((name, text) for name, text in found.items()))
