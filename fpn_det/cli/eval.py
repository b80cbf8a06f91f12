"""Evaluate a trained detector with the COCO metrics.

Settings, classes and preprocessing are those of the checkpoint; data paths, device and the like may be changed.
`evaluation=proposals` measures the boxes of the RPN. Results are written to <run>/eval/<checkpoint>.

Examples:
  fpn-det eval run=runs/demo
  fpn-det eval run=runs/demo split=test
  fpn-det eval checkpoint=model.pt tta.scales=[0.8,1,1.2] tta.flip=true
"""

from __future__ import annotations

from collections.abc import Sequence

from fpn_det import api
from fpn_det.cli.launch import argument, launch
from fpn_det.config import EvalConfig
from fpn_det.export import export


def main() -> None:
    """Evaluate with the settings of the command line."""
    launch(evaluate, EvalConfig, "eval", saved_settings)


def evaluate(config: EvalConfig, words: Sequence[str]) -> None:
    """Evaluate; the results are printed and written."""
    api.evaluate(config)


def saved_settings() -> str:
    """The settings of the checkpoint that the command line names."""
    return export.saved_settings(argument("run"), argument("checkpoint"))
