"""Scalars of a run, read back from TensorBoard's event files."""

from __future__ import annotations

import logging
from pathlib import Path

Points = list[tuple[int, float]]  # step and value


def read_scalars(folder: Path) -> dict[str, Points]:
    """Read the curves of a run by tag, such as `train/loss`.

    Points that a resumed run wrote again are there once. A folder without event files gives no curves.

    Args:
        folder: of the event files.
    """
    if not folder.is_dir():
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # takes a second

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of every resumed run
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 1})
    events.Reload()
    return {tag: [(item.step, item.value) for item in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
