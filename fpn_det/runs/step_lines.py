"""Lines of training steps: a table that grows by a row, in columns of fixed width."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from fpn_det.runs.meters import Pace

ROWS_PER_HEADER = 20
OF_STAGE = re.compile(r"_\d+$")  # end of the name of a part of the loss of a later stage


class StepLines:
    """Formats the values of training steps as aligned lines, with a header above them now and then.

    Args:
        width: characters of a line. Parts of the loss that do not fit are left to TensorBoard.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._rows = 0  # since the last header

    def restart(self) -> None:
        """Repeat the header above the next line, because other text came between."""
        self._rows = 0

    def add(self, step: int, values: Mapping[str, float], parts: Sequence[str], pace: Pace) -> list[str]:
        """Return the line of a step, preceded by the header if it is due.

        Args:
            step: number of completed steps.
            values: by name: `loss`, `lr`, `images_per_s` and the parts of the loss; others are not shown.
            parts: names of the terms that add up to the loss. Those of the stages of a cascade are shown as their sum.
            pace: of the run.
        """
        columns = [(_count("step", step, pace.total_steps))]
        if pace.steps_per_epoch:
            epoch, epochs = (-(-steps // pace.steps_per_epoch) for steps in (step, pace.total_steps))
            columns.insert(0, _count("epoch", epoch, epochs))
        sums: dict[str, float] = {}
        for name in ("loss", *parts):
            if name in values:
                title = _short(OF_STAGE.sub("", name))
                sums[title] = sums.get(title, 0.0) + values[name]
        losses = [(title, loss_text(value), 6) for title, value in sums.items()]
        left_s = pace.eta_s(step)
        rest = [
            ("lr", f"{values['lr']:.3g}" if "lr" in values else "", 8),
            ("img/s", f"{values['images_per_s']:.{1 if values['images_per_s'] < 100 else 0}f}", 5),
            ("left", "" if left_s is None else clock(left_s), 8),
        ]
        gap = 2 if _width(columns + losses + rest, 2) <= self._width else 1
        while len(losses) > 1 and _width(columns + losses + rest, gap) > self._width:
            losses.pop()
        columns += losses + rest
        texts = (" " * gap).join(text.rjust(max(width, len(title))) for title, text, width in columns)
        titles = (" " * gap).join(title.rjust(width) for title, _, width in columns)
        lines = [texts] if self._rows % ROWS_PER_HEADER else [titles, texts]
        self._rows += 1
        return lines


def loss_text(value: float) -> str:
    """A loss in six characters: 0.5123, 12.345, 123.45, 123457; more from a million on."""
    whole = len(f"{abs(value):.0f}")
    return f"{value:.{max(0, 5 - whole)}f}" if whole <= 6 else f"{value:.3g}"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, 0:04:51 or 27:00:00; from 100 hours on days, 6.3 d."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 6000:
        return f"{minutes / 1440:.1f} d"
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _count(title: str, done: int, total: int) -> tuple[str, str, int]:
    return title, f"{done}/{total}", 2 * len(str(total)) + 1


def _short(name: str) -> str:
    return name.replace("objectness", "obj").replace("class", "cls")


def _width(columns: Sequence[tuple[str, str, int]], gap: int) -> int:
    return sum(max(width, len(title)) for title, _, width in columns) + gap * (len(columns) - 1)
