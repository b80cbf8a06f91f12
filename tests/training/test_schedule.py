from __future__ import annotations

import pytest

from fpn_det.training.schedule import Cosine, MultiStep


def test_multistep_by_hand():
    schedule = MultiStep(steps=90, milestones=(2 / 3, 8 / 9), gamma=0.1, warmup_steps=10, warmup_factor=0.001)
    assert schedule.factor(0) == pytest.approx(0.001)
    assert schedule.factor(5) == pytest.approx(0.5005)  # halfway between 0.001 and 1
    assert schedule.factor(10) == 1.0
    assert schedule.factor(59) == 1.0
    assert schedule.factor(60) == pytest.approx(0.1)  # 2/3 of 90
    assert schedule.factor(79) == pytest.approx(0.1)
    assert schedule.factor(80) == pytest.approx(0.01)  # 8/9 of 90


def test_cosine_by_hand():
    schedule = Cosine(steps=100, final_factor=0.2, warmup_steps=0)
    assert schedule.factor(0) == 1.0
    assert schedule.factor(50) == pytest.approx(0.6)  # halfway between 1 and 0.2
    assert schedule.factor(75) == pytest.approx(0.2 + 0.8 * (1 - 2**-0.5) / 2)


@pytest.mark.parametrize("steps, warmup", [(5, 0), (100, 10), (90_000, 1000)])
def test_warmup_is_a_tenth_of_the_run_and_at_most_1000(steps, warmup):
    schedule = MultiStep(steps=steps, milestones=())
    assert schedule.factor(warmup) == 1.0
    assert all(schedule.factor(step) < 1 for step in range(warmup))


@pytest.mark.parametrize(
    "steps, stated, warmup, told",
    [
        (200, 50, 50, "warm-up over 50 steps"),  # exactly a quarter
        (199, 50, 19, "warm-up over 19 steps: schedule.warmup_steps=50 exceeds a quarter of the run"),
        (9, 50, 0, "no warm-up: schedule.warmup_steps=50 exceeds a quarter of the run"),
        (9, 0, 0, "no warm-up"),
    ],
)
def test_warmup_that_exceeds_a_quarter_of_the_run_has_the_default_length_and_says_so(steps, stated, warmup, told):
    schedule = MultiStep(steps=steps, milestones=(), warmup_steps=stated)
    factors = [schedule.factor(step) for step in range(steps)]
    assert [factor < 1 for factor in factors] == [step < warmup for step in range(steps)]
    assert schedule.describe_warmup() == told


def test_schedule_holds_its_last_value():
    schedule = Cosine(steps=10)
    assert schedule.factor(9) == schedule.factor(10) == schedule.factor(1000)


def test_schedule_means_the_same_at_any_length():
    short, long = MultiStep(steps=90), MultiStep(steps=90_000)
    assert [short.factor(step) for step in range(10, 90)] == [long.factor(1000 * step) for step in range(10, 90)]


def test_schedule_refuses_what_cannot_be():
    with pytest.raises(
        ValueError, match=r"schedule.milestones: expected fractions of the run, between 0 and 1, got \[60000\]"
    ):
        MultiStep(steps=90, milestones=(0.5, 60000))
