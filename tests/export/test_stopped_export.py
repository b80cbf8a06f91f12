from __future__ import annotations

import os
import signal

import pytest
import torch
from tiny import TINY, state_of

from fpn_det.composition import compose
from fpn_det.export import export
from fpn_det.runs.checkpoint import save_checkpoint


def test_an_export_that_is_stopped_leaves_no_file(run_tool, shapes_dataset, tmp_path, monkeypatch):
    config = compose([*TINY, f"data.root={shapes_dataset}"])
    names = config.data.read_train_and_val(seed=0).train.class_names
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "best.pt", state_of(config, config.build_model(len(names)), names, range(len(names))))
    found = []

    def stopped(self: object, *arguments: object) -> None:
        found.extend(path.name for path in tmp_path.iterdir())
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(export.Graph, "trace", stopped)
    handler = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the command does not handle it"))
    try:
        result = run_tool("export.py", "checkpoint=best.pt", "format=torch")
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert result.returncode == 128 + signal.SIGTERM
    assert any(name.startswith(".export_") for name in found)
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]
