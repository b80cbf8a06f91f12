"""Tensors that depend on shapes alone, kept from step to step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_used: list[object] | None = None


@contextmanager
def results_used() -> Iterator[list[object]]:
    """Collects the kept results that are used within this context, for a CUDA graph, which reads them after they are dropped here."""
    global _used
    used: list[object] = []
    _used = used
    try:
        yield used
    finally:
        _used = None


def filled(values: Iterable[float], device: torch.device) -> Tensor:
    """A tensor of numbers, filled on the device, because a copy from the host blocks."""
    return torch.stack([torch.full((), value, device=device) for value in values])


class LastResults(Generic[T]):
    """Keeps the results for the last few keys, such as the shapes of the maps of a canvas.

    In a compiled graph every result is a constant, so nothing is kept there.

    Args:
        size: number of results to keep.
    """

    def __init__(self, size: int = 8) -> None:
        self.size = size
        self._results: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The result for `key`, from `make` if it is not kept.

        Args:
            key: all that the result depends on, the device included.
        """
        if torch.compiler.is_compiling():
            return make()
        key = key, torch._guards.detect_fake_mode()  # a tensor without data is of use within its mode only
        if key not in self._results:
            with torch.inference_mode(False), torch.no_grad():  # usable wherever it is first needed
                self._results[key] = make()
        self._results.move_to_end(key)
        if len(self._results) > self.size:
            self._results.popitem(last=False)
        if _used is not None:
            _used.append(self._results[key])
        return self._results[key]

    def __deepcopy__(self, memo: dict) -> LastResults[T]:
        return LastResults(self.size)
