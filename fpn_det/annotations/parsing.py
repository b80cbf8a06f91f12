"""Numbers and ids as annotation files write them: JSON values, and the same as strings.

int() and float() also accept underscores and digits of other scripts in strings; these functions do not.
"""

from __future__ import annotations

import math
from typing import Any

MAX_NUMBER = 1e100  # larger values have no meaning in px and overflow when multiplied


def parse_id(value: Any) -> int | str | None:
    """Return an id: 7, 7.0 and "7" are the integer 7; another string stays a string; anything else is None."""
    if type(value) is int:  # most ids of a file
        return value if abs(value) < 2**63 else None
    if isinstance(value, str):
        if "_" in value or not value.isascii():
            return value.strip() or None
        try:
            return parse_id(int(value))
        except ValueError:
            return value.strip() or None
    if isinstance(value, float) and value.is_integer():
        return parse_id(int(value))
    return None


def parse_pixels(value: Any) -> int:
    """Return a number of pixels, or 0 if the value is none."""
    number = parse_id(value)
    return max(number, 0) if isinstance(number, int) else 0


def parse_number(value: Any) -> float:
    """Return a number, also from a string; NaN for anything else and for values beyond MAX_NUMBER."""
    if isinstance(value, str):
        if "_" in value or not value.isascii():
            return math.nan
        try:
            value = float(value)
        except ValueError:
            return math.nan
    if type(value) is float:  # most values of a file
        return value if abs(value) < MAX_NUMBER else math.nan
    return float(value) if isinstance(value, (int, float)) and abs(value) < MAX_NUMBER else math.nan
