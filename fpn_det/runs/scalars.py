"""Scalars of a run, read back from TensorBoard's event files."""

from __future__ import annotations

import logging
from pathlib import Path

from fpn_det.runs.tags import present_tag

Points = list[tuple[int, float]]  # step and value


def read_scalars(folder: Path) -> dict[str, Points]:
    """Read the curves of a run by the names of `tags`, also those of earlier versions.

    Points that a resumed run wrote again are there once. A folder without event files gives no curves.

    Args:
        folder: of the event files, see `log.event_folder`.
    """
    if not folder.is_dir():
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # takes a second

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of every resumed run
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 1})
    events.Reload()
    curves: dict[str, Points] = {}
    for tag in events.Tags()["scalars"]:
        curves.setdefault(present_tag(tag), []).extend((item.step, item.value) for item in events.Scalars(tag))
    return {tag: sorted(points) for tag, points in curves.items()}
