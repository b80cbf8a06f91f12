"""Numbers and ids as annotation files write them: JSON values, and the same as strings."""

from __future__ import annotations

import math
import re
from typing import Any

MAX_NUMBER = 1e100  # larger values have no meaning in px and overflow when multiplied

# Stricter than int() and float(), which also accept underscores and digits of other scripts.
INTEGER = re.compile(r"\s*[+-]?[0-9]{1,19}\s*")
NUMBER = re.compile(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*")


def parse_id(value: Any) -> int | str | None:
    """Return an id: 7, 7.0 and "7" are the integer 7; another string stays a string; anything else is None."""
    if type(value) is int:  # most ids of a file
        return value if abs(value) < 2**63 else None
    if isinstance(value, str):
        if not INTEGER.fullmatch(value):
            return value.strip() or None
        value = int(value)
    number = int(value) if isinstance(value, float) and value.is_integer() else value
    return number if type(number) is int and abs(number) < 2**63 else None


def parse_pixels(value: Any) -> int:
    """Return a number of pixels, or 0 if the value is none."""
    number = parse_id(value)
    return max(number, 0) if isinstance(number, int) else 0


def parse_number(value: Any) -> float:
    """Return a number, also from a string; NaN for anything else and for values beyond MAX_NUMBER."""
    if type(value) is float:  # most values of a file
        return value if abs(value) < MAX_NUMBER else math.nan
    if isinstance(value, str):
        if not NUMBER.fullmatch(value):
            return math.nan
        value = float(value)
    return float(value) if isinstance(value, (int, float)) and abs(value) < MAX_NUMBER else math.nan
