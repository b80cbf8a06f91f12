"""Requests to stop a run: SIGTERM (clusters, `kill`), SIGINT (Ctrl-C), and the end of the launcher."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from types import FrameType, TracebackType
from typing import TypeVar

from fpn_det.runtime import host_all_reduce_max

T = TypeVar("T")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
REPEAT_S = (
    5.0  # launchers forward a signal that the process group got already: repeats within this time are one request
)


class Stopped(Exception):
    """A rank was asked to stop during work that can be repeated."""


class StopRequest:
    """Context in which a signal is recorded, so that the run can save first. A second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self._received = 0
        self._received_at = 0.0
        self._previous: dict[int, object] = {}
        # torchrun's workers outlive it if it is killed, and would run beside those of the next launch
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # only there can signals be handled
            self._previous = {number: signal.signal(number, self._record) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _record(self, number: int, frame: FrameType | None) -> None:
        if not self._received:
            self._received, self._received_at = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._received_at > REPEAT_S:
            raise KeyboardInterrupt

    def agreed(self) -> int:
        """The signal that a rank received, 0 if none did. Collective: all ranks call it after the same step."""
        return host_all_reduce_max(self._check())

    def until_stopped(self, batches: Iterable[T]) -> Iterator[T]:
        """Iterate over this rank's batches; other ranks may have more or fewer. Collective at every batch.

        Raises:
            Stopped: on all ranks, when one was asked to stop.
        """
        remaining = iter(batches)
        while True:
            batch = next(remaining, None)
            answer = host_all_reduce_max(2 * self._check() + (batch is not None))  # one collective for both
            if answer > 1:
                raise Stopped
            if batch is not None:
                yield batch
            elif not answer:
                return

    def _check(self) -> int:
        if self._launcher not in (None, os.getppid()):
            self._received = self._received or signal.SIGTERM
        return self._received
