"""Settings that make the demo small enough for a test: steps of a fraction of a second."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent

TINY = (
    "experiment=demo",
    "device=cpu",
    "data.num_workers=0",
    "model.neck.channels=32",
    "model.roi_head.box_head.width=64",
    "trainer.max_steps=2",
    "trainer.batch_size=4",
)
