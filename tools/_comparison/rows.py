"""A row of a comparison: one way to train and measure a detector."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One way to train and measure a detector.

    Attributes:
        name: folder of its runs.
        title: of the row on the page.
        settings: words for `fpn-det train`, without seed and folder.
        seeds: maximum number of runs.
        weights_of: name of the row whose weights are evaluated with `settings`; None = the row is trained.
    """

    name: str
    title: str
    settings: tuple[str, ...]
    seeds: int
    weights_of: str | None = None
