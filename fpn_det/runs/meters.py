"""Measure training: means of device scalars, throughput, memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from fpn_det.runtime import all_reduce_mean


class Meters:
    """Means of device scalars since the last read. Values stay on the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._counts: dict[tuple[str, ...], int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add one value of each name. Values added in one call are accumulated as one tensor."""
        names = tuple(values)
        row = torch.stack([value.detach().float() for value in values.values()])
        self._sums[names] = self._sums[names] + row if names in self._sums else row
        self._counts[names] = self._counts.get(names, 0) + 1

    def read(self) -> dict[str, float]:
        """Return the mean of each name over its values and over ranks, and reset. One transfer to the host.

        A collective: all ranks must read at the same step.
        """
        if not self._sums:
            return {}
        means = torch.cat([total / self._counts[names] for names, total in self._sums.items()])
        names = [name for group in self._sums for name in group]
        self._sums, self._counts = {}, {}
        return dict(zip(names, all_reduce_mean(means).tolist(), strict=True))  # the one host read


class Pace:
    """Measure throughput and estimate the remaining time. Evaluations are timed separately and included in the estimate.

    Args:
        step: number of completed steps; 0 for a new run.
        total_steps: number of steps of the run.
        batch_size: images per step, over all ranks.
        eval_every: steps between evaluations; 0 evaluates at the end only.
        clock: returns seconds, monotonic.
        steps_per_epoch: None where there are no epochs.

    Attributes:
        data_share: fraction of the time between the last two reads spent waiting for data.
        is_warm: the last read was not the first, whose interval includes the start of the workers.
    """

    def __init__(
        self,
        step: int,
        total_steps: int,
        batch_size: int,
        eval_every: int,
        clock: Callable[[], float] = time.perf_counter,
        steps_per_epoch: int | None = None,
    ) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.first_step = step
        self.total_steps = total_steps
        self._batch_size = batch_size
        self._eval_every = eval_every or total_steps
        self._clock = clock
        self._last_step = step
        self._started = self._last_read = clock()
        self._waited_s = self._evaluated_s = self._evaluated_since_read_s = 0.0
        self._num_evaluations = 0
        self.data_share = 0.0
        self.is_warm = False

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time the wait for the next batch."""
        start = self._clock()
        yield
        self._waited_s += self._clock() - start

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Time an evaluation, including the writing of its results."""
        start = self._clock()
        yield
        seconds = self._clock() - start
        self._evaluated_s += seconds
        self._evaluated_since_read_s += seconds
        self._num_evaluations += 1

    def read(self, step: int) -> dict[str, float]:
        """Return images per second, and seconds per step spent waiting for data, since the previous read."""
        now = self._clock()
        steps = max(step - self._last_step, 1)
        seconds = now - self._last_read - self._evaluated_since_read_s
        speed = {"images_per_s": steps * self._batch_size / max(seconds, 1e-9), "data_s": self._waited_s / steps}
        self.is_warm = self._last_step > self.first_step
        self.data_share = self._waited_s / max(seconds, 1e-9)
        self._last_step, self._last_read = step, now
        self._waited_s = self._evaluated_since_read_s = 0.0
        return speed

    def evaluations_after(self, step: int) -> int:
        """Return the number of evaluations after `step`, including that of the last step."""
        if step >= self.total_steps:
            return 0
        extra = self.total_steps % self._eval_every != 0
        return self.total_steps // self._eval_every - step // self._eval_every + extra

    def eta_s(self, step: int) -> float | None:
        """Estimate the seconds to the end of the run; None before the first step.

        Evaluations are included once one has been timed.
        """
        steps_done = step - self.first_step
        if steps_done <= 0:
            return None
        step_s = (self._clock() - self._started - self._evaluated_s) / steps_done
        evaluation_s = self._evaluated_s / max(self._num_evaluations, 1)
        return (self.total_steps - step) * step_s + self.evaluations_after(step) * evaluation_s


def memory_mib(device: torch.device) -> float:
    """Return the peak memory in MiB: allocated by torch on a GPU, or resident in this process for other devices."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB on Linux
