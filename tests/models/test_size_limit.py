"""The number of parameters of a detector is limited, before memory for them is written."""

from __future__ import annotations

import pytest
from torch import nn

from fpn_det.models.weights import limited_parameters


class Drawn(nn.Linear):
    """A linear layer that counts how often its values are drawn."""

    draws = 0

    def reset_parameters(self) -> None:
        Drawn.draws += 1
        super().reset_parameters()


def test_the_limit_counts_all_parameters_and_comes_before_their_values():
    before = Drawn.draws
    with limited_parameters(2 * (3 * 5 + 5)):
        nn.Sequential(Drawn(3, 5), Drawn(3, 5))
    assert Drawn.draws == before + 2

    with pytest.raises(ValueError, match=r"at most 39 parameters, got 40 at its first Drawn of shape \[5\]"):
        with limited_parameters(2 * (3 * 5 + 5) - 1):
            nn.Sequential(Drawn(3, 5), Drawn(3, 5))
    assert Drawn.draws == before + 3


def test_parameters_are_free_again_after_a_refusal():
    with pytest.raises(ValueError, match="at most 1 parameters"), limited_parameters(1):
        nn.Linear(3, 5)
    assert nn.Linear(3, 5).weight.numel() == 15


def test_layers_without_parameters_count_nothing():
    with limited_parameters(0):
        assert dict(nn.BatchNorm2d(4, affine=False)._parameters) == {"weight": None, "bias": None}
