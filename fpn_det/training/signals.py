"""Asking a run to stop: SIGTERM (a cluster's notice, `kill`), SIGINT (Ctrl-C), and the death of the launcher."""

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
PATIENCE_S = (
    5.0  # launchers pass on what the whole process group got already: repeats within this time are the same request
)


class Stopped(Exception):
    """Some rank was asked to stop in the midst of work that can be done again."""


class StopRequest:
    """Within this context a signal is noted, not obeyed, so that the run can save first. A later, second Ctrl-C is obeyed."""

    def __init__(self) -> None:
        self._noted = 0
        self._noted_at = 0.0
        self._previous: dict[int, object] = {}
        # torchrun's processes outlive it if it is killed, and would go on beside those of the next launch
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # only there can signals be handled
            self._previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self._noted:
            self._noted, self._noted_at = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._noted_at > PATIENCE_S:
            raise KeyboardInterrupt

    def agreed(self) -> int:
        """The signal that some rank got, 0 if none did; the same on all ranks, which all ask after the same step."""
        return host_all_reduce_max(self._look())

    def until_stopped(self, batches: Iterable[T]) -> Iterator[T]:
        """Hand out this rank's batches, of which other ranks may have more or fewer. All ranks go through theirs together.

        Raises:
            Stopped: on all ranks, as soon as one is asked to stop.
        """
        remaining = iter(batches)
        while True:
            batch = next(remaining, None)
            answer = host_all_reduce_max(2 * self._look() + (batch is not None))  # one question for both
            if answer > 1:
                raise Stopped
            if batch is not None:
                yield batch
            elif not answer:
                return

    def _look(self) -> int:
        if self._launcher not in (None, os.getppid()):
            self._noted = self._noted or signal.SIGTERM
        return self._noted
