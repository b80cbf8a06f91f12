"""What a GPU would say is said here by a function of the batch."""

from __future__ import annotations

import pytest
import torch
from tiny import TINY

from fpn_det.api import build_model, read_training_data
from fpn_det.assembly import settle_batch_size
from fpn_det.config import compose
from fpn_det.runtime import Ranks
from fpn_det.saved import to_yaml
from fpn_det.training import memory

CPU = torch.device("cpu")


def test_batch_size_auto_is_what_fits_and_a_resumed_run_keeps_it(monkeypatch, shapes_dataset, tmp_path):
    settings = compose(
        [*TINY, f"data.root={shapes_dataset}", "data.check=false", "trainer.batch_size=auto", "trainer.accumulate=2"]
    )
    train, _ = read_training_data(settings.data, settings.seed)
    model = build_model(settings, train.num_classes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(memory, "fits", lambda optimization, batch: optimization.rehearse([batch]) or len(batch) <= 3)
    settled = settle_batch_size(settings, model, train, Ranks(), CPU, resumed=None)
    assert settled.trainer.batch_size == 6  # three images in each of two passes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    (tmp_path / "config.yaml").write_text(to_yaml(settled))
    monkeypatch.setattr(memory, "fits", lambda optimization, batch: False)
    assert settle_batch_size(settings, model, train, Ranks(), CPU, resumed=tmp_path) == settled
    with pytest.raises(ValueError, match="trainer.batch_size: expected room for one image on cpu, got none"):
        settle_batch_size(settings, model, train, Ranks(), CPU, resumed=None)
