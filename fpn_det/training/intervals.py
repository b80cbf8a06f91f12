"""Intervals of a run in steps or epochs, written with the unit: `500 steps`, `1 epoch`."""

from __future__ import annotations

import re
from typing import Annotated

WITH_UNIT = re.compile(r"(?P<count>\d+(?:\.\d+)?)\s*(?P<unit>step|epoch)s?")


class _WithUnit:
    """The second half of an `Annotated` hint: text with a positive number of steps or epochs, steps being whole."""

    def __contains__(self, text: str) -> bool:
        found = WITH_UNIT.fullmatch(text)
        if not found or not float(found["count"]):
            return False
        return found["unit"] == "epoch" or "." not in found["count"]

    def __str__(self) -> str:
        return "with a number and its unit, such as '500 steps' or '1 epoch'"


Interval = Annotated[str, _WithUnit()]


def in_steps(interval: str | None, steps_per_epoch: int) -> int:
    """The steps of an `Interval`, at least 1; 0 for None, which means only at the end of the run."""
    if interval is None:
        return 0
    found = WITH_UNIT.fullmatch(interval)
    assert found is not None, "checked when settings are fitted"
    count = float(found["count"])
    return max(1, round(count * steps_per_epoch if found["unit"] == "epoch" else count))
