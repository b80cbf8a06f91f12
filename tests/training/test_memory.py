from __future__ import annotations

import pytest
import torch
from parts import TinyDetector, differences, make_batch, make_optimization, snapshot

from fpn_det.errors import SystemFault
from fpn_det.training.memory import explained, is_out_of_memory, largest_that_fits


@pytest.mark.parametrize("most", range(12))
@pytest.mark.parametrize("limit", [1, 5, 8])
def test_the_largest_number_that_fits_is_found(most, limit):
    tried = []

    def fits(number: int) -> bool:
        tried.append(number)
        return number <= most

    assert largest_that_fits(fits, limit) == min(most, limit)
    assert len(set(tried)) == len(tried) and all(1 <= number <= limit for number in tried)


def test_out_of_memory_is_known_on_any_device():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes differ"))


def test_other_errors_are_left_as_they_are():
    with pytest.raises(RuntimeError, match="shapes differ"), explained(make_batch([0])):
        raise RuntimeError("shapes differ")
    with pytest.raises(SystemFault, match="memory: expected room for 1 images of 8 x 8 px"), explained(make_batch([0])):
        raise MemoryError


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_rehearsal_leaves_no_trace_even_if_it_fails(precision):
    model = TinyDetector()
    optimization = make_optimization(model, precision=precision, ema_decay=0.9)
    optimization.step([make_batch([0, 1])], 0)
    before, scale = snapshot(optimization), optimization.scale.good_steps
    optimization.rehearse([make_batch([2, 3])])
    forward = model.forward

    def fail(batch, step):
        forward(batch, step)  # which moves the statistics of norms
        raise torch.OutOfMemoryError("CUDA out of memory.")

    model.forward = fail
    with pytest.raises(torch.OutOfMemoryError):
        optimization.rehearse([make_batch([2, 3])])
    assert differences(before, snapshot(optimization)) == []
    assert optimization.alarm.item() == -1 and optimization.scale.good_steps is scale
    assert all(weight.grad is None for weight in model.parameters())
