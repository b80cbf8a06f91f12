"""Intervals with their unit."""

from __future__ import annotations

import pytest

from fpn_det.composition import compose
from fpn_det.training.intervals import in_steps


@pytest.mark.parametrize(
    ("interval", "steps"),
    [
        ("1 step", 1),
        ("500 steps", 500),
        ("1 epoch", 51),
        ("0.5 epochs", 26),  # 25.5, to the even number
        ("2epochs", 102),
        ("0.001 epochs", 1),
        (None, 0),
    ],
)
def test_intervals_in_steps_of_epochs_of_51(interval, steps):
    assert in_steps(interval, 51) == steps


@pytest.mark.parametrize("word", ["500", "0", "0 steps", "1.5 steps", "-1 epochs", "1 iteration", "epoch"])
def test_other_forms_are_refused_with_the_right_one(word):
    with pytest.raises(ValueError, match=r"trainer\.eval_every: expected .*'500 steps' or '1 epoch' or null, got"):
        compose([f"trainer.eval_every={word}"])


def test_a_unit_needs_no_blank_on_a_command_line():
    assert in_steps(compose(["trainer.eval_every=1epoch"]).trainer.eval_every, 7) == 7
    assert in_steps(compose(["trainer.eval_every=2 epochs"]).trainer.eval_every, 7) == 14
