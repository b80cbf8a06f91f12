"""Whole training steps as CUDA graphs: forward, backward, clipping, optimizer, moving average, guard.

A graph is captured once for each shape of the batches, and replayed with their contents in fixed slots. All graphs share one
memory pool, because only one of them runs at a time. What changes from step to step is on the device (`Optimization.set_step`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from fpn_det.caching import results_used
from fpn_det.runtime import current_ranks
from fpn_det.structures import Batch, Losses, tensors_of
from fpn_det.training.memory import is_out_of_memory
from fpn_det.training.optimization import Optimization

MAX_GRAPHS = 16
Capture = bool | Literal["auto"]
Step = Callable[[Sequence[Batch], int], list[Losses]]


class Recorder(Protocol):
    """Records work of a device, to be replayed."""

    def on_stream(self) -> AbstractContextManager[None]:
        """The context in which all steps run, recorded or not."""

    def record(self, work: Callable[[], list[Losses]]) -> tuple[Callable[[], object], list[Losses]]:
        """Returns the replay of `work`, and its results, which each replay overwrites. Nothing has run yet."""


class CudaGraphs:
    """Records CUDA graphs that share a memory pool."""

    def __init__(self, device: torch.device) -> None:
        # autograd remembers the stream of each weight's gradient, so that ordinary steps must use the stream of captures
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        outer = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(outer)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            outer.wait_stream(self.stream)

    def record(self, work: Callable[[], list[Losses]]) -> tuple[Callable[[], object], list[Losses]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            results = work()
        return graph.replay, results


@dataclass(frozen=True)
class _Graph:
    slots: list[Batch]
    replay: Callable[[], object]
    results: list[Losses]
    constants: list[object]  # tables that the graph reads, which must outlive their cache


class CapturedSteps:
    """Steps of an optimization, replayed where they could be captured, ordinary otherwise.

    The first step of a shape is an ordinary one: it chooses algorithms and fills caches. The second is captured.

    Args:
        tell: called once with the reason if steps are not captured.
    """

    def __init__(self, optimization: Optimization, recorder: Recorder, tell: Callable[[str], None]) -> None:
        self._optimization = optimization
        self._recorder = recorder
        self._tell = tell
        self._graphs: dict[object, _Graph | None] = {}
        self._is_refused = False

    def __call__(self, batches: Sequence[Batch], step: int) -> list[Losses]:
        """One step. The losses are valid until the next one."""
        with self._recorder.on_stream():
            self._optimization.set_step(step)
            graph = self._graph_of(batches)
            if graph is None:
                return self._optimization.run(batches)
            for slot, batch in zip(graph.slots, batches, strict=True):
                torch._foreach_copy_(list(tensors_of(slot)), list(tensors_of(batch)))
            graph.replay()
            return graph.results

    def _graph_of(self, batches: Sequence[Batch]) -> _Graph | None:
        shape = tuple((tensor.shape, tensor.dtype) for batch in batches for tensor in tensors_of(batch))
        if shape not in self._graphs:
            if len(self._graphs) == MAX_GRAPHS:
                self._refuse(f"more than {MAX_GRAPHS} shapes of batches. Set data.canvas=bucket, or a fixed canvas")
            else:
                self._graphs[shape] = None
            return None
        if self._graphs[shape] is None and not self._is_refused:
            self._graphs[shape] = self._capture(batches)
        return self._graphs[shape]

    def _capture(self, batches: Sequence[Batch]) -> _Graph | None:
        slots = [batch.map(torch.clone) for batch in batches]
        try:
            with results_used() as constants:
                replay, results = self._recorder.record(lambda: self._optimization.run(slots))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self._optimization.optimizer.zero_grad()
            self._refuse((str(error).splitlines() or [type(error).__name__])[0])
            return None
        return _Graph(slots, replay, results, constants)

    def _refuse(self, reason: str) -> None:
        if not self._is_refused:
            self._tell(f"trainer.capture: some steps are not captured as CUDA graphs: {reason}.")
        self._is_refused = True


def make_step(optimization: Optimization, capture: Capture, tell: Callable[[str], None]) -> Step:
    """The function of a training step, captured as `trainer.capture` says.

    Args:
        tell: called once with the reason if steps are not captured though they should be.
    """
    if capture is False or (capture == "auto" and optimization.device.type != "cuda"):
        return optimization.step
    if optimization.device.type != "cuda":
        reason = f"CUDA graphs need a GPU, the device is {optimization.device.type}"
    elif (num_ranks := current_ranks().world_size) > 1:
        reason = f"there are {num_ranks} ranks, of which one would capture a new shape while another replays"
    else:
        group = optimization.optimizer.param_groups
        for each in group:
            each["capturable"] = True  # Adam counts its steps on the device in either case, and asks for this word
        optimization.optimizer._warned_capturable_if_run_uncaptured = True
        return CapturedSteps(optimization, CudaGraphs(optimization.device), tell)
    tell(f"trainer.capture: steps are not captured as CUDA graphs: {reason}.")
    return optimization.step
