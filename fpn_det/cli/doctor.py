"""Check the installation: versions, devices, and whether the installed packages work together.

Exit code 1 if something does not work, with what to do about it.

Examples:
  fpn-det doctor
"""

from __future__ import annotations

import sys

from fpn_det import doctor  # imports no third-party package at the top: one of them may be broken


def main() -> None:
    """Check the installation."""
    if words := sys.argv[1:]:
        print(f"command line: expected no options, got '{words[0]}'. Leave it out.", file=sys.stderr)
        sys.exit(2)
    sys.exit(doctor.main())
