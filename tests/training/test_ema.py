from __future__ import annotations

import torch
from compare import assert_close
from parts import TinyDetector

from fpn_det.training.ema import EMA


def update(ema: EMA, step: int, good: bool = True) -> None:
    ema.update(torch.tensor(ema.rate(step) * good))


def test_ema_by_hand():
    model = TinyDetector()
    torch.nn.init.constant_(model.head.weight, 0.0)
    ema = EMA(model, decay=0.5)
    torch.nn.init.constant_(model.head.weight, 1.0)
    update(ema, 0)  # decay 1/10: 0 -> 0.9
    assert_close(ema.model.head.weight, torch.full_like(model.head.weight, 0.9), 1e-5)
    update(ema, 1)  # decay 2/11: 0.9 -> 1 - 0.1 * 2/11
    assert_close(ema.model.head.weight, torch.full_like(model.head.weight, 1 - 0.2 / 11), 1e-5)
    torch.nn.init.constant_(model.head.weight, 0.0)
    update(ema, 1000)  # decay 0.5
    assert_close(ema.model.head.weight, torch.full_like(model.head.weight, (1 - 0.2 / 11) / 2), 1e-5)


def test_ema_copies_buffers_and_leaves_frozen_weights():
    model = TinyDetector()
    model.conv.weight.requires_grad_(False)
    ema = EMA(model, decay=0.9)
    frozen = ema.model.conv.weight.clone()
    model.norm.running_mean += 3
    model.norm.num_batches_tracked += 1
    update(ema, 0)
    assert torch.equal(ema.model.norm.running_mean, model.norm.running_mean)
    assert torch.equal(ema.model.norm.num_batches_tracked, model.norm.num_batches_tracked)
    assert torch.equal(ema.model.conv.weight, frozen)


def test_ema_stands_still_on_a_bad_step():
    model = TinyDetector()
    ema = EMA(model, decay=0.9)
    before = {name: tensor.clone() for name, tensor in ema.model.state_dict().items()}
    torch.nn.init.constant_(model.head.weight, 1.0)
    update(ema, 5, good=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in ema.model.state_dict().items())
