"""The learning rate as a pure function of the step.

A schedule is a fraction of the peak learning rate and has no state, so a resumed run has the learning rates of the
uninterrupted one. Milestones and the default warm-up are fractions of the run, so that a recipe transfers to any data set
and batch size.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from fpn_det.schema import CountOrZero, Fraction, Share


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """Linear warm-up times a decay. The value of the last step holds after it."""

    # length of the run in steps
    steps: int
    # null = a tenth of the run, at most 1000; the same if this is more than a quarter of the run
    warmup_steps: CountOrZero | None = None
    # factor at the start of the warm-up
    warmup_factor: Fraction = 0.001

    @property
    def warmup(self) -> int:
        """Length of the warm-up in steps.

        One of more than a quarter of the run has the default length: a decay would meet it before the peak is reached, so that a
        recipe would train few images at a fraction of its learning rate.
        """
        if self.warmup_steps is None or 4 * self.warmup_steps > self.steps:
            return min(1000, self.steps // 10)
        return self.warmup_steps

    def describe_warmup(self) -> str:
        """One line, such as `warm-up over 50 steps`, with the setting where it is not followed."""
        line = f"warm-up over {self.warmup} steps" if self.warmup else "no warm-up"
        is_followed = self.warmup_steps in (None, self.warmup)
        return (
            line if is_followed else f"{line}: schedule.warmup_steps={self.warmup_steps} exceeds a quarter of the run"
        )

    def factor(self, step: int) -> float:
        """The learning rate of `step`, counted from 0, as a fraction of the peak."""
        step = min(step, self.steps - 1)
        ramp = self.warmup_factor + (1 - self.warmup_factor) * step / self.warmup if step < self.warmup else 1.0
        return ramp * self.decay(step / self.steps)

    @abstractmethod
    def decay(self, progress: float) -> float:
        """The factor without warm-up at `progress`, the completed fraction of the run in [0, 1)."""


@dataclass(frozen=True, kw_only=True)
class MultiStep(Schedule):
    """Step decay at milestones; constant without any."""

    # fractions of the run
    milestones: tuple[Share, ...] = (2 / 3, 8 / 9)
    # factor of each milestone
    gamma: Fraction = 0.1

    def __post_init__(self) -> None:
        if wrong := [milestone for milestone in self.milestones if not 0 < milestone < 1]:
            raise ValueError(f"schedule.milestones: expected fractions of the run, between 0 and 1, got {wrong}.")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(
                f"schedule.milestones: expected increasing fractions of the run, got {list(self.milestones)}."
            )

    def decay(self, progress: float) -> float:
        return self.gamma ** sum(progress >= milestone for milestone in self.milestones)


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Cosine decay from 1 to `final_factor`."""

    # learning rate at the end, relative to the peak
    final_factor: Fraction = 0.0

    def decay(self, progress: float) -> float:
        wave = (1 + math.cos(math.pi * progress)) / 2
        return self.final_factor + (1 - self.final_factor) * wave
