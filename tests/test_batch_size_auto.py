"""A GPU's answer is replaced by a function of the batch."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console
from tiny import TINY

from fpn_det.composition import compose
from fpn_det.runs.folder import choose_folder
from fpn_det.runs.log import RunLog
from fpn_det.runtime import Ranks
from fpn_det.training import memory
from fpn_det.training.trainer import Trainer


@pytest.fixture
def prepared(shapes_dataset, tmp_path):
    """Makes a trainer with `trainer.batch_size=auto`, as if the CPU could be asked."""

    def prepare(name: str, resume: str | None = None) -> Trainer:
        words = [*TINY, f"data.root={shapes_dataset}", "data.check=false"]
        config = compose([*words, "trainer.batch_size=auto", "trainer.accumulate=2"])
        trainer = Trainer(
            compose([*words, "trainer.batch_size=2", "trainer.accumulate=2"]), Ranks(), torch.device("cpu")
        )
        trainer.config = config
        folder = choose_folder(None, str(tmp_path / name), resume)
        trainer.prepare(folder, RunLog(folder.path, Ranks(), screen=Console(quiet=True)))
        return trainer

    return prepare


def test_batch_size_auto_is_what_fits_and_a_resumed_run_keeps_it(monkeypatch, prepared):
    monkeypatch.setattr(memory, "fits", lambda optimization, batch: optimization.rehearse([batch]) or len(batch) <= 3)
    trainer = prepared("run")
    assert trainer.config.trainer.batch_size == 6  # three images in each of two passes
    monkeypatch.setattr(memory, "fits", lambda optimization, batch: False)
    with pytest.raises(ValueError, match="trainer.batch_size: expected room for one image on cpu, got none"):
        prepared("other")
    trainer._save(0)
    assert prepared("run", resume="auto").config.trainer.batch_size == 6


def test_measuring_the_batch_size_leaves_the_weights_alone(monkeypatch, prepared):
    monkeypatch.setattr(memory, "fits", lambda optimization, batch: len(batch) <= 3)
    untouched = prepared("one").model.state_dict()
    monkeypatch.setattr(memory, "fits", lambda optimization, batch: optimization.rehearse([batch]) or len(batch) <= 3)
    measured = prepared("other").model.state_dict()
    assert all(torch.equal(measured[name], tensor) for name, tensor in untouched.items())
