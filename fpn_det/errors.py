"""What stops a run from outside (a disk, a worker, another rank), said in one sentence. Errors of our own keep their trace."""

from __future__ import annotations

import errno
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fpn_det.runtime import is_echo, mark_as_echo, tells_of_lost_rank

REMEDIES = {
    errno.ENOSPC: "Make room on the disk.",
    errno.EDQUOT: "Make room within the quota.",
    errno.EFBIG: "Raise the limit of file sizes (ulimit -f).",
    errno.EROFS: "Choose a folder on a disk that can be written.",
    errno.EACCES: "Give yourself the right to write there.",
    errno.EPERM: "Give yourself the right to write there.",
    errno.EIO: "Look after the disk.",
    errno.ESTALE: "Look after the network's file system.",
    errno.ENOMEM: "Lower data.num_workers or trainer.batch_size.",
    errno.EMFILE: "Raise the limit of open files (ulimit -n).",
}
WORKER_ENDED = re.compile(
    r"DataLoader worker \(pid.*?\) (?:is killed by signal: (?P<signal>[^.]*)|exited unexpectedly)"
)
WORKER_REMEDIES = {
    "Killed": "The system kills what takes too much memory: lower data.num_workers.",
    "Bus error": "The shared memory is full: enlarge /dev/shm (docker run --shm-size=8g), or set data.num_workers=0.",
}


PACKAGE = Path(__file__).parent


def is_for_people(error: BaseException) -> bool:
    """Whether the package or the running script raised this error itself: its message then suffices without a traceback."""
    if error.__traceback__ is None:
        return True
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    script = getattr(sys.modules["__main__"], "__file__", None)
    return raised_in.is_relative_to(PACKAGE) or str(raised_in) == script


class Fault(Exception):
    """Something from outside ended the run; the message says it all."""


@contextmanager
def explained(rescue: Callable[[], str] = str) -> Iterator[None]:
    """Within this context a fault from outside is a `Fault`, told once: what a writing thread met, the main thread meets too.

    Args:
        rescue: says what can be done with what is there.
    """
    hook = threading.excepthook
    threading.excepthook = lambda failure: None if isinstance(failure.exc_value, OSError) else hook(failure)
    try:
        yield
    except (OSError, RuntimeError) as error:
        sentence = explain(error)
        if not sentence:
            raise
        fault = Fault(f"{sentence} {rescue()}".strip())
        if is_echo(error):
            mark_as_echo(fault)
        raise fault from error
    finally:
        threading.excepthook = hook


def explain(error: Exception) -> str:
    """What happened and what to do about it; empty if this is not a fault from outside."""
    if isinstance(error, OSError) and error.errno in REMEDIES:
        return f"system: expected to write {error.filename or 'the files of the run'}, got: {error.strerror}. {REMEDIES[error.errno]}"
    if found := WORKER_ENDED.search(f"{error.__cause__}\n{error}"):  # the cause names the signal
        how = found["signal"] or "exited"
        remedy = WORKER_REMEDIES.get(how, "Set data.num_workers=0 to see what it does.")
        return f"data: expected the workers to live, got: {found[0]}. {remedy}"
    if tells_of_lost_rank(error):
        return (
            f"distributed: expected to hear from the other ranks, but one has ended or hangs ({str(error).split('. ')[0]}). "
            "What it said last is above and in its rank<k>.log; if it said nothing, it was killed: look at the memory."
        )
    return ""
