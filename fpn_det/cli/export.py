"""Export a trained detector to ONNX, OpenVINO or torch.export, and prove that the file detects the same.

The file takes uint8 RGB images [B, H, W, 3] and their sizes and gives boxes, scores, labels, valid and count. It gets its
name only if its detections are those of torch. `predict` and `eval` take it as a checkpoint.

Examples:
  fpn-det export run=runs/demo
  fpn-det export run=runs/demo format=openvino verify=ap
  fpn-det export run=runs/demo format=openvino precision=int8
  fpn-det export checkpoint=model.pt size=[480,640] data.root=<folder>
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from fpn_det.cli.launch import argument, launch
from fpn_det.export.export import ExportConfig, export
from fpn_det.runs.checkpoint import find_checkpoint


def main() -> None:
    """Export with the settings of the command line."""
    launch(export_checkpoint, ExportConfig, "export", saved_settings)


def export_checkpoint(config: ExportConfig, words: Sequence[str]) -> None:
    """Export; the proof is printed."""
    # otherwise a cluster's signal would leave the folder of the unfinished file
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    export(config)


def saved_settings() -> str:
    """The settings of the checkpoint that the command line names."""
    return find_checkpoint(argument("run"), argument("checkpoint"))[1]["config"]
