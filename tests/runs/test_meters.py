from __future__ import annotations

import math

import pytest
import torch

from fpn_det.runs.meters import Meters, Pace, memory_mib


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_meters_average_since_the_last_read():
    meters = Meters()
    for value in (1.0, 2.0, 6.0):
        meters.add({"loss": torch.tensor(value, requires_grad=True), "rois/P2": torch.tensor(int(value))})
    meters.add({"gradient_norm": torch.tensor(5.0)})
    assert meters.read() == {"loss": 3.0, "rois/P2": 3.0, "gradient_norm": 5.0}
    assert meters.read() == {}
    meters.add({"loss": torch.tensor(math.nan)})
    assert math.isnan(meters.read()["loss"])


def test_meters_do_not_modify_their_inputs():
    meters, value = Meters(), torch.tensor(1.0)
    meters.add({"loss": value})
    meters.add({"loss": value})
    assert value.item() == 1.0 and meters.read() == {"loss": 1.0}


def test_pace_by_hand():
    # 10 steps of 2 s, one evaluation of 30 s at step 5; 4 images per step, half a second of each step is waiting.
    clock = Clock()
    pace = Pace(step=0, total_steps=22, batch_size=4, eval_every=5, clock=clock)
    assert pace.eta_s(0) is None
    for step in range(1, 11):
        with pace.waiting():
            clock.now += 0.5
        clock.now += 1.5
        if step == 5:
            assert pace.read(step) == pytest.approx({"images_per_s": 2.0, "data_s": 0.5})
            with pace.evaluating():
                clock.now += 30
    assert pace.read(10) == pytest.approx({"images_per_s": 2.0, "data_s": 0.5})
    # 12 steps are left, and the evaluations at 15, 20 and at the end, 22
    assert pace.evaluations_after(10) == 3
    assert pace.eta_s(10) == pytest.approx(12 * 2 + 3 * 30)


@pytest.mark.parametrize(
    ("step", "total", "every", "left"),
    [(0, 10, 0, 1), (10, 10, 0, 0), (0, 10, 5, 2), (5, 10, 5, 1), (9, 10, 4, 1), (0, 3, 5, 1)],
)
def test_pace_counts_evaluations(step, total, every, left):
    assert Pace(0, total, 1, every).evaluations_after(step) == left


def test_pace_of_a_resumed_run_counts_its_own_steps():
    clock = Clock()
    pace = Pace(step=100, total_steps=110, batch_size=1, eval_every=0, clock=clock)
    clock.now = 8
    assert pace.eta_s(104) == pytest.approx(6 * 2)


def test_memory_is_a_plausible_number_of_mib():
    assert 50 < memory_mib(torch.device("cpu")) < 1e6
